"""Several captions a picture: what they are, which one training takes and when, and the same recalls in training as in
`vlcl eval retrieval`."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow
import pyarrow.parquet
import pytest
import torch
from shards import make_shards, picture, read_members, tiny_model
from test_data import CPU, assert_same_batches, sources_of, take, to_tensor

from vlcl.batch import Batch
from vlcl.checkpoint import load_model
from vlcl.config import load_config
from vlcl.data import decode
from vlcl.data.cache import CacheReader, open_cache
from vlcl.data.captions import Captions, Choice, LongCaptions, captions_from
from vlcl.data.decode import BadSample, Keys, Limits
from vlcl.data.order import Layout
from vlcl.data.reader import Decoder, ShardReader, captioned_at, samples_at
from vlcl.data.stream import EvalStream, Failure, Position, TrainStream, make_loader
from vlcl.errors import UserError
from vlcl.logs import read_metrics
from vlcl.train import train
from vlcl_data_prep.pack import pack_shards
from vlcl_data_prep.verify import Rules, verify_shards
from vlcl_eval.clip_benchmark.retrieval import evaluate_retrieval

BOTH = Keys(json_text=("caption", "recaption"))


def in_json(**values: Any) -> dict[str, bytes]:
    return {"json": json.dumps(values).encode()}


def reason_of(files: dict[str, bytes], keys: Keys, limits: Limits = decode.DEFAULT_LIMITS) -> BadSample:
    with pytest.raises(BadSample) as caught:
        captions_from(files, keys, limits)
    return caught.value


def left_out(found: Captions) -> list[str]:
    return [bad.reason for bad in found.left_out]


@pytest.mark.parametrize(
    ("files", "keys", "texts", "counts"),
    [
        ({"txt": b"one\n two \n\n"}, Keys(), ("one", "two"), (2,)),
        ({"txt": b"one\ntwo"}, Keys(lines=False), ("one\ntwo",), (1,)),
        (
            {"txt": b"a", "1.txt": b"b\nc", "cap": b"d"},
            Keys(text=("txt", "0.txt", "1.txt")),
            ("a", "b", "c"),
            (1, 0, 2),
        ),
        ({"txt": b"a", "cap": b"b"}, Keys(text=("no;cap", "txt;cap")), ("b", "a"), (1, 1)),
        (in_json(caption=["x", "y"]), Keys(json_text="caption"), ("x", "y"), (2,)),
        (in_json(caption=["x", None, " ", "y"]), Keys(json_text="caption"), ("x", "y"), (2,)),
        (in_json(caption="o", recaption=["r", "s"]), BOTH, ("o", "r", "s"), (1, 2)),
        (in_json(caption=None, recaption="r"), BOTH, ("r",), (0, 1)),
        (in_json(caption="two\nlines"), Keys(json_text="caption"), ("two\nlines",), (1,)),
        (in_json(a=[], b=3, c="text"), Keys(json_text="a;b;c"), ("text",), (1,)),
    ],
)
def test_what_the_captions_are(
    files: dict[str, bytes], keys: Keys, texts: tuple[str, ...], counts: tuple[int, ...]
) -> None:
    assert captions_from(files, keys) == Captions(texts, counts)


def test_what_cannot_be_used_is_left_out_and_the_rest_is_taken() -> None:
    limits = Limits(max_caption=5, max_captions=3)
    found = captions_from({"txt": b"short\nmuch longer\nfine"}, Keys(), limits)
    assert (found.texts, left_out(found)) == (("short", "fine"), ["caption too long"])
    found = captions_from({"txt": b"a", "cap": b"\xff\xfe"}, Keys(text=("cap", "txt")))
    assert (found.texts, left_out(found)) == (("a",), ["caption not UTF-8"])
    found = captions_from({"json": b'{"caption": ["a", 1, "\\ud800"]}'}, Keys(json_text="caption"))
    assert (found.texts, left_out(found)) == (("a",), ["caption not UTF-8", "caption is not text"])
    assert reason_of({"txt": b"much longer"}, Keys(), limits).reason == "caption too long"
    assert reason_of({"txt": b"1\n2\n3\n4"}, Keys(), limits).reason == "too many captions"
    assert reason_of(in_json(caption=["1", "2"], recaption=["3", "4"]), BOTH, limits).reason == "too many captions"
    assert reason_of(in_json(caption=[None, ""], recaption=""), BOTH).reason == "empty caption"
    assert reason_of(in_json(title="x"), BOTH).reason == "no caption"


@pytest.mark.parametrize("value", [[{"text": "x"}], {"text": "x"}, 3, [["x"]]])
def test_a_refused_list_says_what_to_type(value: Any) -> None:
    bad = reason_of(in_json(caption=value, title="a cup", alts=["a", "b"], width=3), Keys(json_text="caption"))
    assert bad.reason == "caption is not text"
    assert "under: alts, title. Type data.json_text_key=KEY, of other commands --json-text-key KEY" in bad.detail


def test_lines_are_those_of_python() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab \n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\t", k=30)) + "a"
        assert captions_from({"txt": text.encode()}).texts == tuple(x.strip() for x in text.splitlines() if x.strip())


def test_a_file_of_many_lines_takes_no_memory() -> None:
    """Nor does one of breaks alone."""
    tracemalloc.start()
    assert reason_of({"txt": b"a\n" * 10_000_000}, Keys()).reason == "too many captions"
    assert captions_from({"txt": b"\n" * 10_000_000 + b"a"}).texts == ("a",)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000  # the lines alone would be 500 MB
    tracemalloc.stop()


ROWS = range(20_000)


def shares(choice: Choice, counts: Sequence[int], epoch: int = 2) -> list[float]:
    taken = Counter(choice(counts, epoch, row) for row in ROWS)
    return [taken[place] / len(ROWS) for place in range(sum(counts))]


def test_the_shares_that_are_drawn() -> None:
    near = partial(pytest.approx, abs=0.015)  # 4 standard deviations
    assert shares(Choice(), (4,)) == near([0.25] * 4)
    assert shares(Choice(weights=(1.0, 3.0)), (1, 1)) == near([0.25, 0.75])
    assert shares(Choice(weights=(1.0, 3.0)), (2, 3)) == near([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4])
    assert shares(Choice(weights=(1.0, 3.0, 1.0)), (1, 0, 1)) == near([0.5, 0.5])
    assert shares(Choice(), (1, 2)) == near([0.5, 0.25, 0.25])
    assert shares(Choice("first"), (2, 3)) == [1, 0, 0, 0, 0]
    assert shares(Choice("all"), (2, 3)) == near([0.2] * 5)


def test_each_epoch_draws_anew_and_all_takes_them_in_turn() -> None:
    taken = np.array([[Choice(seed=5)((3,), epoch, row) for epoch in range(30)] for row in range(1000)])
    assert np.mean(taken[:, 1:] == taken[:, :-1]) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(taken[1:] == taken[:-1]) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(taken[:, 0] == [Choice(seed=6)((3,), 0, row) for row in range(1000)]) == pytest.approx(
        1 / 3, abs=0.06
    )
    turns = [[Choice("all", seed=5)((2, 3), epoch, row) for epoch in range(7)] for row in range(100)]
    assert all(sorted(turn[:5]) == [0, 1, 2, 3, 4] and turn[5:] == turn[:2] for turn in turns)
    assert len({turn[0] for turn in turns}) == 5
    # A run that was started by another version goes on with the same captions.
    assert [Choice(weights=(1.0, 3.0), seed=7)((2, 3), epoch, 41) for epoch in range(12)] == [
        1,
        0,
        2,
        3,
        3,
        4,
        2,
        3,
        2,
        2,
        3,
        4,
    ]


# Streams: sample i has 1 + i % 4 captions, "I 0", "I 1", ...; the last is a recaption.

COUNTS = (7, 20, 3, 13)


def several(i: int, files: dict[str, bytes]) -> None:
    del files["txt"]
    texts = [f"{i} {n}" for n in range(1 + i % 4)]
    files |= in_json(caption=texts[:-1], recaption=texts[-1])
    if i == 11:
        files["png"] = b"broken"


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([list(map(int, text.split())) for text in texts])


DECODER = Decoder(to_tensor, tokenize, BOTH)
CHOICE = Choice("sample", (1.0, 3.0), seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("several"), COUNTS, several)


def stream_of(folder: Path, reader: Any, rank: int = 0, world: int = 1, start: Position | None = None) -> TrainStream:
    sources = sources_of(folder)
    return TrainStream(sources, Layout(sources.counts, 4 // world, rank, world, 4), reader, 16, start or Position())


def taken_of(batches: Sequence[Any]) -> dict[tuple[int, int], int]:
    """(epoch, row) -> number of the caption."""
    found = {}
    for batch in batches:
        for row, (own, number) in zip(batch.row_B.tolist(), batch.tokens_BL.tolist()):
            assert own == row
            found[batch.epoch, row] = number
    return found


def test_the_caption_is_the_same_whoever_reads_it(folder: Path, tmp_path: Path) -> None:
    """On 1 and 2 ranks, with 0 and 2 workers, after a resume, and from a cache; row ids as ever."""
    sources, epochs = sources_of(folder), 6
    reader = ShardReader(sources, DECODER, CHOICE)
    count = epochs * (sum(COUNTS) // 4)
    batches = take(stream_of(folder, reader), count)
    taken = taken_of(batches)
    for (epoch, row), number in taken.items():
        assert number == CHOICE((row % 4, 1), epoch, row)
    assert {number for (_, row), number in taken.items() if row % 4 == 3} == {0, 1, 2, 3}
    assert_same_batches(take(stream_of(folder, reader), count, workers=2), batches)
    position = Position()
    for batch in batches[:23]:
        position = position.after(batch)
    assert_same_batches(take(stream_of(folder, reader, start=position), 5), batches[23:28])
    ranks = [taken_of(take(stream_of(folder, reader, rank, 2), count)) for rank in range(2)]
    for of_rank in ranks:
        assert all(number == taken.get(key, number) for key, number in of_rank.items())
    assert len(taken.keys() & (ranks[0].keys() | ranks[1].keys())) > 200
    for place in ("memory", str(tmp_path / "cache")):
        cache = open_cache(place, sources, DECODER, finished=False, about={}, key="data.train", say=lambda text: None)
        cached = CacheReader(cache, sources, to_tensor, CHOICE)
        assert_same_batches(take(stream_of(folder, cached), count), batches)
        assert_same_batches(take(stream_of(folder, cached, start=position), 5), batches[23:28])


def test_evaluation_has_all_captions_in_order(folder: Path) -> None:
    sources = sources_of(folder)
    cache = open_cache("memory", sources, DECODER, finished=False, about={}, key="data.val", say=lambda text: None)
    expected = [[i, n] for i in range(43) if i != 11 for n in range(1 + i % 4)]
    for reader in (ShardReader(sources, DECODER), CacheReader(cache, sources, to_tensor)):
        for world in (1, 3):
            streams = [EvalStream(sources, 5, reader, rank, world) for rank in range(world)]
            batches = [batch for stream in streams for batch in make_loader(stream, 0, CPU) if len(batch)]
            assert [token for batch in batches for token in batch.tokens_BL.tolist()] == expected
            counts = [count for batch in batches for count in batch.count_B.tolist()]
            assert counts == [1 + i % 4 for i in range(43) if i != 11]
    assert [texts for _, texts in captioned_at(sources, [2, 4], DECODER)] == [("2 0", "2 1", "2 2"), ("4 0",)]
    assert [text for _, text in samples_at(sources, [2, 4], DECODER)] == ["2 0", "4 0"]


def test_training_on_what_is_no_text_ends_with_what_to_type(tmp_path: Path) -> None:
    def objects(i: int, files: dict[str, bytes]) -> None:
        files |= in_json(caption=[{"text": "x"}], title="a cup")

    folder = make_shards(tmp_path, (12,), objects)
    decoder = Decoder(to_tensor, tokenize, Keys(json_text="caption"))
    (failure,) = islice(stream_of(folder, ShardReader(sources_of(folder), decoder, CHOICE)), 1)
    assert isinstance(failure, Failure)
    assert "caption is not text" in failure.message
    assert "verify's table says which keys of the .json hold texts" in failure.message
    found = verify_shards(str(folder), 1, Rules(keys=Keys(json_text="caption")), progress=False)
    assert {problem.reason for problem in found} == {"caption is not text"}
    assert "under: title" in found[0].detail


def test_verify_lists_a_caption_that_is_left_out(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, (3,), lambda i, files: files.update(txt=b"fine\n" + b"x" * (i + 5)))
    found = verify_shards(str(folder), 1, Rules(limits=Limits(max_caption=6)), progress=False)
    assert [(problem.position, problem.reason) for problem in found] == [(2, "caption too long")]


def tokenizers() -> list[Any]:
    """open_clip's own, and one of Hugging Face's, which fills up with a token of its own, or with that of the end."""
    name = f"local-dir:{Path(__file__).parents[1] / 'benchmarks' / 'evidence' / 'model'}"
    ends: Any = open_clip.get_tokenizer(name)
    ends.tokenizer.pad_token = ends.tokenizer.eos_token
    return [open_clip.get_tokenizer("ViT-B-32", context_length=8), open_clip.get_tokenizer(name), ends]


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    """Against the length that the tokenizers find without a bound; from shards and from a cache."""
    texts = [" ".join(["cat"] * n) for n in range(1, 20)] + ["a small house, by the river!", "", "日本語" * 4]
    for number, tokenizer in enumerate(tokenizers()):
        length = tokenizer.context_length
        if hasattr(tokenizer, "encode"):
            lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
        else:
            lengths = [len(tokenizer.tokenizer(text).input_ids) for text in texts]
        assert {length - 1, length, length + 1} <= set(lengths)
        tokens_TL, cut_T = Decoder(to_tensor, tokenizer).tokens(texts)
        assert torch.equal(tokens_TL, tokenizer(texts))
        assert cut_T.tolist() == [n > length for n in lengths]

        def long(i: int, files: dict[str, bytes], words: int = length) -> None:
            files["txt"] = b"cat\n" + b"dog " * (words - 2 + i % 2)

        sources = sources_of(make_shards(tmp_path / str(number), (24,), long))
        decoder = Decoder(to_tensor, tokenizer)
        choice = Choice(seed=3)
        cache = open_cache(
            "memory", sources, decoder, finished=False, about={}, key="data.train", say=lambda text: None
        )
        for reader in (ShardReader(sources, decoder, choice), CacheReader(cache, sources, to_tensor, choice)):
            stream = TrainStream(sources, Layout(sources.counts, 4), reader, 16, Position())
            truncated = sum(batch.truncated for batch in take(stream, 6))
            assert truncated == sum(choice((2,), 0, row) for row in range(1, 24, 2)) > 2


# Retrieval: the same numbers while training, by `vlcl eval retrieval`, and by a slow loop.

WORDS = ["red", "blue", "tall", "small", "house", "river", "dog", "cat", "tree", "snow", "boat", "night", "road"]


def captions_of(i: int) -> list[str]:
    """1 to 4; the first is shared with the next pictures, so that captions tie."""
    rng = random.Random(i)
    return [WORDS[i // 3], *(" ".join(rng.sample(WORDS, 3 + 4 * (i == 7))) for _ in range(i % 4))]


def lines(i: int, files: dict[str, bytes]) -> None:
    files["png"], files["txt"] = picture(7 * i), "\n".join(captions_of(i)).encode()


def slow_recalls(run: Path, count: int, k: int) -> tuple[float, float]:
    """(image to text, text to image), of equal scores in expectation, a query at a time in float64."""
    built: Any = load_model(str(run))
    built.encoder.eval()
    from vlcl.data.decode import decode_image

    texts = [text for i in range(count) for text in captions_of(i)]
    owner = [i for i in range(count) for _ in captions_of(i)]
    with torch.no_grad():
        image = torch.stack([built.preprocess_eval(decode_image(picture(7 * i))) for i in range(count)])
        features = {text: built.encoder.text(built.tokenize([text]))[0] for text in set(texts)}
        score = (built.encoder.image(image) @ torch.stack([features[text] for text in texts]).T).double().numpy()

    def hit(scores: np.ndarray, own: list[int]) -> float:
        rng, hits = np.random.default_rng(0), 0
        for _ in range(400):
            order = rng.permutation(len(scores))
            hits += bool(set(own) & set(order[np.argsort(-scores[order], kind="stable")][:k].tolist()))
        return hits / 400

    to_text = [hit(score[i], [t for t in range(len(texts)) if owner[t] == i]) for i in range(count)]
    to_image = [hit(score[:, t], [owner[t]]) for t in range(len(texts))]
    return float(np.mean(to_text)), float(np.mean(to_image))


def test_recalls_while_training_are_those_of_eval_retrieval_and_of_a_slow_loop(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", (16, 20), lines)
    results = train(load_config(None, [
        f"data.train={folder}", f"data.val={folder}", f"model.name={tiny_model(tmp_path / 'model')}", "data.workers=0",
        f"train.output={tmp_path / 'run'}", "train.steps=6", "train.batch_size=12", "optim.lr=1e-2", "optim.warmup=1",
        "eval.batch_size=7", "train.precision=fp32", "log.trackers=[]",
    ]))  # fmt: skip
    said: list[str] = []
    asked: dict[str, Any] = {"output": tmp_path / "out", "batch_size": 11, "say": said.append}
    record = evaluate_retrieval(str(tmp_path / "run"), str(folder), **asked)
    assert "note: captions" not in "".join(said)
    evaluate_retrieval(str(tmp_path / "run"), str(folder), keys=Keys(lines=False), **asked)
    assert re.search(r"by --text-key txt --no-text-lines, and .*config.yaml says --text-key txt: ", "".join(said))
    assert record["sizes"] == {"images": 36, "captions": 90, "shards": 2}
    for k in (1, 5, 10):
        to_text, to_image = slow_recalls(tmp_path / "run", 36, k)
        found = results[f"val/image_to_text_R@{k}"], results[f"val/text_to_image_R@{k}"]
        metrics = record["metrics"]
        assert found == pytest.approx([metrics[f"{way}_retrieval_recall@{k}"] for way in ("text", "image")], abs=1e-9)
        assert found == pytest.approx([to_text, to_image], abs=0.02)
    truncated = [line["data/truncated"] for line in read_metrics(tmp_path / "run") if "data/truncated" in line]
    assert 0 < truncated[-1] <= 2  # of the picture 7, in two epochs
    assert 0 < results["val/text_to_image_R@1"] < results["val/text_to_image_R@10"] < 1


def test_pack_keeps_every_caption_of_a_list(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": [f"first {i}", None, f"second\n{i}"]} for i in range(4)]
    rows.append({"image": "0.png", "caption": [{"text": "x"}]})
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = pack_shards(tmp_path / "list.jsonl", tmp_path / "out")
    assert (summary.pairs, summary.captions, dict(summary.skipped)) == (4, 8, {"caption is not text": 1})
    packed = [files["txt"].decode() for _, files in sorted(read_members(tmp_path / "out").items())]
    assert packed == [f"first {i}\nsecond {i}" for i in range(4)]
    (tmp_path / "bad.jsonl").write_text((json.dumps(rows[-1]) + "\n") * 3)
    with pytest.raises(UserError, match=r"caption is not text.*or of lists of texts: --caption-key COLUMN"):
        pack_shards(tmp_path / "bad.jsonl", tmp_path / "none")


def test_pack_keeps_columns_apart(tmp_path: Path) -> None:
    rows = [
        {"image": "0.png", "caption": "one\nline", "recaption": ["a", "b"]},
        {"image": "0.png", "caption": None, "recaption": "c"},
        {"image": "0.png", "recaption": "d"},
        {"image": "0.png", "caption": "e", "recaption": 3},
        {"image": "0.png", "other": "f"},
    ]
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[1:3]), tmp_path / "list.parquet")
    for name, expected, skipped in (
        ("list.jsonl", [(("one\nline", "a", "b"), (1, 2)), (("c",), (0, 1)), (("d",), (0, 1))], 2),
        ("list.parquet", [(("c",), (0, 1)), (("d",), (0, 1))], 0),
    ):
        summary = pack_shards(tmp_path / name, tmp_path / f"{name}.out", caption_key=["caption", "recaption"])
        found = [captions_from(files, BOTH) for _, files in sorted(read_members(tmp_path / f"{name}.out").items())]
        assert [(captions.texts, captions.counts) for captions in found] == expected
        assert (summary.captions, summary.json_keys) == (sum(len(x[0]) for x in expected), BOTH.json_text)
        assert summary.skipped.total() == skipped


def test_weights_are_of_keys_that_are_drawn_from() -> None:
    two = "data.json_text_key=[caption,recaption]"
    config = load_config(None, ["data.train=x", two, "data.caption_weights=[1,3]"])
    assert (config.data.json_text_key, config.data.caption_weights) == (["caption", "recaption"], [1, 3])
    for settings, message in (
        (["data.caption_weights=[1,3]"], r"2 numbers for 1 keys in data.text_key; give one per key, as data.text_key="),
        ([two, "data.caption_weights=[1]"], r"1 numbers for 2 keys in data.json_text_key"),
        ([two, "data.caption_weights=[1,3]", "data.captions=all"], r"needs data.captions=sample"),
        (["data.captions=each"], r"data.captions: got .each.; allowed: sample, first, all"),
        (["data.text={keys: [a, b]}"], r"data.text: there is no such key; did you mean 'data.text_key'"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, ["data.train=x", *settings])


LONG_TEXT = " ".join(f"w{n}" for n in range(40))
SENTENCES = [
    "A cat sits.",
    "It is 3.5 kg, big!",
    "Who knows?",
    'He said "no."',
    "The end of it all is near and far and wide.",
]


def words_fit(most: int) -> Any:
    return lambda text: len(text.split()) > most


def test_a_window_begins_at_any_word_from_which_there_is_something_to_cut() -> None:
    kept = [LongCaptions("window", 3)(LONG_TEXT, words_fit(10), epoch, 7).split() for epoch in range(400)]
    assert {words[0] for words in kept} == {f"w{n}" for n in range(31)}
    assert all(LONG_TEXT.endswith(" ".join(words)) for words in kept)
    assert kept[:50] == [LongCaptions("window", 3)(LONG_TEXT, words_fit(10), epoch, 7).split() for epoch in range(50)]
    assert kept[:50] != [LongCaptions("window", 3)(LONG_TEXT, words_fit(10), epoch, 8).split() for epoch in range(50)]
    without = "字" * 9
    starts = {len(LongCaptions("window")(without, lambda text: len(text) > 4, epoch, 0)) for epoch in range(100)}
    assert starts == {4, 5, 6, 7, 8, 9}


def test_sentences_are_whole() -> None:
    text = " ".join(SENTENCES)
    kept = {LongCaptions("sentence")(text, words_fit(7), epoch, 0) for epoch in range(200)}
    assert kept == {
        "A cat sits.",
        "It is 3.5 kg, big! Who knows?",
        'Who knows? He said "no."',
        'He said "no."',
        SENTENCES[4],
    }
    assert LongCaptions("sentence")(LONG_TEXT, words_fit(9), 0, 0) == LONG_TEXT
    chinese = "一只猫。它很大！谁知道？完。"
    kept = {LongCaptions("sentence")(chinese, lambda text: len(text) > 8, epoch, 0) for epoch in range(100)}
    assert kept == {"一只猫。它很大！", "它很大！谁知道？", "谁知道？完。"}


@pytest.mark.parametrize("how", ["window", "sentence"])
def test_training_sees_parts_of_long_captions_and_counts_them(tmp_path: Path, how: Any) -> None:
    """With open_clip's tokenizer; the same with workers and after a resume, and short captions as ever."""
    text = " ".join(SENTENCES)

    def lengthen(i: int, files: dict[str, bytes]) -> None:
        if i % 2:
            files["txt"] = text.encode()

    folder = make_shards(tmp_path, (7, 20, 3, 13), lengthen)
    sources = sources_of(folder)
    tokenizer: Any = open_clip.SimpleTokenizer(context_length=14)
    decoder = Decoder(to_tensor, tokenizer)
    readers = [ShardReader(sources, decoder, Choice("first"), long) for long in (None, LongCaptions(how))]
    plain, cut = ([b for b in islice(stream_of(folder, reader), 33) if isinstance(b, Batch)] for reader in readers)
    seen = set()
    for before, after in zip(plain, cut):
        assert torch.equal(before.row_B, after.row_B)
        assert before.truncated == after.truncated == int((after.row_B % 2).sum())
        for row, old, new in zip(after.row_B % 2, before.tokens_BL, after.tokens_BL):
            assert row or torch.equal(old, new)
            seen.add(tokenizer.decode(new[new > 0][1:-1].tolist()).strip() if row else "")
    assert len(seen) > 4
    if how == "sentence":
        assert any(part.startswith("who knows ?") for part in seen)
    position = Position()
    for batch in cut[:9]:
        position = position.after(batch)
    loader = make_loader(stream_of(folder, readers[1], start=position), 1, CPU)
    for got, expected in zip(islice(loader, 4), cut[9:]):
        assert torch.equal(got.tokens_BL, expected.tokens_BL)
