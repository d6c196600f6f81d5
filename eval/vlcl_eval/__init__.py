"""ELEVATER evaluation (import package of `eval/`)."""
