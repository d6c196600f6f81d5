"""ELEVATER's protocol: zero-, few- and full-shot (command.py), its search, heads, metrics and submissions."""
