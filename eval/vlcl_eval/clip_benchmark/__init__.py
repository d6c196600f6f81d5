"""CLIP_benchmark's evaluations on its own folders: zero-shot classification and retrieval."""
