"""Stages of a user's own in the training stream: a function that takes an iterator of samples and yields samples, as
webdataset's do. `data.stages` names them, `TrainStream.compose` takes them. Importing this needs no torch.

A sample is what webdataset's `tarfile_to_samples` gives: a dict of its files' contents by suffix (bytes; empty where a
file is larger than `data.max_bytes`), `__key__` and `__url__`; and its `__row__` and `__epoch__`. A stage gives it on,
changed or not, or drops it, before it takes the next one: so a batch knows which samples it has cost, and a run goes on
with the same ones. Files may be given on decoded, as `webdataset.decode("pil")` does: a picture, a text, an object.
"""

from __future__ import annotations

import difflib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from vlcl.data.decode import CAPTION_NOT_TEXT
from vlcl.data.shard import RawSample
from vlcl.errors import UserError, first_line

Sample = dict[str, Any]
StageFunction = Callable[[Iterator[Sample]], Iterable[Sample]]
DROPPED = "dropped by "  # and the name of a stage: the reason for which a sample was left out


@dataclass
class Filling:
    """What a stream gives to a batch, and what that has cost so far; the stages of a stream share it."""

    stream: int
    size: int
    most_skipped: int
    start: int
    consumed: int  # samples of the stream, by this epoch so far; `start` at first
    kept: int = 0
    left_out: int = 0
    skipped: dict[int, Counter[str]] = field(default_factory=dict)  # by the place in which another one is taken
    full: bool = False

    def skip(self, reason: str) -> None:
        """Count a sample that is left out. Raises UserError where nearly all are."""
        self.skipped.setdefault(self.kept, Counter())[reason] += 1
        self.left_out += 1
        if self.left_out > self.most_skipped:
            reasons = sum(self.skipped.values(), Counter())
            raise UserError(bad_share_message(reasons, self.consumed - self.start, None))


# train.seed, the epoch, the row, and how often the epoch has used its stream up before: chance depends on these alone.
Key = tuple[int, int, int, int]
# A sample between two stages, with the batch that it is for. A plain tuple: there are many.
Item = tuple[Filling, Key, Any]


@dataclass(frozen=True)
class Stage:
    """A user's stage: held to its rules, what it drops counted by its name. Random numbers that it draws from `random`
    and torch depend on (seed, epoch, row) alone."""

    name: str
    function: StageFunction

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        from vlcl.data.preprocess import seed_generators  # torch

        held: Item | None = None  # taken, and not given back
        last = -1

        def samples() -> Iterator[Sample]:
            nonlocal held, last
            for item in items:
                if held is not None:
                    held[0].skip(DROPPED + self.name)
                held, key = item, item[1]
                last = key[2]
                seed_generators(*key, self.name)
                yield _as_dict(item)

        given = self._run(samples())
        while True:
            try:
                sample = next(given)
            except UserError:
                raise
            except StopIteration:
                told = f"data.stages: {self.name} ended after row {last}; a stage goes on as long as samples come"
                raise UserError(told) from None
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise UserError(
                    f"data.stages: {self.name} failed at row {last}: {type(error).__name__}: {first_line(error)} "
                    f"({place.filename}, line {place.lineno})"
                ) from error
            self._check(sample, held, last)
            assert held is not None
            (filling, key, _), held = held, None
            yield filling, key, _as_raw(sample)

    def _run(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        run: Any = getattr(self.function, "run", self.function)  # webdataset's larger stages are objects with `run`
        return iter(run(samples))

    def _check(self, sample: Any, held: Item | None, last: int) -> None:
        """Raise UserError where a stage gives what it may not."""
        rule = "A stage gives each sample on, changed or not, or drops it, before it takes the next one"
        if not isinstance(sample, dict):
            raise UserError(
                f"data.stages: {self.name} gave a {type(sample).__name__}, and a sample is a dict. {rule}; batches are "
                "made later (train.batch_size)"
            )
        row = sample.get("__row__")
        if held is None:
            raise UserError(
                f"data.stages: {self.name} gave more samples than it took: a second one, of row {row}, after "
                f"row {last}. {rule}: a row is one pair"
            )
        if row != last or isinstance(row, bool):
            raise UserError(
                f"data.stages: {self.name} took row {last} and gave row {row}. {rule}, and leaves `__row__` as it is; "
                "to shuffle is for data.shuffle"
            )


def _as_dict(item: Item) -> Sample:
    _, (_, epoch, row, _), sample = item
    return {"__key__": sample.key, "__url__": sample.url, "__row__": row, "__epoch__": epoch, **sample.files}


def _as_raw(sample: Sample) -> RawSample:
    files = {name: _content(name, value) for name, value in sample.items() if not name.startswith("__")}
    return RawSample(str(sample.get("__key__")), files, str(sample.get("__url__")))


def _content(name: str, value: Any) -> Any:
    """Texts and objects as they lie in a shard; pictures, and what else there is, as they are."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return json.dumps(value).encode() if name == "json" and isinstance(value, dict | list) else value


def as_stage(function: StageFunction | Stage) -> Stage:
    """A function, or one of webdataset's stages, with a name to tell it by."""
    if isinstance(function, Stage):
        return function
    inner = getattr(function, "f", function)  # of webdataset.map(...) and its like
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return Stage(f"{getattr(inner, '__module__', '?')}:{name}", function)


def load_stages(names: Sequence[str]) -> list[Stage]:
    """The functions called `module:function`: this imports their modules, so the names must be the user's own word, and
    not a file's that came with a run. Raises UserError."""
    return [Stage(name, _load(name)) for name in names]


def _load(name: str) -> Any:
    module_name, _, path = name.partition(":")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"data.stages: {module_name} cannot be imported: {error}") from None
        here = Path(*module_name.split(".")).with_suffix(".py").exists()
        folder = "." if here else "FOLDER"
        raise UserError(
            f"data.stages: there is no module {error.name!r} for {name!r}"
            + (", but a file of that name here" if here else "")
            + f". Install it, or put the folder that it lies in on Python's path: PYTHONPATH={folder} vlcl train ..."
        ) from None
    except Exception as error:
        raise UserError(
            f"data.stages: {module_name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    for part in path.split("."):
        there = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, there, n=1)
            hint = f"did you mean {module_name}:{near[0]}?" if near else f"it has {', '.join(there[:8]) or 'none'}"
            raise UserError(f"data.stages: {module_name} has no function {path!r}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"data.stages: {name} is no function, but {type(found).__name__}")
    return found


def bad_share_message(skipped: Mapping[str, int], tried: int, limit: float | None) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common())
    bound = f" (data.max_bad_share={limit:g})" if limit is not None else ""
    if all(reason.startswith(DROPPED) for reason in skipped):
        return f"{sum(skipped.values())} of {tried} samples are left out: {reasons}. Look at what data.stages drops"
    hint = (
        " Where the caption is not text, data.json_text_key names numbers or objects; verify's table says which keys "
        "of the .json hold texts."
    ) * (CAPTION_NOT_TEXT in skipped)
    return (
        f"{sum(skipped.values())} of {tried} samples are bad{bound}: {reasons}. See which with "
        "`vlcl data verify SHARDS`; check data.image_key, data.text_key and data.json_text_key; or raise "
        f"data.max_bad_share.{hint}"
    )
