"""`vlcl data stats`: what is counted is what training does, the page and the numbers say the same."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from odd_shards import make_odd, odd_samples
from shards import make_shards
from test_report import Page
from typer.testing import CliRunner

from vlcl import cli
from vlcl.config import load_config
from vlcl.data.captions import captions_from
from vlcl_data_prep.samples import open_samples
from vlcl_data_prep.stats import seen_shares, stats_of, summary
from vlcl_data_prep.stats_page import binned
from vlcl_data_prep.tally import Hashes, Repeats, Tally, percentile

MODEL = "ViT-Ti-16-64"  # an input of 64 pixels, 32 tokens


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return make_odd(tmp_path_factory.mktemp("odd") / "shards")


@pytest.fixture(scope="module")
def found(odd):
    samples = open_samples([str(odd)], settings=[f"model.name={MODEL}"])
    return stats_of(samples.config, samples.urls(), jobs=1, progress=False)


def test_what_is_left_out_is_what_training_skips(odd, found):
    """The readers of training and evaluation, over the same shards."""
    import torch

    from vlcl.config.samples import keys_of, limits_of
    from vlcl.data.reader import Decoder, ShardReader
    from vlcl.data.stream import EvalStream
    from vlcl.from_config import open_sources
    from vlcl.model import tokenizer_of

    data = load_config(None, [f"data.train={odd}"]).data
    decoder = Decoder(lambda image: torch.zeros(1), tokenizer_of(MODEL), keys_of(data), limits_of(data))
    sources = open_sources(str(odd))
    batches = list(EvalStream(sources, 4, ShardReader(sources, decoder), 0, 1))
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    assert found.tally.dropped == skipped == Counter(
        {"broken image": 1, "not an image": 1, "no caption": 1, "no image": 1}
    )  # fmt: skip
    assert found.tally.used == sum(map(len, batches)) == 11
    assert found.tally.truncated == sum(batch.truncated for batch in batches) == 2  # of 32 tokens
    assert found.tally.examples["no caption"] == (13, "0013", "has jpg, json; looked for txt")
    assert found.tally.left_out == {"caption too long": 1}


def test_lengths_sizes_and_formats(found):
    tally = found.tally
    texts = [text for files in list(odd_samples())[:11] for text in captions_from(files).texts]
    assert tally.characters == Counter(map(len, texts))
    assert tally.captions == {1: 10, 3: 1}
    assert tally.short == Counter([480, 480, 300, 200, 100, 60, 300, 48, 96, 256, 31])
    assert tally.aspect[50] == 1  # turned upright: 100 x 200
    assert tally.formats == {"PNG": 6, "JPEG": 4, "WEBP": 1}
    assert tally.modes == {"RGB": 7, "RGBA": 1, "CMYK": 1, "L": 1, "P": 1}
    assert tally.changes["turned by its EXIF orientation"] == 1


def test_tokens_are_the_tokenizers(found):
    """open_clip's own count: its words, a start and an end."""
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    texts = [text for files in list(odd_samples())[:11] for text in captions_from(files).texts]
    lengths = Counter(len(encode(text)) + 2 for text in texts)
    assert found.tally.tokens == lengths
    assert found.tally.truncated == sum(n for length, n in lengths.items() if length > 32)


def test_repeated_pictures_and_captions(found):
    assert (found.pictures.distinct, found.pictures.extra, found.pictures.involved) == (10, 1, 2)
    assert (found.captions.distinct, found.captions.extra, found.captions.involved) == (12, 1, 2)
    [pictures] = found.pictures.most
    assert (pictures.count, pictures.first, pictures.last) == (2, 0, 1)


def test_several_processes_count_the_same(odd, found):
    samples = open_samples([str(odd)], settings=[f"model.name={MODEL}"])
    other = stats_of(samples.config, samples.urls(), jobs=2, tokens=False, progress=False)
    for name in ("dropped", "characters", "short", "examples", "kibibytes"):
        assert getattr(other.tally, name) == getattr(found.tally, name)
    assert other.pictures == found.pictures
    assert other.inputs is None
    assert not other.tally.tokens


@pytest.mark.parametrize("size", [(640, 480), (150, 100), (140, 100), (300, 100), (100, 300), (100, 155)])
def test_the_part_of_a_picture_that_training_can_see(size):
    """Against torchvision's random crops themselves, many of them."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    crops = {
        RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), [0.9, 1.0], [3 / 4, 4 / 3])
        for _ in range(400)
    }  # fmt: skip
    largest = max(height * width for _, _, height, width in crops) / (size[0] * size[1])
    config = load_config(None, ["data.train=x"])
    seen, always = seen_shares(config, Tally(aspect=Counter({round(100 * size[0] / size[1]): 1})))
    [share] = seen
    assert share / 100 == pytest.approx(largest, abs=0.03)
    assert always == (len(crops) == 1)


def test_hashes_beyond_the_bound_give_estimates_and_whole_groups():
    generator = np.random.default_rng(0)
    things = generator.integers(0, 3000, 20_000)
    exact, bounded = Repeats(most=10_000), Repeats(most=500)
    for part in range(0, 20_000, 1000):
        for repeats in (exact, bounded):
            hashes = Hashes()
            for row, thing in enumerate(things[part : part + 1000]):
                hashes.add(str(thing).encode(), row)
            repeats.add(hashes, part)
    counts = Counter(things.tolist())
    found, about = exact.found(5), bounded.found(5)
    assert (found.of, found.distinct, found.extra) == (1, len(counts), 20_000 - len(counts))
    assert [group.count for group in found.most] == [count for _, count in counts.most_common(5)]
    assert things[found.most[0].first] == things[found.most[0].last]
    assert bounded.table.shape[1] <= 500
    assert about.of == 8
    assert about.distinct == pytest.approx(len(counts), rel=0.15)
    assert about.extra == pytest.approx(found.extra, rel=0.15)
    for group in about.most:
        assert group.count == counts[int(things[group.first])]


def test_percentiles_and_bins():
    values = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    counts = Counter(values)
    for share in (0.01, 0.05, 0.25, 0.5, 0.95):
        assert percentile(counts, share) == sorted(values)[max(int(np.ceil(share * 10)) - 1, 0)]
    assert summary(counts) == {
        "min": 1, "p1": 1, "p5": 1, "p25": 2, "p50": 3, "p75": 5, "p95": 9, "p99": 9, "max": 9, "mean": 3.9
    }  # fmt: skip
    assert summary(Counter()) == {}
    assert binned(counts, (1, 2, 4, 6, 100)) == {"1": 2, "2 to 3": 3, "4 to 5": 3, "6 to 99": 2}


def test_the_command(odd, tmp_path):
    page = tmp_path / "stats.html"
    arguments = ["data", "stats", str(odd), "--model", MODEL, "--jobs", "1", "--output", str(page)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    for text in (
        "15 samples, 11 that training uses (73.3%)",
        "left out: 1 no caption (6.7%), first row 13 (0013): has jpg, json; looked for txt",
        "13 captions, 1.18 a picture; 15.4% are not the only one of their kind (1 extra)",
        "ViT-Ti-16-64 (64 pixels, 32 tokens): 27.3% of the pictures are enlarged, 36.4% lose a third or more, "
        "15.4% of the captions lose their end",
    ):
        assert text in done.output, done.output
    numbers = json.loads((tmp_path / "stats.json").read_text())
    assert numbers["training"] == {
        "enlarged": 3, "enlarged_twice_or_more": 1, "shrunk": 8, "a_third_or_more_never_seen": 4,
        "always_the_same_part": 5, "captions_cut": 2, "model": MODEL, "side": 64, "context_length": 32,
    }  # fmt: skip
    assert numbers["dropped"]["no image"] == 1
    assert numbers["repeated_captions"]["extra"] == 1
    text = page.read_text()
    words = Page(text).text
    assert "fit into 32 tokens 84.6% 11 lose their end 15.4% 2" in words
    assert "a disc on a gradient 15.4% 2" in words
    assert "2 times rows 0 to 1 a disc on a gradient" in words
    assert len(re.findall("<img ", text)) == 1


def test_nothing_that_can_be_used_is_no_crash(tmp_path):
    def lose_caption(i: int, files: dict[str, bytes]) -> None:
        del files["txt"]

    folder = make_shards(tmp_path / "shards", (3,), lose_caption)
    arguments = ["data", "stats", str(folder), "--no-tokens", "--jobs", "1"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "3 samples, 0 that training uses (0%)" in done.output
    assert "no caption" in (folder / "stats.html").read_text()


def test_a_broken_shard_is_told_and_the_rest_is_counted(tmp_path):
    folder = make_shards(tmp_path / "shards", (5, 5))
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(whole[:3000])
    done = CliRunner().invoke(cli.app, ["data", "stats", str(folder), "--no-tokens", "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert "00000.tar: truncated" in done.output
    assert "6 samples, 6 that training uses" in done.output


def test_a_model_that_does_not_exist_is_told_before_the_work(odd, tmp_path):
    arguments = ["data", "stats", str(odd), "--model", "ViT-B-23", "--output", str(tmp_path / "s.html")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "is no architecture of open_clip or vlcl; did you mean" in done.output
