"""Who imports whom, read from the source with ast, and the order that rooms keep. A room is a package inside `vlcl`,
`vlcl_eval` or `vlcl_data_prep`, or a module that lies in none of these packages.

tests/test_architecture.py holds the order, docs/draw_architecture.py draws it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
SOURCES = {"vlcl": "vlcl", "vlcl_eval": "eval/vlcl_eval", "vlcl_data_prep": "data_prep/vlcl_data_prep"}

# Rooms of vlcl, lowest first. A room imports rooms of lower lines, and of its own line where that makes no circle.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "batch"),
    ("distributed", "files", "lock", "stop", "watch", "sealed", "environment", "metrics", "trackers", "config", "data",
     "losses", "hf", "logs", "paths", "meter", "trace", "anomalies"),
    ("model", "locked", "views", "image_weights", "start_weights", "pair_table", "loss_state", "parameter_groups",
     "pieces", "sharding", "optim", "accumulate", "report"),
    ("checkpoint", "zeroshot", "probe", "fingerprint", "architectures", "flops", "frozen"),
    ("saving", "mirror", "run_folder", "from_config", "labelled", "launcher", "run", "evaluation", "view_evaluation",
     "recovery"),
    ("train", "export", "gradient_bias"),
    ("compare",),
    ("cli",),
)  # fmt: skip
DATA_PREP_MAY_IMPORT = (
    "vlcl.errors", "vlcl.files", "vlcl.config", "vlcl.data.manifest", "vlcl.data.archive",
    "vlcl.data.shard", "vlcl.data.decode", "vlcl.data.captions", "vlcl.data.urls", "vlcl.data.stores",
    "vlcl.report.style", "vlcl.report.template",
    "vlcl.data.reader", "vlcl.model",  # for tokens as training counts them, in functions alone
)  # fmt: skip
OWNERS = {  # packages that only these modules import
    "torch.distributed": ("vlcl.distributed", "vlcl.sharding"),
    "accelerate": ("vlcl.launcher", "vlcl.run", "vlcl.checkpoint"),
}
# Harmless exceptions: importer and imported, and why.
EXCEPTIONS = {
    (
        "vlcl.train",
        "vlcl.cli",
    ): "under __name__ == '__main__' alone: `python -m vlcl.train` is the command `vlcl train`",
}

When = Literal["module", "function", "types"]


@dataclass(frozen=True)
class Import:
    """One import of a module. `when`: as the module is imported, as a function runs, or for type checkers alone."""

    importer: str
    imported: str
    when: When
    place: str


def room_of(module: str) -> str:
    """`vlcl.data` of vlcl.data.stream; `vlcl` itself is the package with its version and its table of names."""
    return ".".join(module.split(".")[:2])


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The source files by module name. JSON-only packages (model_configs) are no rooms."""
    found = {}
    for name, folder in SOURCES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = (name, *path.relative_to(root / folder).with_suffix("").parts)
            module = ".".join(parts).removesuffix(".__init__")
            if not is_in(module, "vlcl.model_configs"):
                found[module] = path
    return found


def read_imports(root: Path = ROOT) -> list[Import]:
    """All imports of the three packages, in functions and for type checkers too, the standard library's as well."""
    files = modules(root)
    return [
        Import(module, imported, when, f"{path.relative_to(root)}:{line}")
        for module, path in files.items()
        for imported, when, line in _imports_in(ast.parse(path.read_text(encoding="utf-8")), files)
    ]


def _imports_in(tree: ast.AST, files: Mapping[str, Path], when: When = "module") -> Iterator[tuple[str, When, int]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, when, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"line {node.lineno}: imports are absolute here: from vlcl.ROOM import NAME")
            for alias in node.names:  # `from vlcl import files` is an import of vlcl.files
                full = f"{node.module}.{alias.name}"
                yield (full if full in files or full in OWNERS else node.module), when, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside: When = "types" if when == "types" else "function"
            yield from _imports_in(node, files, inside)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from _imports_in(ast.Module([child], []), files, "types")
            for child in node.orelse:
                yield from _imports_in(ast.Module([child], []), files, when)
        else:
            yield from _imports_in(node, files, when)


def arrows(imports: Iterable[Import], *, module_level_only: bool = False) -> dict[str, set[str]]:
    """Which rooms each room imports: those of the three packages, itself and `vlcl`'s own file apart."""
    found: dict[str, set[str]] = {}
    for one in imports:
        if (one.importer == "vlcl" and one.when == "types") or (module_level_only and one.when != "module"):
            continue
        importer, imported = room_of(one.importer), room_of(one.imported)
        found.setdefault(importer, set())
        if imported.split(".")[0] in SOURCES and imported not in (importer, "vlcl"):
            found[importer].add(imported)
            found.setdefault(imported, set())
    return found


def reached(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Everything that `start` imports, at first hand and through others."""
    todo, seen = list(graph.get(start, ())), set()
    while todo:
        room = todo.pop()
        if room not in seen:
            seen.add(room)
            todo += graph.get(room, ())
    return seen


def level(room: str, order: Sequence[Sequence[str]] = ORDER) -> int | None:
    """The line of `vlcl.NAME` in the order, counted from the lowest; None where it has none."""
    name = room.removeprefix("vlcl.")
    return next((number for number, line in enumerate(order) if name in line), None)
