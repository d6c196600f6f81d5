"""As tests/test_fuzz.py, of folders: data sets for `vlcl eval`, checkpoints and what else a run folder holds."""

from __future__ import annotations

import copy
import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_data import picture
from fuzz import (
    Change,
    answer,
    bounded_memory,
    byte_changes,
    changed_bytes,
    changed_document,
    document_changes,
    fuzz,
    places,
)
from hypothesis import strategies as st
from shards import add

import vlcl.run
from vlcl.checkpoint import complete_steps, find_model, load_checkpoint, load_model
from vlcl.config import load_config
from vlcl.data.decode import BadSample
from vlcl.logs import read_metrics
from vlcl.run import Run
from vlcl.sealed import META, check
from vlcl.train import train
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.datasets.images import read_image

of_bytes = st.one_of(st.just([]), byte_changes)


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    with bounded_memory():
        yield


# Data sets


def data_sets(root: Path) -> dict[str, list[Path]]:
    """Three small ones, of each format; the files that describe them."""
    pictures = {f"{i}.png": picture((i % 2,), i) for i in range(4)}
    split = {"index_path": "test.txt", "files_for_local_usage": ["test.zip"], "num_images": 4}
    entry = {"name": "fruit", "version": 1, "type": "classification_multiclass", "root_folder": "fruit", "test": split,
             "labelmap": "labels.txt", "num_classes": 2}  # fmt: skip
    coco = entry | {"name": "boxes", "root_folder": "boxes", "format": "coco", "type": "classification_multilabel",
                    "test": split | {"index_path": "test.json"}}  # fmt: skip
    wds = root / "wds_mnist" / "test"
    for folder in (root / "fruit", root / "boxes", wds):
        folder.mkdir(parents=True)
    (root / "vision_datasets.json").write_text(json.dumps([entry, coco]))
    (root / "fruit" / "labels.txt").write_text("apple\npear\n")
    (root / "fruit" / "test.txt").write_text("".join(f"test.zip@{name} {i % 2}\n" for i, name in enumerate(pictures)))
    for name in ("fruit", "boxes"):
        with zipfile.ZipFile(root / name / "test.zip", "w") as archive:
            for entry_name, data in pictures.items():
                archive.writestr(entry_name, data)
    index = {
        "images": [{"id": i + 1, "file_name": name, "zip_file": "test.zip"} for i, name in enumerate(pictures)],
        "annotations": [{"id": i, "image_id": i + 1, "category_id": i % 2 + 1} for i in range(4)],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}],
    }
    (root / "boxes" / "test.json").write_text(json.dumps(index))
    (root / "wds_mnist" / "classnames.txt").write_text("".join(f"{i}\n" for i in range(10)))
    (root / "wds_mnist" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    (wds / "nshards.txt").write_text("1")
    with tarfile.open(wds / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in pictures.items():
            add(tar, name, data)
            add(tar, name.replace("png", "cls"), b"1")
    return {
        "fruit": [root / "vision_datasets.json", root / "fruit" / "test.txt", root / "fruit" / "labels.txt",
                  root / "fruit" / "test.zip"],
        "boxes": [root / "vision_datasets.json", root / "boxes" / "test.json"],
        "mnist": [path for path in sorted((root / "wds_mnist").rglob("*")) if path.is_file()],
    }  # fmt: skip


def read_data_set(root: Path, name: str) -> None:
    data = find_data_set(root, name)
    split = data.test
    data.targets(split)
    data.identity(split)
    data.complete(split)
    for ref in split.refs:
        answer(read_image, ref, error=BadSample)


def test_data_sets(tmp_path: Path) -> None:
    files = data_sets(tmp_path)
    before = {path: path.read_bytes() for paths in files.values() for path in paths}
    for name in files:
        read_data_set(tmp_path, name)  # whole as they are

    def target(which: int, changes: list[Change], of_bytes: list[Change]) -> None:
        name = sorted(files)[which % len(files)]
        path = files[name][which // 7 % len(files[name])]
        data = before[path]
        if path.suffix == ".json":
            data = json.dumps(changed_document(json.loads(data), changes)).encode()
        elif path.suffix == ".txt":
            lines = changed_document(data.decode().splitlines(), changes)
            data = "\n".join(map(str, lines if isinstance(lines, list) else [lines])).encode("utf-8", "surrogatepass")
        else:
            of_bytes = of_bytes or [("byte", which, which % 251)]
        path.write_bytes(changed_bytes(data, of_bytes))
        try:
            answer(read_data_set, tmp_path, name)
        finally:
            path.write_bytes(before[path])

    fuzz(target, 400, which=places, changes=document_changes, of_bytes=of_bytes)


# Checkpoints


@pytest.fixture(scope="module")
def run(fifty_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run at its first step, beside the folder `run` of one with a checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz")
    settings = [
        f"data.train={fifty_pairs / 'train'}", f"model.name=local-dir:{fifty_pairs / 'model'}", "train.steps=2",
        "train.batch_size=10", "data.workers=0", "data.streams=2", "log.trackers=[]", "train.precision=fp32",
        "checkpoint.every=2", "train.ema=0.5",
    ]  # fmt: skip
    train(load_config(None, [*settings, f"train.output={folder / 'run'}"]))
    built = vlcl.run.build(load_config(None, [*settings, f"train.output={folder / 'other'}"]))
    built.lock.release()
    return built


def sealed_anew(folder: Path) -> None:
    """As if its writer had meant it so: sums of what is there."""
    meta = json.loads((folder / META).read_text())
    for name in meta["files"]:
        data = (folder / name).read_bytes()
        meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_meta(folder, meta)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    content = {key: value for key, value in meta.items() if key != "sha256"}
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / META).write_text(json.dumps({**content, "sha256": total}))


def plain(x: Any) -> Any:
    """Of what torch saved: tuples as lists, so that they can be changed."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, (list, tuple)) else x


def test_checkpoints(run: Run) -> None:
    folder = complete_steps(run.folder.parent / "run")[-1]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    paths = sorted(before)
    meta = json.loads((folder / META).read_text())
    saved = {path: plain(torch.load(path, weights_only=True)) for path in paths if path.suffix == ".pt"}

    def read() -> None:
        check(folder)
        load_checkpoint(folder, run.state)

    read()
    assert run.state.step == 2
    rng = torch.get_rng_state()

    def target(which: int, changes: list[Change], of_bytes: list[Change], honest: bool) -> None:
        path = paths[which % len(paths)]
        try:
            if path.name == META:
                found = changed_document(meta, changes)
                if honest and isinstance(found, dict):
                    write_meta(folder, found)
                else:
                    path.write_bytes(changed_bytes(json.dumps(found).encode(), of_bytes))
            elif path in saved and which % 3:
                torch.save(changed_document(copy.deepcopy(saved[path]), changes), path)
                sealed_anew(folder)
            else:
                path.write_bytes(changed_bytes(before[path], of_bytes or [("byte", 9, which % 256)]))
                if honest:
                    sealed_anew(folder)
            answer(read)
            assert type(run.state.step) is int
        finally:
            torch.set_rng_state(rng)
            for changed in (path, folder / META):
                changed.write_bytes(before[changed])

    fuzz(target, 120, which=places, changes=document_changes, of_bytes=of_bytes, honest=st.booleans())


def test_models_and_run_folders(run: Run) -> None:
    """open_clip's description of the model, and the lines of metrics.jsonl."""
    other = run.folder.parent / "run"
    folder = complete_steps(other)[-1]
    path, lines = folder / "open_clip_config.json", other / "metrics.jsonl"
    before, whole = path.read_bytes(), lines.read_bytes()
    sealed = (folder / META).read_bytes()

    def target(changes: list[Change], of_bytes: list[Change]) -> None:
        try:
            document = changed_document(json.loads(before), changes)
            path.write_bytes(changed_bytes(json.dumps(document).encode(), of_bytes))
            sealed_anew(folder)
            answer(load_model, str(other))
            answer(find_model, str(other))
            records = [changed_document(json.loads(line), changes) for line in whole.splitlines()]
            lines.write_bytes(changed_bytes("\n".join(map(json.dumps, records)).encode(), of_bytes))
            for record in read_metrics(other):
                assert record["step"] >= 0
        finally:
            path.write_bytes(before)
            lines.write_bytes(whole)
            (folder / META).write_bytes(sealed)

    fuzz(target, 40, changes=document_changes, of_bytes=of_bytes)
