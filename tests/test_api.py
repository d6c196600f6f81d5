"""The public names of `vlcl`, and docs/api.md, whose blocks run as they stand."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from eval_data import samples, write_native
from PIL import Image
from shards import make_shards, tiny_model

import vlcl

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


def write_pictures(folder: Path, number: int, seed: int = 0) -> Path:
    """FOLDER/0.png, 0.txt, ...: coloured rectangles on grounds of other colours, and what they are."""
    folder.mkdir(parents=True)
    for i in range(number):
        colour, ground = COLOURS[(i + seed) % 8], COLOURS[(i // 8 + 3 * i + 1 + seed) % 8]
        image = Image.new("RGB", (64, 64), ground)
        image.paste(colour, (8 + i % 5, 8, 40, 48 - i % 7))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} shape on {ground}, number {i}")
    return folder


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_the_package_and_its_settings_import_no_torch() -> None:
    code = "import sys, vlcl; vlcl.load_config, vlcl.Config, vlcl.UserError, vlcl.read_metrics; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "vlcl.config" in loaded
    assert not {"torch", "vlcl.train", "open_clip", "transformers"} & loaded


def test_every_public_name_is_there_and_listed() -> None:
    assert set(vlcl.__all__) <= set(dir(vlcl))
    missing = [name for name in vlcl.__all__ if not hasattr(vlcl, name)]
    assert missing == []
    for name in set(vlcl.__all__) - {"__version__"}:
        assert callable(getattr(vlcl, name)), name
    with pytest.raises(AttributeError, match="module 'vlcl' has no attribute 'trian'"):
        vlcl.trian  # noqa: B018


def test_editors_see_the_same_names_as_python() -> None:
    """The imports under TYPE_CHECKING, the table of homes and __all__ say the same."""
    tree = ast.parse(Path(vlcl.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == vlcl._HOMES
    assert sorted([*typed, "__version__"]) == sorted(vlcl.__all__)


def test_functions_that_share_a_modules_name() -> None:
    """`vlcl.train` is the module as soon as that is imported, by whomever; it can be called all the same."""
    code = "import vlcl; first = vlcl.compare; import vlcl.compare as later; print(first is later is vlcl.compare)"
    assert run_python(code) == "True\n"
    import vlcl.compare
    import vlcl.train
    from vlcl.train import train_step

    assert vlcl.train.train_step is train_step
    for name in ("train", "compare"):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
            getattr(vlcl, name)()
        assert inspect.isfunction(getattr(sys.modules[vlcl._HOMES[name]], name))


def test_api_names_every_public_name() -> None:
    text = API.read_text()
    assert [name for name in vlcl.__all__ if name != "__version__" and f"`{name}" not in text] == []
    used = set(re.findall(r"\bvlcl\.([A-Za-z_]+)\(", text))
    assert set(vlcl.__all__) - {"__version__", "Config", "UserError"} <= used
    assert used <= set(vlcl.__all__)


def test_the_blocks_of_api_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures" / "train", 40)
    write_pictures(tmp_path / "pictures" / "val", 16, seed=3)
    write_native(tmp_path / "elevater", "mnist", train=samples(10, 2, 0), test=samples(10, 2, 1))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", API.read_text(), re.DOTALL)
    assert len(blocks) >= 12
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"block {number} of docs/api.md", "exec"), namespace)
    assert namespace["problems"] == {}
    assert (tmp_path / "first-clip" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def test_the_ten_lines_for_a_webdataset_user_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md, "From webdataset": the second half, with two stages of the user's own."""
    (code,) = re.findall(r"### From webdataset\n\n```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    ours = code[code.index("import vlcl") :]
    make_shards(tmp_path / "shards", (12, 9))
    (tmp_path / "my.yaml").write_text(
        f"model: {{name: {tiny_model(tmp_path / 'model')!r}}}\n"
        "train: {steps: 2, batch_size: 4, precision: fp32}\ndata: {workers: 0, streams: 2}\nlog: {trackers: []}\n"
    )
    seen = []

    def large_enough(sample: dict[str, object]) -> bool:
        return int(str(sample["__row__"])) % 3 > 0

    def lower_case(sample: dict[str, object]) -> dict[str, object]:
        seen.append(sample["__row__"])
        return sample

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"wds": import_module("webdataset"), "large_enough": large_enough, "lower_case": lower_case}
    assert "    ...\n" in ours  # what the user does with a batch: the stream has no end
    exec(ours.replace("    ...\n", "    break\n"), names)
    assert names["batch"].row_B.tolist() == [row for row in names["batch"].row_B.tolist() if row % 3]
    assert seen
    assert all(int(str(row)) % 3 for row in seen)
    assert (tmp_path / "runs" / "my" / "metrics.jsonl").is_file()
