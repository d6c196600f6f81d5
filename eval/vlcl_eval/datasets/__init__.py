"""Data sets to evaluate on: where they lie, their classes, their images. The tables (*.json) are the benchmark's."""
