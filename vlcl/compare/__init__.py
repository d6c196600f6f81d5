"""`vlcl compare`: a grid of runs (grid.py), run one after another (command.py), as one table and figure (report.py)."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """`vlcl.compare` is this package as soon as it is imported, and the public function: so it can be called as it."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from vlcl.compare.command import compare

        return compare(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
