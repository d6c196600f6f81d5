"""Architectures of our own, one open_clip-format JSON each; `vlcl.model` registers them with open_clip."""
