"""The benchmark's class names and prompt templates, and the match of a data folder's labels with them by name.

Where the lists of the package clip-benchmark are the benchmark's, data/*.json says which one to read (with the start of
its SHA-256, so that another version of that package cannot change scores unseen); what differs is written out there.
Misuse: a label is an index into the names of its own data folder. The benchmark's order is its own (CIFAR-100 is not
alphabetical), so map labels with `match_labels` before they meet `class_names`.
"""

import difflib
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata, resources
from typing import Any

from vlcl.errors import UserError

OTHER_TEMPLATES = ["a photo of a {}"]  # what the benchmark takes for a data set that it does not know
FILES = {"names": "en_classnames.json", "templates": "en_zeroshot_classification_templates.json"}  # of clip-benchmark
SHOWN = 5  # names on each side of a message
PAIRED = 8  # spellings that differ, at most, to be shown each with its nearest


def class_names(benchmark_name: str) -> list[str] | None:
    """Index = the benchmark's label. None for a data set that is not the benchmark's: its labels file has the names.

    Raises UserError if clip-benchmark is not installed, or its list is another one.
    """
    return _load("class_names.json", "names", benchmark_name)


def templates(benchmark_name: str) -> list[str]:
    """Prompt templates with the place of the class name as `{}`. Raises UserError as `class_names` does."""
    found = _load("templates.json", "templates", benchmark_name)
    return list(OTHER_TEMPLATES) if found is None else found


def _load(file: str, what: str, name: str) -> list[str] | None:
    entry = _package_data(file).get(name)
    if entry is None:
        return None
    if what in entry:
        return list(entry[what])
    found = [text.replace("{c}", "{}") for text in _clip_benchmark(FILES[what]).get(entry["clip_benchmark"], [])]
    if "swap" in entry and len(found) > max(entry["swap"]):
        i, j = entry["swap"]
        found[i], found[j] = found[j], found[i]
    if hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] != entry["sha256"]:
        raise UserError(
            f"the {what} of {entry['clip_benchmark']!r} in clip-benchmark {metadata.version('clip-benchmark')} are not "
            f"the benchmark's for {name}; type: pip install 'clip-benchmark==1.6.2'"
        )
    return found


@cache
def _package_data(file: str) -> dict[str, dict[str, Any]]:
    return json.loads((resources.files("vlcl_eval.datasets") / file).read_text(encoding="utf-8"))


@cache
def _clip_benchmark(file: str) -> dict[str, list[str]]:
    try:
        return json.loads((resources.files("clip_benchmark") / "datasets" / file).read_text(encoding="utf-8"))
    except (ImportError, OSError):
        raise UserError("class names and templates need the extra eval; type: pip install 'vlcl[eval]'") from None


def match_labels(found: Sequence[str], expected: Sequence[str], where: str, file: str | None = None) -> list[int]:
    """For each label of a data folder the index of the same name in `expected`.

    `found`: the names of `where`, index = label; they stand in `file` (None: that is `where`; "": they are
    folders). Case, punctuation, underscores and spaces do not count, unless they alone tell two names apart. The
    numbers 0 to C-1 in order (also as 00, 01) are no names: they stay in place. Raises UserError if the numbers of
    names differ or a name has no certain partner.
    """
    if len(found) != len(expected):
        raise UserError(
            f"{where}: the number of class names is {len(found)}, in the benchmark {len(expected)}; give the labels "
            "file of this data set, one name a line"
        )
    if _are_numbers(found):
        return list(range(len(found)))
    for spelling in (str, _fold, _words, _letters):  # the first that finds all is the least daring
        if (places := _places(found, expected, spelling)) is not None:
            return places
    raise UserError(f"{where}: {_difference(found, expected, where if file is None else file)}")


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdecimal() for name in names) and [int(name) for name in names] == list(range(len(names)))


def _places(found: Sequence[str], expected: Sequence[str], spelling: Callable[[str], str]) -> list[int] | None:
    """The match under a spelling; None where it leaves a name without partner or in doubt."""
    theirs, ours = [spelling(name) for name in found], [spelling(name) for name in expected]
    if len(set(theirs)) < len(set(found)) or len(set(ours)) < len(set(expected)):
        return None  # this spelling merges names that differ
    if theirs == ours:
        return list(range(len(ours)))  # also where a name stands twice, as in ImageNet
    place = {name: index for index, name in enumerate(ours)}
    if len(place) < len(ours) or set(theirs) != set(place):
        return None
    return [place[name] for name in theirs]


def _fold(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _words(name: str) -> str:
    return " ".join(re.sub(r"[\W_]", " ", _fold(name)).split())


def _letters(name: str) -> str:
    return _words(name).replace(" ", "")


def _difference(found: Sequence[str], expected: Sequence[str], file: str) -> str:
    """What keeps the names from matching, and the ways out."""
    theirs, ours = [_words(name) for name in found], [_words(name) for name in expected]
    known, there = set(ours), set(theirs)
    strays = [name for name, words in zip(found, theirs) if words not in known]
    missing = [name for name, words in zip(expected, ours) if words not in there]
    twice = [words for words, times in (Counter(theirs) | Counter(ours)).items() if times > 1]
    problems = []
    if strays and len(strays) == len(missing) <= PAIRED and len(strays) < len(found):
        pairs = ", ".join(f"{stray!r} (nearest: {name!r})" for stray, name in _nearest(strays, missing))
        problems.append(f"{len(strays)} of its {len(found)} class names are not the benchmark's: {pairs}")
    elif strays or missing:
        problems.append(f"not in the benchmark: {_some(strays)}; only in the benchmark: {_some(missing)}")
    if twice:
        problems.append(f"more than once, if case and punctuation do not count: {_some(twice)}")
    moved = sum(a != b for a, b in zip(theirs, ours) if a in known)
    if moved:
        problems.append(f"{moved} of the names that do match stand at another place than in the benchmark")
    elif len(strays) < len(found):
        problems.append("all others stand at the benchmark's place")
    return (
        f"{'; '.join(problems)}. "
        + (
            f"Correct the names in {file}"
            if file
            else "Rename the folders, or number them and write the names, a line "
            "each, into labels.txt beside train and test"
        )
        + ", or --labels by-position takes their order as the benchmark's, as the ELEVATER toolkit does"
    )


def _nearest(strays: Sequence[str], missing: Sequence[str]) -> list[tuple[str, str]]:
    """Each stray with a missing name of its own, the most alike taken first."""
    alike = sorted(
        ((difflib.SequenceMatcher(None, _words(a), _words(b)).ratio(), a, b) for a in strays for b in missing),
        key=lambda pair: -pair[0],
    )
    pairs: dict[str, str] = {}
    for _, stray, name in alike:
        if stray not in pairs and name not in pairs.values():
            pairs[stray] = name
    return [(stray, pairs[stray]) for stray in dict.fromkeys(strays)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more if names else "none"
