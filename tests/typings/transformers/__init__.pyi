# transformers' own __init__ names thousands of classes; following it took pyright a quarter of its time.
from typing import Any

def __getattr__(name: str) -> Any: ...
