"""Who may import whom (docs/architecture.md), held on the source itself; and the pictures and tables that show it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest
from import_order import (
    DATA_PREP_MAY_IMPORT,
    EXCEPTIONS,
    ORDER,
    OWNERS,
    ROOT,
    SOURCES,
    Import,
    arrows,
    is_in,
    level,
    modules,
    reached,
    read_imports,
    room_of,
)
from PIL import Image

DOCS = ROOT / "docs"
# Circles of rooms that are none of modules, and why they may stay.
ROOM_CIRCLES = {
    ("vlcl_eval.datasets", "vlcl_eval.report"): "datasets.check, a command, prints with report.terminal, which imports "
    "no data set; report.scores asks datasets.registry for names",
}


def problems_of_order(imports: Iterable[Import]) -> list[str]:
    """One line an import that is not allowed."""
    found = []
    for one in imports:
        if (one.importer == "vlcl" and one.when == "types") or (one.importer, one.imported) in EXCEPTIONS:
            continue
        if why := reason(one):
            found.append(f"{one.importer} imports {one.imported} ({one.place}): {why}")
    return found


def reason(one: Import) -> str | None:
    """Why an import is not allowed; None where it is."""
    for package, owners in OWNERS.items():
        if is_in(one.imported, package) and one.importer not in owners:
            return f"only {' and '.join(owners)} may import {package}"
    source, target = one.importer.split(".")[0], one.imported.split(".")[0]
    if target not in SOURCES or source == target != "vlcl" or one.imported == "vlcl":
        return None
    if source == "vlcl_data_prep":
        allowed = any(is_in(one.imported, module) for module in DATA_PREP_MAY_IMPORT)
        return None if allowed else f"vlcl_data_prep may import {', '.join(DATA_PREP_MAY_IMPORT)} and itself"
    if source == "vlcl_eval":
        allowed = target == "vlcl" and not is_in(one.imported, "vlcl.cli")
        return None if allowed else "vlcl_eval may import vlcl, its command line apart, and itself"
    if target != "vlcl":
        return "vlcl knows vlcl_eval and vlcl_data_prep only by the names in cli.py's tables"
    mine, theirs = level(room_of(one.importer)), level(room_of(one.imported))
    if mine is None or theirs is None:
        missing = one.importer if mine is None else one.imported
        return f"{room_of(missing)} has no place in tests/import_order.py's ORDER: give it one"
    if theirs <= mine:
        return None
    return f"{room_of(one.imported)} stands above {room_of(one.importer)} in tests/import_order.py's ORDER"


def circles(imports: Iterable[Import]) -> list[tuple[str, ...]]:
    """Rooms that import each other while they are imported, at first hand or through others."""
    graph = arrows(imports, module_level_only=True)
    found = {tuple(sorted(x for x in {room, *reached(room, graph)} if room in reached(x, graph)))
             for room in graph if room in reached(room, graph)}  # fmt: skip
    return sorted(found)


def test_rooms_import_only_what_is_below_them() -> None:
    problems = problems_of_order(read_imports())
    assert not problems, "\n" + "\n".join(problems)


def test_no_circle_of_rooms() -> None:
    assert [circle for circle in circles(read_imports()) if circle not in ROOM_CIRCLES] == []


def test_every_room_has_a_place_and_every_exception_is_needed() -> None:
    imports = read_imports()
    rooms = {room_of(module) for module in modules() if is_in(module, "vlcl") and module != "vlcl"}
    assert sorted(room for room in rooms if level(room) is None) == []
    assert set(EXCEPTIONS) <= {(one.importer, one.imported) for one in imports}
    assert set(ROOM_CIRCLES) <= set(circles(imports))
    names = [name for line in ORDER for name in line]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vlcl/files.py", "def f():\n    from vlcl.train import train\n",
         "vlcl.files imports vlcl.train (vlcl/files.py:2): vlcl.train stands above vlcl.files"),
        ("vlcl/data/stream.py", "from vlcl import model\n", "vlcl.data.stream imports vlcl.model"),
        ("vlcl/export/command.py", "import vlcl_eval.results\n", "vlcl knows vlcl_eval and vlcl_data_prep only by"),
        ("vlcl/losses/em.py", "from torch import distributed\n", "only vlcl.distributed and vlcl.sharding may import"),
        ("vlcl/train.py", "if True:\n    import accelerate.utils\n", "only vlcl.launcher and vlcl.run and"),
        ("data_prep/vlcl_data_prep/pack.py", "from vlcl.data import stream\n", "vlcl_data_prep may import vlcl.errors"),
        ("data_prep/vlcl_data_prep/pack.py", "from vlcl_eval.results import done\n", "vlcl_data_prep may import"),
        ("eval/vlcl_eval/models.py", "from vlcl.cli import app\n", "vlcl_eval may import vlcl, its command line apart"),
        ("vlcl/model.py", "if TYPE_CHECKING:\n    from vlcl.run import Run\n", "vlcl.run stands above vlcl.model"),
        ("vlcl/attic.py", "from vlcl.errors import UserError\n", "vlcl.attic has no place in tests/import_order.py's"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_told(file: str, text: str, message: str, tmp_path: Path) -> None:
    others = ("vlcl/train.py", "vlcl/model.py", "vlcl/run.py", "vlcl/errors.py", "vlcl/data/stream.py", "vlcl/cli.py")
    for name in (*others, "eval/vlcl_eval/results.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if name == file else "")
    [problem] = problems_of_order(read_imports(tmp_path))
    assert message in problem


def test_a_circle_is_found_and_a_late_import_is_none(tmp_path: Path) -> None:
    files = {
        "optim": "import vlcl.model",
        "model": "from vlcl.pair_table import x",
        "pair_table": "from vlcl import optim",
    }
    (tmp_path / "vlcl").mkdir()
    for name, text in files.items():
        (tmp_path / "vlcl" / f"{name}.py").write_text(text)
    assert circles(read_imports(tmp_path)) == [("vlcl.model", "vlcl.optim", "vlcl.pair_table")]
    (tmp_path / "vlcl" / "pair_table.py").write_text("def f():\n    from vlcl import optim")
    assert circles(read_imports(tmp_path)) == []


def test_the_picture_of_the_rooms_shows_the_imports_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    draw = import_module("draw_architecture")
    with Image.open(DOCS / "images" / "rooms.png") as picture:
        assert picture.info["Description"] == draw.digest(draw.drawn_arrows()), "run: python docs/draw_architecture.py"
        assert picture.size[0] == draw.WIDTH
    grid = draw.make_grid(draw.drawn_arrows())
    draw.untangle(grid)
    draw.place(grid, *draw.ACROSS, draw.BOX_WIDTH, draw.THIN)
    least, most = min(grid.x.values()), max(grid.x.values())
    assert draw.ACROSS[0] < least < most < draw.ACROSS[1], "rooms do not fit the page: a larger WIDTH"


def test_the_page_names_every_room() -> None:
    text = (DOCS / "architecture.md").read_text()
    rooms = {room_of(module) for module in modules() if "." in module and not is_in(module, "vlcl_data_prep")}
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert sorted(room for room in rooms if room.split(".")[1] not in named) == []


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        *sorted(str(p.relative_to(ROOT)) for p in DOCS.glob("*.md")),
    ],
)
def test_files_that_a_page_names_are_there(page: str) -> None:
    """Paths in backticks and links, from the repository's root or from the page."""
    text = (ROOT / page).read_text()
    names = re.findall(r"`((?:vlcl|eval|data_prep|tests|docs|configs|benchmarks|examples)/[\w./-]*)`", text)
    names += [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [
        name for name in names if not (ROOT / name).exists() and not (ROOT / page).parent.joinpath(name).exists()
    ]
    assert missing == []
