"""`vlcl data stats`: what is in shards, and what training would make of it, before it costs anything.

Every picture is decoded and every caption read, by training's own rules, in several processes; see tally.py for what is
counted, stats_page.py for the page.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from vlcl.config import Config
from vlcl.config.samples import keys_of, limits_of
from vlcl.errors import UserError
from vlcl.files import replace_text
from vlcl_data_prep.engine import LOCAL, EngineOption, WorkersOption, map_shards
from vlcl_data_prep.index import LimitOption, ShardsArgument
from vlcl_data_prep.results import kept_results
from vlcl_data_prep.samples import (
    ImageKeyOption,
    JsonTextKeyOption,
    Rows,
    Samples,
    SetOption,
    SplitOption,
    TextKeyOption,
    TextLinesOption,
    open_samples,
    output_path,
)
from vlcl_data_prep.tally import FORM, How, Repeated, Repeats, Tally, counted, percentile, tally_shard
from vlcl_data_prep.tokens import Inputs, Model, inputs_of, load

MOST_GROUPS = 12  # of captions and of pictures that occur most often
SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Stats:
    """Of all shards. inputs: of the model, None where none was asked for. rows: counted as they were read, which is as
    `vlcl data index` counts where no shard is broken."""

    rows: Rows
    tally: Tally
    pictures: Repeated
    captions: Repeated
    inputs: Inputs | None


def stats(
    shards: ShardsArgument,
    model: Annotated[
        str | None,
        typer.Option(help="model.name: its input size, its tokenizer. Default: the RUN's, or ViT-B-32."),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens/--no-tokens", help="Count tokens, which needs torch and takes a while.")
    ] = True,
    output: Annotated[
        str | None, typer.Option(metavar="HTML", help="Default: stats.html in the folder of the shards or the run.")
    ] = None,
    jobs: WorkersOption = None,
    engine: EngineOption = LOCAL,
    split: SplitOption = "train",
    image_key: ImageKeyOption = None,
    text_key: TextKeyOption = None,
    json_text_key: JsonTextKeyOption = None,
    text_lines: TextLinesOption = None,
    limit: LimitOption = None,
    settings: SetOption = None,
) -> None:
    """Count what is in shards and what training would make of it: a page, and a JSON file beside it.

    Sizes and shapes of pictures, formats, lengths of captions in characters
    and tokens, repeated pictures and captions, what is left out and why, and
    what the model's input does to pictures: how many are enlarged or cut, how
    many captions lose their end. In place of SHARDS: a run folder or a config.

    \b
    Examples:
      vlcl data stats shards/cc3m --model ViT-B-16
      vlcl data stats runs/cc3m --split val
    """
    more = [f"model.name={json.dumps(model)}"] if model else []
    samples = open_samples(
        shards, split, image_key=image_key, text_key=text_key, json_text_key=json_text_key, text_lines=text_lines,
        limit=limit, settings=[*(settings or []), *more],
    )  # fmt: skip
    path = output_path(output, samples, "stats.html")
    from vlcl_data_prep.stats_page import as_text, write_page

    found = stats_of(samples.config, samples.urls(), jobs, tokens, engine=engine, output=path)
    beside = os.path.splitext(path)[0] + ".json"
    replace_text(beside, json.dumps(record_of(found, samples), indent=1, ensure_ascii=False) + "\n")
    write_page(path, samples, found)
    print(f"{as_text(found, samples.config)}\npage: {path}\nnumbers: {beside}")


def stats_of(
    config: Config, urls: Sequence[str], jobs: int | None = None, tokens: bool = True, progress: bool = True,
    engine: str = LOCAL, output: str | None = None,
) -> Stats:  # fmt: skip
    """The counts of all samples in `urls`, read as `config` says. `jobs` = shards at a time (default: one a core),
    `engine`: see `map_shards`. Those of finished shards are kept beside `output` until all are there. Raises UserError
    for a model that does not exist, and where no shard has a sample."""
    model, inputs = None, None
    if tokens:
        settings = config.model
        model = Model(settings.name, settings.image_size, settings.context_length)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork below
        inputs = inputs_of(model)
        load(model)
    how = How(keys_of(config.data), limits_of(config.data), config.data.background, model)
    tally, pictures, captions, counts = Tally(), Repeats(), Repeats(), list[int]()
    with nullcontext() if output is None else kept_results(output, FORM, f"stats {how}") as kept:
        for found, of_pictures, of_captions in map_shards(
            partial(tally_shard, how=how), urls, jobs, "stats" if progress else None, engine, kept
        ):
            pictures.add(of_pictures, tally.samples)
            captions.add(of_captions, tally.samples)
            counts.append(found.samples)
            tally.add(found)
    if not tally.samples:
        raise UserError(
            f"no samples in the shards ({urls[0]} ...): files must be named KEY.SUFFIX; " + "".join(tally.broken[:1])
        )
    return Stats(Rows(urls, counts), tally, pictures.found(MOST_GROUPS), captions.found(MOST_GROUPS), inputs)


def seen_shares(config: Config, tally: Tally) -> tuple[Counter[int], int]:
    """How much of a picture training can see at once, in hundredths of its area; and how many pictures are so long that
    training always takes the same part, the middle (`RandomResizedCrop` finds no other that fits)."""
    seen: Counter[int] = Counter()
    always = 0
    ratio, scale = config.data.crop_ratio or [3 / 4, 4 / 3], config.data.crop_scale
    for hundredths, number in tally.aspect.items():
        aspect = hundredths / 100
        if config.data.augment == "none":  # the middle square, as in evaluation
            most = min(aspect, 1 / aspect) if aspect else 0.0
        else:
            most = min(1.0, ratio[1] / max(aspect, 0.01), aspect / ratio[0])
            always += number * (most < scale[0])
        seen[round(100 * most)] += number
    return seen, always


def record_of(found: Stats, samples: Samples) -> dict[str, Any]:
    """What is in the JSON file. Lengths are in characters and tokens, sides in pixels, files in KiB."""
    tally = found.tally
    record: dict[str, Any] = {
        "shards": samples.name, "samples": tally.samples, "used": tally.used, "dropped": dict(tally.dropped),
        "captions_left_out": dict(tally.left_out), "broken_shards": tally.broken,
        "first_of_each_reason": {
            reason: {"row": row, "key": key, "detail": detail} for reason, (row, key, detail) in tally.examples.items()
        },
    }  # fmt: skip
    for name in ("short", "long", "kibibytes", "captions", "characters", "tokens"):
        record[name] = summary(getattr(tally, name))
    record["aspect"] = {key: value / 100 for key, value in summary(tally.aspect).items()}
    record |= {name: dict(getattr(tally, name).most_common()) for name in ("formats", "modes", "changes")}
    for name, repeated in (("repeated_pictures", found.pictures), ("repeated_captions", found.captions)):
        groups = [{"count": x.count, "first_row": x.first, "last_row": x.last} for x in repeated.most]
        record[name] = {
            "distinct": repeated.distinct, "extra": repeated.extra, "involved": repeated.involved,
            "estimated_from_one_in": repeated.of, "most": groups,
        }  # fmt: skip
    if found.inputs:
        record["training"] = dict(training_of(found, samples.config)) | {
            "model": samples.config.model.name,
            "side": found.inputs.side,
            "context_length": found.inputs.context_length,
        }
    return record


def training_of(found: Stats, config: Config) -> Iterator[tuple[str, int]]:
    """What training would do with the pictures and captions that it uses."""
    assert found.inputs is not None
    tally, side = found.tally, found.inputs.side
    seen, always = seen_shares(config, tally)
    yield "enlarged", counted(tally.short, lambda pixels: pixels < side)
    yield "enlarged_twice_or_more", counted(tally.short, lambda pixels: 2 * pixels <= side)
    yield "shrunk", counted(tally.short, lambda pixels: pixels > side)
    yield "a_third_or_more_never_seen", counted(seen, lambda share: share <= 67)
    yield "always_the_same_part", always
    yield "captions_cut", tally.truncated


def summary(counts: Counter[int]) -> dict[str, float]:
    """Least, most, mean and percentiles."""
    if not counts:
        return {}
    total = counts.total()
    mean = sum(value * number for value, number in counts.items()) / total
    found = {f"p{round(100 * share)}": percentile(counts, share) for share in SHARES}
    return {"min": min(counts), **found, "max": max(counts), "mean": round(mean, 2)}
