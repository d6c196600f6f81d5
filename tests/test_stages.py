"""Stages of a user's own in the training stream: samples as webdataset has them, exact resume, what is refused."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shards import colour_of, make_shards, tiny_model
from test_data import COUNTS, CPU, DECODER, assert_same_batches, flat, rows, sources_of, stream_of, take
from torch import Tensor

import vlcl
from vlcl.batch import Batch
from vlcl.config import load_config
from vlcl.data.cache import CacheReader, open_cache
from vlcl.data.order import Layout
from vlcl.data.reader import ShardReader
from vlcl.data.stages import as_stage, load_stages
from vlcl.data.stream import Failure, Position, TrainStream, make_loader
from vlcl.errors import UserError
from vlcl.logs import read_metrics
from vlcl.model import build_model
from vlcl.train import train
from vlcl_data_prep.index import index_shards

Sample = dict[str, Any]
wds: Any = import_module("webdataset")  # whose stubs know half of its names


def no_fives(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if sample["__row__"] % 5:
            yield sample


def noisy(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Drops by chance, and writes chance into what it keeps."""
    for sample in samples:
        if random.random() < 0.7:
            level = int(torch.randint(0, 256, (1,)))
            yield sample | {"png": Image.new("RGB", (8, 8), (level, 0, 0)), "txt": f"picture {sample['__row__']}"}


def test_a_stage_sees_what_webdataset_gives_and_the_row(tmp_path: Path) -> None:
    def with_mask(i: int, files: dict[str, bytes]) -> None:
        files["mask.npy"] = bytes([i])

    folder = make_shards(tmp_path, COUNTS, with_mask)
    by_webdataset = [
        {name: value for name, value in sample.items() if name != "__local_path__"}
        for shard in sorted(map(str, folder.glob("*.tar")))
        for sample in wds.tarfile_to_samples()([{"url": shard}])
    ]
    seen: dict[int, Sample] = {}

    def look(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            seen[sample["__row__"]] = dict(sample)
            yield sample

    take(stream_of(sources_of(folder), streams=1, batch=43).compose(look), 1)
    assert len(seen) == 43
    for row, expected in enumerate(by_webdataset):
        assert seen[row] == {**expected, "__row__": row, "__epoch__": 0}


def test_the_documentations_example(tmp_path: Path) -> None:
    def rated(i: int, files: dict[str, bytes]) -> None:
        files["json"] = b'{"pwatermark": %.1f}' % (i % 10 / 10)

    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text().split("## Stages of your own")[1]
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    sources = sources_of(make_shards(tmp_path, COUNTS, rated))
    (batch,) = take(stream_of(sources, streams=1, batch=35).compose(scope["drop_watermarks"]), 1)
    assert sorted(batch.row_B.tolist()) == [row for row in range(43) if row % 10 < 8]


def test_what_a_stage_drops_is_counted_by_its_name_and_renumbers_nothing(tmp_path: Path) -> None:
    stream = stream_of(sources_of(make_shards(tmp_path, COUNTS)), streams=1, batch=34).compose(no_fives)
    assert isinstance(stream, wds.DataPipeline)
    (batch,) = take(stream, 1)
    assert sorted(batch.row_B.tolist()) == [row for row in range(43) if row % 5]
    assert torch.equal(batch.tokens_BL[:, 0], batch.row_B)  # each with its own caption
    assert [tuple(x[:2].int().tolist()) for x in batch.images_BCHW] == [colour_of(int(r))[:2] for r in batch.row_B]
    assert batch.skipped == {"dropped by test_stages:no_fives": 9}
    assert batch.consumed == {0: 43}


@pytest.mark.parametrize("stages", [(no_fives,), (noisy,), (no_fives, noisy), (wds.select(bool), noisy)])
def test_any_position_goes_on_with_the_same_batches(tmp_path: Path, stages: tuple[Any, ...]) -> None:
    def damage(i: int, files: dict[str, bytes]) -> None:
        if i % 7 == 0:
            files["png"] = b"broken"

    sources = sources_of(make_shards(tmp_path, COUNTS, damage))
    expected = take(stream_of(sources).compose(*stages), 24)
    position, counted = Position(), Counter[str]()
    for stop, batch in enumerate(expected[:21], start=1):
        position = position.after(batch)
        counted.update(batch.skipped)
        if stop in (1, 4, 11, 17, 21):
            got = take(stream_of(sources, start=position).compose(*stages), 3)
            assert_same_batches(got, expected[stop : stop + 3])
            assert [batch.skipped for batch in got] == [batch.skipped for batch in expected[stop : stop + 3]]
    assert {name for name in counted if name.startswith("dropped by")} == {
        f"dropped by {as_stage(stage).name}" for stage in stages if stage in (no_fives, noisy)
    }


def test_workers_do_not_change_the_sequence(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    torch.manual_seed(3)
    expected = take(stream_of(sources).compose(no_fives, noisy), 24)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)  # a stage's numbers are not taken from the process
    assert_same_batches(take(stream_of(sources).compose(no_fives, noisy), 24, workers=2), expected)


def test_a_stage_that_keeps_all_changes_no_batch(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    kept = stream_of(sources).compose(lambda samples: samples, wds.map(dict))
    assert_same_batches(take(kept, 24), take(stream_of(sources), 24))


def test_files_may_come_decoded(tmp_path: Path) -> None:
    """webdataset's own decoder before ours: the same pictures and captions, transparency too."""

    def change(i: int, files: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        Image.new("RGBA", (32, 32), (*colour_of(i), 0 if i % 2 else 255)).save(buffer, "PNG")
        files["png"] = buffer.getvalue()

    sources = sources_of(make_shards(tmp_path, COUNTS, change))
    assert_same_batches(take(stream_of(sources).compose(wds.decode("pilrgba")), 6), take(stream_of(sources), 6))
    (failure,) = make_loader(stream_of(sources).compose(wds.decode("rgb")), 0, CPU)
    assert isinstance(failure, Failure)
    assert "data.stages gave on a ndarray as 'png'" in failure.message


def twice(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        yield sample


def renumbered(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"__row__": sample["__row__"] + 1}


def nameless(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield {"png": sample["png"], "txt": sample["txt"]}


def pairs_of(samples: Iterator[Sample]) -> Iterator[Any]:
    yield from zip(samples, samples)


def short(samples: Iterable[Sample]) -> Iterator[Sample]:
    yield from islice(samples, 2)


def failing(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample | {"score": sample["json"]}


def nothing(samples: Iterable[Sample]) -> Iterator[Sample]:
    for _ in samples:
        yield from ()


REFUSED = {
    twice: "twice gave more samples than it took: a second one, of row ",
    renumbered: "renumbered took row .* and gave row .* leaves `__row__` as it is",
    nameless: "nameless took row .* and gave row None",
    pairs_of: "pairs_of gave a tuple, and a sample is a dict",
    short: "short ended after row ",
    failing: r"failing failed at row \d+: KeyError: 'json' \(.*test_stages.py, line \d+\)",
    nothing: "1041 of 1042 samples are left out: 1041 dropped by test_stages:nothing. Look at what data.stages drops",
}


@pytest.mark.parametrize("stage", REFUSED, ids=lambda stage: stage.__name__)
def test_what_a_stage_may_not_do_ends_with_a_word(tmp_path: Path, stage: Any) -> None:
    stream = stream_of(sources_of(make_shards(tmp_path, COUNTS)), batch=2).compose(stage)
    *_, item = make_loader(stream, 0, CPU)
    assert isinstance(item, Failure)
    with pytest.raises(UserError, match=REFUSED[stage]):
        raise UserError(item.message)


def test_shuffling_within_a_stage_is_refused(tmp_path: Path) -> None:
    stream = stream_of(sources_of(make_shards(tmp_path, COUNTS))).compose(wds.shuffle(10))
    *_, item = make_loader(stream, 0, CPU)
    assert isinstance(item, Failure)
    assert "to shuffle is for data.shuffle" in item.message


def test_a_cache_has_no_files_for_stages(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS))
    preprocess = build_model(tiny_model(tmp_path / "model")).preprocess_eval
    decoder = vlcl.Decoder(preprocess, DECODER.tokenize)
    cache = open_cache("memory", sources, decoder, finished=True, about={}, key="data.train", say=lambda _: None)
    stream = TrainStream(sources, Layout(sources.counts, 4), CacheReader(cache, sources, preprocess), 8, Position())
    with pytest.raises(UserError, match=r"data\.stages need data\.cache=null"):
        stream.compose(no_fives)
    with pytest.raises(UserError, match=r"data\.stages needs data\.cache=null"):
        load_config(None, ["data.train=x", "data.stages=[a:b]", "data.cache=memory"])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, `own_stages`."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "own_stages.py").write_text(
        "def drop_odd(samples):\n    for sample in samples:\n        if sample['__row__'] % 2 == 0:\n"
        "            yield sample\n\nLIMIT = 3\n"
    )
    (tmp_path / "path" / "half_stages.py").write_text("import no_such_package\n")
    (tmp_path / "path" / "torn_stages.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "own_stages"
    for name in ("own_stages", "half_stages", "torn_stages"):
        __import__("sys").modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_stage:x", r"there is no module 'own_stage' for 'own_stage:x'.*PYTHONPATH=FOLDER vlcl train"),
        ("here_stages:x", r"'here_stages'.*but a file of that name here.*PYTHONPATH=\. vlcl train"),
        ("own_stages:drop_od", r"no function 'drop_od'; did you mean own_stages:drop_odd\?"),
        ("own_stages:filter_all", "no function 'filter_all'; it has drop_odd"),
        ("own_stages:LIMIT", "own_stages:LIMIT is no function, but int"),
        ("half_stages:x", "half_stages cannot be imported: No module named 'no_such_package'"),
        ("torn_stages:x", "torn_stages cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_stage_that_is_not_there_is_told_with_what_to_type(
    tmp_path: Path, module: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here_stages.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_stages([name])
    with pytest.raises(UserError, match=r'data\.stages.*a list of "module:function"'):
        load_config(None, ["data.train=x", f"data.stages=[{name.replace(':', '.')}]"])


def settings(tmp_path: Path, *more: str) -> list[str]:
    make_shards(tmp_path / "shards", COUNTS)
    return [
        f"data.train={tmp_path / 'shards'}", f"model.name={tiny_model(tmp_path / 'model')}", "train.steps=6",
        "train.batch_size=4", "train.log_every=1", "optim.warmup=2", "checkpoint.every=3", "data.workers=0",
        "data.streams=2", "data.shuffle=8", "log.trackers=[]", "train.precision=fp32", *more,
    ]  # fmt: skip


def weights_of(run: Path) -> dict[str, Tensor]:
    return dict(vlcl.load_model(str(run)).encoder.state_dict())


def test_a_run_with_stages_resumes_to_the_bit_and_logs_what_they_drop(tmp_path: Path, module: str) -> None:
    common = settings(tmp_path, f"data.stages=[{module}:drop_odd]")
    make = partial(load_config, None)
    train(make([*common, f"train.output={tmp_path / 'whole'}"]))
    last = read_metrics(tmp_path / "whole")[-1]
    dropped = [line for line in read_metrics(tmp_path / "whole") if "data/skipped" in line][-1]
    assert (
        dropped[f"data/skipped/dropped by {module}:drop_odd"] == dropped["data/skipped"] > 10
    )  # half: over max_bad_share
    assert last["step"] == 6
    part = [*common, f"train.output={tmp_path / 'part'}"]
    train(make([*part, "train.steps=3", "optim.schedule=constant"]))
    train(make([*common, f"train.output={tmp_path / 'same'}", "optim.schedule=constant"]))
    train(make([*part, "optim.schedule=constant", "resume=latest"]))
    whole, resumed = weights_of(tmp_path / "same"), weights_of(tmp_path / "part")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_notebook_composes_and_trains_with_functions(tmp_path: Path) -> None:
    config = load_config(None, settings(tmp_path, f"train.output={tmp_path / 'run'}"))
    built = vlcl.build_model(config.model.name)
    batches = [b for b in islice(vlcl.train_pipeline(config, built).compose(no_fives), 6) if isinstance(b, Batch)]
    assert all(row % 5 for row in flat(rows(batches)))
    vlcl.train(config, stages=[no_fives])
    counted = [line for line in read_metrics(tmp_path / "run") if "data/skipped" in line][-1]
    assert counted["data/skipped/dropped by test_stages:no_fives"] == sum(sum(b.skipped.values()) for b in batches)


def test_hashes_of_captions_travel_with_the_batch(tmp_path: Path) -> None:
    sources = sources_of(make_shards(tmp_path, COUNTS, lambda i, files: files.update(txt=b"picture %d" % (i % 5))))
    made_of = (sources, Layout(sources.counts, 40), ShardReader(sources, DECODER), 8, Position(), (), True)
    (batch,) = take(TrainStream(*made_of), 1)
    assert batch.caption_B is not None
    assert batch.caption_B.dtype == torch.int64
    same = batch.caption_B[:, None] == batch.caption_B
    assert torch.equal(same, batch.row_B[:, None] % 5 == batch.row_B % 5)
    parts = batch.chunk(3)
    assert torch.equal(torch.cat([part.caption_B for part in parts if part.caption_B is not None]), batch.caption_B)
    assert torch.equal(torch.cat([part.tokens_BL for part in parts]), batch.tokens_BL)
    (again,) = take(TrainStream(*made_of).compose(lambda samples: samples), 1, workers=1)
    assert again.caption_B is not None
    assert torch.equal(again.caption_B, batch.caption_B)
    assert take(stream_of(sources), 1)[0].caption_B is None


def test_a_run_in_which_all_pairs_have_one_caption_learns_nothing_of_them(tmp_path: Path) -> None:
    """loss.same_caption=ignore in training: without negatives InfoNCE gives no gradient, with them it does."""
    make_shards(tmp_path / "shards", COUNTS, lambda i, files: files.update(txt=b"a sign"))
    index_shards(str(tmp_path / "shards"), progress=False)
    losses = {}
    for how in ("ignore", "negative"):
        common = settings(tmp_path / "other", f"train.output={tmp_path / how}", "loss.name=infonce", "train.steps=2")
        shards = f"data.train={tmp_path / 'shards'}"
        train(load_config(None, [*common, shards, f"loss.same_caption={how}", "train.accumulate=2"]))
        losses[how] = [line["train/grad_norm"] for line in read_metrics(tmp_path / how) if "train/loss" in line]
    assert losses["ignore"] == [0.0, 0.0]
    assert min(losses["negative"]) > 0


def test_stages_are_on_all_files_and_not_without_them(tmp_path: Path) -> None:
    """Without a stage nothing is read that nobody asks for."""
    sources = sources_of(make_shards(tmp_path, (3,), lambda i, files: files.update(mask=b"x")))
    reader = ShardReader(sources, DECODER)
    unread, whole = (
        [dict(vars(s))["files"]["mask"] for _, s in r.read(0, 0, 3)] for r in (reader, reader.with_all_files())
    )
    assert list(map(len, unread)) == [0, 0, 0]
    assert whole == [b"x"] * 3
