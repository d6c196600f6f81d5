"""What pyproject.toml cannot say: an editable install adds the source folders to Python's path.

setuptools' own way is a finder that is asked last: a folder called vlcl where Python is started, such as a checkout
seen from its parent, would be taken for the package. On the path, a package goes before a folder without an
__init__.py. The finder stays for vlcl_configs, whose folder has another name.
"""

from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
FOLDERS = (ROOT, ROOT / "eval", ROOT / "data_prep")


class WithPaths:
    """One of setuptools' strategies, and a .pth of its own."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    def __enter__(self) -> "WithPaths":
        self.strategy.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.strategy.__exit__(*error)

    def __call__(self, wheel: Any, *rest: Any) -> None:
        self.strategy(wheel, *rest)
        wheel.writestr("__editable__.vlcl_paths.pth", "".join(f"{folder}\n" for folder in FOLDERS))


class Editable(editable_wheel):
    def _select_strategy(self, *arguments: Any, **more: Any) -> Any:
        return WithPaths(super()._select_strategy(*arguments, **more))


setup(cmdclass={"editable_wheel": Editable})
