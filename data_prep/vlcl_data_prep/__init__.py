"""`vlcl data`: commands that make, index and check image-text shards; one command a file."""
