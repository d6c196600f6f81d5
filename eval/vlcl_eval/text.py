"""Class names and templates -> a classifier of unit text embeddings, and zero-shot probabilities from it.

    t_c = normalize(mean over texts of normalize(encode_text(text)))         a text for each template
    p   = softmax(100 * normalize(encode_image(x)) . t)                      100 always, whatever the model's own scale

Knowledge (ELEVATER's external files, where the user has them) adds to each text a definition or a GPT-3 sentence about
the class: WordNet or Wiktionary in DIR/external/NAME_knowledge.tsv, GPT-3 in DIR/gpt3/GPT3_NAME.tsv, both JSON inside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcl.errors import UserError
from vlcl_eval.models import EvalModel

SCALE = 100.0
SOURCES = {"wiktionary": "def_wiki", "wordnet": "def_wn", "hierarchy": "path_wn"}


@dataclass(frozen=True)
class Knowledge:
    """`source`: wiktionary, wordnet, hierarchy or None; `gpt3`: how many of the GPT-3 texts (0 to 5)."""

    folder: str
    source: str | None = None
    gpt3: int = 0

    def record(self, texts: dict[str, list[str]]) -> dict[str, Any]:
        """For results: what was used, how its words were split, and 16 hex digits over the texts themselves."""
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
        return {"source": self.source, "gpt3": self.gpt3, "words": _splitter()[1], "texts": digest}


def class_weights(
    model: EvalModel, names: Sequence[str], templates: Sequence[str], knowledge: dict[str, list[str]] | None, cut: bool
) -> Tensor:
    """[D, C], unit columns, float32. `knowledge`: what to add to the texts of a class, from `read_knowledge`."""
    groups = class_texts(names, templates, knowledge)
    text_TD = F.normalize(model.texts([text for group in groups for text in group], cut), dim=1)
    means = [part.mean(dim=0) for part in text_TD.split([len(group) for group in groups])]
    return F.normalize(torch.stack(means), dim=1).T.contiguous()


def class_texts(
    names: Sequence[str], templates: Sequence[str], knowledge: dict[str, list[str]] | None
) -> list[list[str]]:
    """The texts of each class."""
    added = [(knowledge or {}).get(name) or [""] for name in names]
    return [
        [template.replace("{}", name) + addition for addition in additions for template in templates]
        for name, additions in zip(names, added)
    ]


def cut_matters(
    model: EvalModel, names: Sequence[str], templates: Sequence[str], knowledge: dict[str, list[str]] | None
) -> bool:
    """Whether a text is too long for the model, so that losing its end token makes a difference."""
    for texts in class_texts(names, templates, knowledge):
        cut, kept = model.tokenize(texts, True), model.tokenize(texts, False)
        if any(not torch.equal(cut[key], kept[key]) for key in kept):
            return True
    return False


def zeroshot_probabilities(image_ND: Tensor, class_DC: Tensor) -> Tensor:
    """[N, C]."""
    return (SCALE * (F.normalize(image_ND, dim=1) @ class_DC)).softmax(dim=1)


def read_knowledge(knowledge: Knowledge, data_set: str, names: Sequence[str]) -> dict[str, list[str]]:
    """The additions to each class's texts. UserError where a file is missing or has no entry for a class."""
    if knowledge.source is not None and knowledge.source not in SOURCES:
        raise UserError(f"--knowledge-source {knowledge.source!r}: choose from {', '.join(SOURCES)}")
    found: dict[str, list[str | None]] = {name: [] for name in names}
    if knowledge.source:
        path = Path(knowledge.folder) / "external" / f"{data_set}_knowledge.tsv"
        for name, value in _values(path, SOURCES[knowledge.source], data_set, names).items():
            found[name].append(" ".join(value[:3]) if isinstance(value, list) else value)
    if knowledge.gpt3:
        path = Path(knowledge.folder) / "gpt3" / f"GPT3_{data_set}.tsv"
        for name, value in _values(path, "gpt3", data_set, names).items():
            if not isinstance(value, list):
                raise UserError(f"--knowledge: {path}: gpt3 of {name!r} should be a list of texts")
            found[name] += value[: knowledge.gpt3]
    split, _ = _splitter()
    # A class without a definition still gets a blank, as in the benchmark's code.
    return {
        name: [" " + " ".join(split(f" ; {name} , {text}") if text is not None else []) for text in texts]
        for name, texts in found.items()
    }


def _values(path: Path, key: str, data_set: str, names: Sequence[str]) -> dict[str, str | list[str] | None]:
    """`key` of the entry of each class."""
    try:
        entries = {entry["classname"]: entry for entry in json.loads(path.read_text("utf-8"))}
    except OSError as error:
        raise UserError(
            f"--knowledge: {path} cannot be read: {error.strerror}; leave knowledge out, or get it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--knowledge: {path} is not a JSON list of objects with a classname: {error}") from None
    if missing := [name for name in names if key not in entries.get(name, {})]:
        raise UserError(f"--knowledge: {path} has no {key} for {len(missing)} classes of {data_set}: {missing[:3]}")
    values = {name: entries[name][key] for name in names}
    for name, value in values.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts) and value is not None:
            raise UserError(f"--knowledge: {path}: {key} of {name!r} is {value!r}; it should be a text, texts or null")
    return values


def _splitter() -> tuple[Any, str]:
    """nltk's word_tokenize, which the benchmark uses, with its name; without nltk's sentence data or nltk the next
    best. The name goes into the results: about 3 % of the benchmark's texts get other tokens without nltk."""
    try:
        import nltk
    except ImportError:
        return str.split, "white space"
    try:
        nltk.word_tokenize("a b")
        return nltk.word_tokenize, "nltk"
    except LookupError:
        return nltk.NLTKWordTokenizer().tokenize, "nltk without sentence data"
