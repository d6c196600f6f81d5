"""What is installed: the wheel has every package and table of the source tree, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"vlcl": "vlcl", "configs": "vlcl_configs", "eval/vlcl_eval": "vlcl_eval",
           "data_prep/vlcl_data_prep": "vlcl_data_prep"}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that the checkout gets no build/ folder."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    return tree


def run_python(*arguments: str, **more: Any) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree))
    [path] = out.glob("*.whl")
    return path


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    wanted = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == wanted


def test_the_console_command_is_named(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [entry] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "vlcl = vlcl.cli:main" in archive.read(entry).decode()


def test_a_folder_called_vlcl_does_not_hide_an_editable_install(tree: Path, tmp_path: Path) -> None:
    """Nor one called as another of the packages. With the standard library alone: no other install is on the path."""
    run_python("-c", f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})", cwd=tree)
    [path] = tmp_path.glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    here = tmp_path / "here"
    for package in ("vlcl", "vlcl_eval", "vlcl_data_prep"):
        (here / package / "data").mkdir(parents=True)
    script = f"""if True:
        import site
        site.addsitedir({str(tmp_path / "site")!r})
        import vlcl, vlcl_eval, vlcl_data_prep, vlcl_configs
        for module in (vlcl, vlcl_eval, vlcl_data_prep, vlcl_configs):
            print(module.__file__)
    """
    found = run_python("-S", "-c", script, cwd=here, env={"PATH": os.environ["PATH"]}).split()
    packages = ("vlcl", "eval/vlcl_eval", "data_prep/vlcl_data_prep", "configs")
    assert found == [str(tree / folder / "__init__.py") for folder in packages]
