"""Print the oldest version of each dependency that pyproject.toml allows, as constraints for pip or uv.

python tests/oldest.py EXTRA... > constraints.txt

One line `name==X` for each `name>=X` of the project and the extras. A lower bound that names no release, or that
another package forbids, is then an error of the installer.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[\w.,-]*\])?(>=(?P<oldest>[\w.]+))?")


def requirements(project: dict, extras: list[str]) -> list[str]:
    """Those of the project and of its extras; an extra may name other extras of the project: vlcl[demo,eval]."""
    listed = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            nested = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            listed += requirements(project | {"dependencies": []}, nested[1].split(",")) if nested else [line]
    return listed


def constraint(requirement: str) -> str | None:
    """`name==X` of `name>=X`; nothing where every version will do."""
    found = REQUIREMENT.fullmatch(requirement)
    if not found:
        raise SystemExit(f"error: pyproject.toml: {requirement!r} is neither 'name' nor 'name>=version'")
    return f"{found['name']}=={found['oldest']}" if found["oldest"] else None


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(line for line in map(constraint, requirements(project, sys.argv[1:])) if line))
