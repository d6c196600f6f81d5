"""transformers' form of a dual encoder: which class it fits (forms.py), how weights are named (keys.py, towers.py),
processor and tokenizer files (processor.py), and the way back (weights.py).
"""
