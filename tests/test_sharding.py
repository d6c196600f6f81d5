"""Sharded towers (FSDP2) learn what whole ones learn, to rounding, and go on from each other's checkpoints, whose
pieces any number of ranks reads (tests/test_pieces.py has more of their files)."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from test_reliability import run, settings
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

import vlcl.launcher
import vlcl.saving
import vlcl.train
from vlcl.checkpoint import AVERAGED, OPTIMIZER, WEIGHTS, latest_step, load_model
from vlcl.config import load_config
from vlcl.errors import UserError
from vlcl.export.command import export_model
from vlcl.from_config import make_model
from vlcl.launcher import make_accelerator, sharding_asked_for
from vlcl.logs import read_metrics
from vlcl.pieces import read, stored
from vlcl.sealed import Damaged, check
from vlcl.sharding import Sharding, blocks, local

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # HuggingFaceStorageReader, alone
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COMMON = ("train.batch_size=12", "data.slices=6", "train.ema=0.9", "optim.clip_norm=0.05", "optim.lr=1e-3")
CHUNKS = (
    "train.steps=4",
    "train.accumulate=2",
    "train.on_anomaly=skip",
    "eval.every=2",
    "eval.batch_size=7",
    "eval.examples=0",
)


def learn(environment: dict[str, str], data: Path, output: Path, *more: str) -> list[float]:
    """Train, as one of the ranks. Returns, for each step, the share of the model's weights that this rank keeps."""
    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"],
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    shares, real = [], vlcl.train.train_step

    def step(run: Any, batch: Any) -> Any:
        parameters = list(run.state.built.encoder.parameters())
        parameters += [] if run.state.averaged is None else run.state.averaged.module.parameters()
        shares.append(sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters))
        return real(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlcl.train, "train_step", step)
        patch.setattr("vlcl.report.page.draw", lambda *_: "")  # figures take longer than the run
        for name, value in environment.items():
            patch.setenv(name, value)
        run(data, output, *COMMON, *more)
    return shares


def both_ways(data: Path, output: Path) -> tuple[list[list[float]], list[str], str]:
    """Held-out pairs are 50, so that the ranks evaluate batches of other numbers, and sizes. Returns the shares; and
    where rank 1 alone cannot write its piece, which checkpoints there are, and what is said."""
    more = (*CHUNKS, f"data.val={data / 'train'}")
    shares = [learn({}, data, output / "whole", *more)]
    with before_each_piece(lambda path: time.sleep(0.2)):  # by then the weights are those of a later step
        shares.append(learn(SHARDED, data, output / "sharded", *more, "checkpoint.every=1"))
    for name, environment in (("whole", SHARDED), ("sharded", {})):
        middle = output / name / "step-00000002"
        shares.append(learn(environment, data, output / f"{name}-then", *more, f"resume={middle}"))
    again = (*CHUNKS, "checkpoint.every=1", "checkpoint.async_save=false")
    with before_each_piece(full_at_step_4), pytest.raises(UserError) as raised:
        learn(SHARDED, data, output / "full", *again)
    kept = [path.name[-1] for path in output.glob("full/step-*")]
    learn(SHARDED, data, output / "full", *again, "resume=auto")
    return shares, sorted(kept), str(raised.value)


@contextmanager
def before_each_piece(before: Callable[[Path], None]) -> Iterator[None]:
    def save(pieces: Any, path: Path) -> None:
        before(path)
        real(pieces, path)

    real = vlcl.saving.save_pieces
    vlcl.saving.save_pieces = save  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        vlcl.saving.save_pieces = real


def full_at_step_4(path: Path) -> None:
    if "step-00000004" in str(path) and os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture(scope="module")
def two_ranks(fifty_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Runs of 4 steps of 2 ranks, in chunks, with an average, gradients that are clipped, evaluations: `whole` and
    `sharded`, `whole-then` which is sharded from step 2 on, `sharded-then` which no longer is, and `full`, which
    goes on after a full disk at step 4. And what each rank says."""
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(2, both_ways, fifty_pairs, folder)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {key: x for inner, part in value.items() for key, x in tensors(part, f"{name}/{inner}").items()}
    return {name: value} if isinstance(value, Tensor) else {}


def put_together(folder: Path) -> dict[str, Tensor]:
    """Tensors in pieces, as torch reads them."""
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in found.items()}  # pyright: ignore
    load(state, storage_reader=reader, no_dist=True)
    return state


def state_of(run: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint that is the same on all ranks."""
    folder = latest_step(run)
    if (folder / "model").is_dir():
        files = {name: put_together(folder / name.partition(".")[0]) for name in (WEIGHTS, AVERAGED, OPTIMIZER)}
        return tensors(files)
    state = torch.load(folder / OPTIMIZER, weights_only=True)["optimizer"]["state"]
    return tensors({WEIGHTS: load_file(folder / WEIGHTS), AVERAGED: load_file(folder / AVERAGED), OPTIMIZER: state})


def assert_same_weights(one: Path, other: Path, start: Path, rel: float) -> None:
    """Checkpoints differ by less than a share `rel` of what training has changed since `start`, tensor by tensor."""
    found, expected = state_of(one), state_of(other)
    assert found.keys() == expected.keys()
    before = read(stored(start, WEIGHTS))
    for name, x in expected.items():
        moved = x - before[name.removeprefix(f"/{WEIGHTS}/")] if name.startswith(f"/{WEIGHTS}") else x
        assert found[name].dtype == x.dtype
        assert float((found[name] - x).norm()) <= rel * float(moved.norm()) + 1e-12, name


def assert_same_lines(one: Path, other: Path, after: int, rel: float) -> None:
    lines = [[line for line in read_metrics(run) if line["step"] > after] for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) > 0
    for line, as_it_should_be in zip(*lines):
        assert line.keys() == as_it_should_be.keys()
        for name in line:
            if name in ("train/loss", "train/grad_norm", "train/logit_scale", "val/infonce", "val/text_to_image_R@5"):
                assert line[name] == pytest.approx(as_it_should_be[name], rel=rel), name


def test_sharded_towers_learn_the_same_and_go_on_as_whole_ones(two_ranks: tuple[Path, list[Any]]) -> None:
    folder, told = two_ranks
    for of_rank, *_ in told:
        assert [len(x) for x in of_rank] == [4, 4, 2, 2]
        assert set(of_rank[0] + of_rank[3]) == {1.0}
        assert of_rank[1] + of_rank[2] == pytest.approx([0.5] * 6, abs=1e-3)
    start = folder / "whole" / "step-00000002"
    for name in ("sharded", "whole-then", "sharded-then"):
        assert_same_weights(folder / name, folder / "whole", start, 1e-4)
        assert_same_lines(folder / name, folder / "whole", 2, 1e-4)
    assert any("val/infonce" in line for line in read_metrics(folder / "whole-then"))


def test_each_rank_writes_its_own_pieces_in_the_background(two_ranks: tuple[Path, list[Any]]) -> None:
    folder, told = two_ranks
    step = folder / "sharded" / "step-00000002"
    assert not any((step / name).exists() for name in (WEIGHTS, AVERAGED, OPTIMIZER))
    for name in (WEIGHTS, AVERAGED, OPTIMIZER):
        sizes = [path.stat().st_size for path in sorted((step / name.partition(".")[0]).glob("*.safetensors"))]
        assert len(sizes) == 2
        assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert_same_bytes(folder / "full", folder / "sharded", "123")  # as of a save that training waits for
    for _, kept, said in told:
        assert kept == ["1", "2", "3"]
        assert said == told[0][-1]
        assert "disk full: no space left in" in said


def test_from_its_pieces_a_run_goes_on_to_the_same_bytes(two_ranks: tuple[Path, list[Any]]) -> None:
    assert_same_bytes(two_ranks[0] / "full", two_ranks[0] / "sharded", "1234")


def assert_same_bytes(run: Path, other: Path, steps: str) -> None:
    for step in steps:
        for path in (path for path in (other / f"step-0000000{step}").rglob("*") if path.is_file()):
            assert path.read_bytes() == (run / path.relative_to(other)).read_bytes(), path


def test_a_sharded_checkpoint_is_a_model_for_all_commands(two_ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    run, expected = two_ranks[0] / "sharded", state_of(two_ranks[0] / "sharded")
    for averaged, name in ((False, WEIGHTS), (True, AVERAGED)):
        found = load_model(str(run), averaged=averaged).encoder.clip.state_dict()
        assert tensors({name: found}).keys() == {key for key in expected if key.startswith(f"/{name}/")}
        assert all(torch.equal(x, expected[f"/{name}/{key}"]) for key, x in found.items())
    export_model(str(run), tmp_path / "out", averaged=True, say=lambda _: None)
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert all(torch.equal(x, expected[f"/{AVERAGED}/{key}"]) for key, x in exported.items())


def test_a_piece_that_is_damaged_or_missing_is_named(two_ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    newest = latest_step(two_ranks[0] / "sharded")
    for file in ("model/00001-of-00002.safetensors", "optimizer/00000-of-00002.safetensors", "optimizer/groups.json"):
        for gone in (False, True):
            folder = Path(shutil.copytree(newest, tmp_path / "run" / newest.name, dirs_exist_ok=True))
            data = (folder / file).read_bytes()
            (folder / file).unlink() if gone else (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            message = re.escape(f"{folder / file} is {'missing' if gone else 'damaged'}")
            with pytest.raises(Damaged, match=message):
                check(folder)
            if file.startswith("model"):
                with pytest.raises(UserError, match=message):
                    load_model(str(tmp_path / "run"))


OTHERS = {  # what FSDP treats in another way: scalars that learn, frozen towers, its own dtype, checkpointed blocks
    "siglip": ("loss.name=siglip", "model.lock_text=true", "model.lock_text_unlocked_layers=1", "optim.clip_norm=null"),
    "bf16": (
        "train.batch_size=24",
        "train.precision=bf16",
        "loss.name=em",
        "loss.order=before",
        "train.accumulate=2",
        "train.negatives=chunk",
    ),
}


def as_on_a_gpu() -> None:
    """Weights are gathered in bf16, and autocast computes norms in float32. Of these processes, which end."""

    def in_float32(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return real(x.float(), shape, weight.float(), bias.float(), eps)

    real = torch.nn.functional.layer_norm
    torch.nn.functional.layer_norm = in_float32
    vlcl.launcher.Sharding = lambda mesh, reshard, classes, _, autocast: Sharding(
        mesh, reshard, classes, torch.bfloat16, autocast
    )


def other_ways(data: Path, output: Path, two: Path) -> None:
    learn(SHARDED, data, output / "on", *CHUNKS, f"data.val={data / 'train'}", f"resume={two}")
    for name, more in OTHERS.items():
        if name == "bf16":
            as_on_a_gpu()
        short = (*more, "train.steps=2", "optim.warmup=0", "checkpoint.every=1")
        learn({}, data, output / name / "whole", *short)
        learn({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, data, output / name / "sharded", *short)


def test_scalars_frozen_towers_and_half_precision_on_three_ranks(
    two_ranks: tuple[Path, list[Any]], fifty_pairs: Path, tmp_path: Path
) -> None:
    """And a run of two ranks that goes on: most tensors have numbers of rows that three do not divide, some fewer."""
    whole = two_ranks[0] / "whole"
    on_ranks(3, other_ways, fifty_pairs, tmp_path, two_ranks[0] / "sharded" / "step-00000002")
    assert_same_weights(tmp_path / "on", whole, whole / "step-00000002", 1e-4)
    assert_same_lines(tmp_path / "on", whole, 2, 1e-4)
    siglip, bf16 = tmp_path / "siglip", tmp_path / "bf16"
    start = siglip / "whole" / "step-00000001"
    assert_same_weights(siglip / "sharded", siglip / "whole", start, 5e-3)  # keys' biases have no gradient but noise
    assert_same_lines(siglip / "sharded", siglip / "whole", 0, 1e-4)
    assert_same_lines(bf16 / "sharded", bf16 / "whole", 0, 0.05)
    assert {x.dtype for x in state_of(bf16 / "sharded").values()} == {torch.float32}


def in_two_groups(data: Path, output: Path, two: Path) -> tuple[list[float], list[str]]:
    """HSDP, whose mesh accelerate makes on GPUs alone. Returns the shares, and the files of weights that this rank
    writes."""
    from torch.distributed.device_mesh import init_device_mesh

    names = ("copies", "pieces")
    vlcl.launcher.mesh_of_all = lambda device: init_device_mesh(device.type, (2, 2), mesh_dim_names=names)
    written: list[Path] = []
    with before_each_piece(written.append):
        shares = learn(SHARDED, data, output, "train.steps=4", f"resume={two}")
    return shares, [path.name for path in written if path.parent.name == "model"]


def test_of_copies_one_is_written(two_ranks: tuple[Path, list[Any]], fifty_pairs: Path, tmp_path: Path) -> None:
    whole = two_ranks[0] / "whole"
    told = on_ranks(4, in_two_groups, fifty_pairs, tmp_path / "run", two_ranks[0] / "sharded" / "step-00000002")
    for shares, _ in told:
        assert len(shares) == 2
        assert max(shares) < 0.501
    assert [files for _, files in told] == [
        [f"0000{rank}-of-00002.safetensors"] if rank < 2 else [] for rank in range(4)
    ]
    assert_same_weights(tmp_path / "run", whole, whole / "step-00000002", 1e-4)


REFUSED = {
    "fsdp_version: 1": ({"FSDP_VERSION": "1"}, ()),
    "fsdp_offload_params": ({"FSDP_OFFLOAD_PARAMS": "true"}, ()),
    "SIZE_BASED_WRAP": ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}, ()),
    "optim.name=timm/lamb": ({}, ("optim.name=timm/lamb",)),
    "train.compile=true": ({}, ("train.compile=true",)),
    "names Bottleneck, of which this model has none; leave it out (its blocks are of ResidualAttentionBlock)": (
        {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Bottleneck"},
        (),
    ),
}


def test_what_is_not_done_so_is_told(fifty_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator, encoder = make_accelerator("fp32"), None
    monkeypatch.setattr("vlcl.distributed.world_size", lambda: 2)
    for message, (environment, more) in REFUSED.items():
        config = load_config(None, settings(fifty_pairs, tmp_path, *more))
        encoder = encoder or make_model(config).encoder
        with monkeypatch.context() as patch:
            for name, value in (SHARDED | environment).items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=re.escape(message)):
                sharding_asked_for(config, accelerator, encoder)


def test_blocks_are_found_inner_ones_first() -> None:
    stage = nn.Sequential(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}), nn.GELU())
    model = nn.ModuleDict({"stages": nn.Sequential(stage), "head": nn.Sequential(nn.Linear(2, 2))})
    first, second = stage[0]["blocks"]  # pyright: ignore[reportIndexIssue]
    assert blocks(model) == [second, first, stage]
    assert blocks(model, ["GELU"]) == [stage[1]]
