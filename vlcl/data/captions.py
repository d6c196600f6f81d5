"""The captions of a sample, and which of them training takes.

`captions_from` is the one reading of captions: of training, validation, `vlcl bias`, `vlcl export`, `vlcl data pack`
and `verify`, `vlcl eval retrieval`. No torch.

A caption is UTF-8 text, with or without a byte order mark; outer white space does not count, and what is nothing else
is no caption. Captions are the lines of the file that `Keys.text` finds (with `lines=False`: the file), or the text or
texts under a key of the sample's .json, an object. Several names in `Keys.text` or `Keys.json_text` are several places,
all of which are read; in each the first alternative that is there counts, in a .json the first with a text. What cannot
be used is left out, and the sample with it where nothing else is left.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from vlcl.data.decode import (
    BAD_JSON,
    CAPTION_NOT_TEXT,
    CAPTION_NOT_UTF8,
    CAPTION_TOO_LONG,
    DEFAULT_KEYS,
    DEFAULT_LIMITS,
    EMPTY_CAPTION,
    JSON_TOO_DEEP,
    JSON_TOO_LARGE,
    NO_CAPTION,
    TOO_MANY_CAPTIONS,
    BadSample,
    Keys,
    Limits,
    content_of,
    listed,
    suffixes,
)

How = Literal["sample", "first", "all"]

_LINE = re.compile("[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")  # what str.splitlines gives, but for the empty ones
_STRING, _BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL), re.compile(rb"[][{}]")
_WORD = re.compile(r"\S+")
_SENTENCE = re.compile(r"[^\s.!?。！？][^.!?。！？]*(?:[.!?](?=\w)[^.!?。！？]*)*[.!?。！？]*[\"'”’)」』]*")
_KINDS = {dict: "an object", list: "a list", bool: "true or false"}


@dataclass(frozen=True)
class Captions:
    """Of a sample, at least one. counts: how many of `texts` each of `Keys.places` gave, in this order. left_out: what
    is wrong with others."""

    texts: tuple[str, ...]
    counts: tuple[int, ...]
    left_out: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which caption of a sample training takes: a function of (seed, epoch, row) and nothing else, whoever reads the
    sample and when.

    how: `sample`, a place by `weights` (None: all alike) among those that have a caption, and one of its captions, all
    alike; `first`; or `all`, each in turn, the next one each epoch, beginning anywhere.
    """

    how: How = "sample"
    weights: tuple[float, ...] | None = None
    seed: int = 0

    def __call__(self, counts: Sequence[int], epoch: int, row: int) -> int:
        """The number of the caption, of `counts` in each place."""
        total = sum(counts)
        if total == 1 or self.how == "first":
            return 0
        if self.how == "all":
            return (int(_uniform(self.seed, row) * total) + epoch) % total
        weights = [weight if count else 0.0 for count, weight in zip(counts, self.weights or [1.0] * len(counts))]
        point, before = _uniform(self.seed, epoch, row) * sum(weights), 0
        for count, weight in zip(counts, weights):
            if point < weight:
                return before + min(int(point / weight * count), count - 1)
            point, before = point - weight, before + count
        return total - 1  # rounding: the point was at the very end


@dataclass(frozen=True)
class LongCaptions:
    """What training keeps of a caption that has more tokens than the model takes, drawn by (seed, epoch, row) alone.

    how: `window`, from some word on as much as there is room for; `sentence`, from some sentence on as many whole ones
    as there is room for, and one at least. None begins later than the first one from which all the rest has room. Words
    are parted by blanks; a text without any is cut anywhere.
    """

    how: Literal["window", "sentence"]
    seed: int = 0

    def __call__(self, text: str, is_cut: Callable[[str], bool], epoch: int, row: int) -> str:
        """Of a text that is cut. is_cut: whether the tokenizer leaves out some of a text."""
        starts = [match.start() for match in (_SENTENCE if self.how == "sentence" else _WORD).finditer(text)]
        if len(starts) < 2 and self.how == "window":
            starts = list(range(len(text)))
        if len(starts) < 2:
            return text
        last = 1 + bisect_left(range(1, len(starts) - 1), True, key=lambda n: not is_cut(text[starts[n] :]))
        first = int(_uniform(self.seed, epoch, row, 1) * (last + 1))
        if self.how == "window":
            return text[starts[first] :]
        ends = [*starts[first + 1 :], len(text)]
        number = 1 + bisect_left(range(1, len(ends)), True, key=lambda n: is_cut(text[starts[first] : ends[n]]))
        return text[starts[first] : ends[number - 1]].rstrip()


def _uniform(*key: int) -> float:
    """A number of 0 .. 1, without 1, that depends on `key` alone."""
    data = " ".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=6, person=b"caption").digest(), "little") / (1 << 48)


def captions_from(files: Mapping[str, bytes], keys: Keys = DEFAULT_KEYS, limits: Limits = DEFAULT_LIMITS) -> Captions:
    """The captions of a sample. Raises BadSample where it has none that can be used, or too many."""
    problems: list[BadSample] = []
    places = _in_json(files, keys, limits) if keys.json_text else _in_files(files, keys, limits, problems)
    found = [list(_usable(values, limits, problems)) for values in places]
    texts = tuple(text for place in found for text in place)
    if len(texts) > limits.max_captions:
        raise BadSample(TOO_MANY_CAPTIONS, f"{len(texts):,} > {limits.max_captions:,}")
    if not texts:
        raise problems[0] if problems else BadSample(EMPTY_CAPTION)
    return Captions(texts, tuple(map(len, found)), tuple(problems))


def _usable(values: Sequence[Any], limits: Limits, problems: list[BadSample]) -> Iterator[str]:
    """The captions among the texts; what is wrong with others goes to `problems`, as do the BadSamples."""
    for value in values:
        if isinstance(value, BadSample):
            problems.append(value)
        elif text := value.strip():
            if len(text) > limits.max_caption:
                problems.append(BadSample(CAPTION_TOO_LONG, f"{len(text):,} > {limits.max_caption:,} characters"))
            elif not _is_utf8(text):
                problems.append(BadSample(CAPTION_NOT_UTF8, f"half a surrogate pair in {text[:40]!r}"))
            else:
                yield text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_files(
    files: Mapping[str, bytes], keys: Keys, limits: Limits, problems: list[BadSample]
) -> Iterator[Sequence[str]]:
    """The texts of each place. Raises BadSample where there is no file at all."""
    chosen = [next((suffix for suffix in suffixes(place) if suffix in files), None) for place in keys.places]
    if not any(chosen):
        raise BadSample(NO_CAPTION, f"has {listed(files)}; looked for {', '.join(keys.places)}")
    for suffix in chosen:
        texts: list[str] = []
        if suffix is not None:
            try:
                text = content_of(files, suffix).decode("utf-8-sig")
                lines = islice((line[0] for line in _LINE.finditer(text)), limits.max_captions + 1)
                texts = list(lines) if keys.lines else [text]
            except UnicodeDecodeError as error:
                problems.append(BadSample(CAPTION_NOT_UTF8, str(error)))
            except BadSample as bad:
                problems.append(bad)
        yield texts


def _in_json(files: Mapping[str, bytes], keys: Keys, limits: Limits) -> list[list[Any]]:
    """What each place holds: texts, and a BadSample for what is none. Raises BadSample where no key is there."""
    if "json" not in files:
        raise BadSample(NO_CAPTION, f"has {listed(files)}; looked for json")
    content = _parse(content_of(files, "json"), limits)
    found = [_values(content, place) for place in keys.places]
    if not any(found):
        raise BadSample(NO_CAPTION, f"json has {listed(content)}; looked for {', '.join(keys.places)}")
    return found


def _values(content: Mapping[str, Any], place: str) -> list[Any]:
    """What the first key with a text holds; of keys without one, the first that is there."""
    there = {name: _as_list(value) for name in place.split(";") if (value := content.get(name)) is not None}
    if not there:
        return []
    name = next((name for name, values in there.items() if _has_text(values)), next(iter(there)))
    texts = [value for value in there[name] if isinstance(value, str)]
    strange = next((value for value in there[name] if not isinstance(value, str | None)), None)
    if strange is None:
        return texts or [""]
    in_list = "a list with " if isinstance(content[name], list) else ""
    good = listed(key for key, value in content.items() if _has_text(_as_list(value)))
    detail = (
        f"{name} is {in_list}{_KINDS.get(type(strange), 'a number')}; a text or a list of texts is under: {good}. "
        "Type data.json_text_key=KEY, of other commands --json-text-key KEY"
    )
    return [*texts, BadSample(CAPTION_NOT_TEXT, detail)]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _has_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) and value.strip() for value in values)


def _parse(data: bytes, limits: Limits) -> dict[str, Any]:
    """A .json, which must be an object. Raises BadSample."""
    if len(data) > limits.max_json:
        raise BadSample(JSON_TOO_LARGE, f"{len(data):,} > {limits.max_json:,} bytes")
    if _depth_of_json(data, limits.max_json_depth) > limits.max_json_depth:
        raise BadSample(JSON_TOO_DEEP, f"over {limits.max_json_depth} lists and objects within each other")
    try:
        content = json.loads(data)
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadSample(BAD_JSON, str(error)) from None
    except RecursionError:  # in UTF-16, which the depth is not read of
        raise BadSample(JSON_TOO_DEEP) from None
    if not isinstance(content, dict):
        raise BadSample(BAD_JSON, f"an object is needed, not {type(content).__name__}")
    return content


def _depth_of_json(data: bytes, most: int) -> int:
    """Lists and objects within each other; 0 where there are not even `most` of them."""
    if data.count(b"[") + data.count(b"{") <= most:
        return 0
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
