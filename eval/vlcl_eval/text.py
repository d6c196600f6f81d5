"""Class names and templates -> a classifier of unit text embeddings, and zero-shot probabilities from it.

    t_c = normalize(mean over texts of normalize(encode_text(text)))         a text for each template
    p   = softmax(100 * normalize(encode_image(x)) . t)                      100 always, whatever the model's own scale

Knowledge (ELEVATER's external files, where the user has them) adds to each text a definition or a GPT-3 sentence about
the class: WordNet or Wiktionary in DIR/external/NAME_knowledge.tsv, GPT-3 in DIR/gpt3/GPT3_NAME.tsv, both JSON inside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

    def record(self) -> dict[str, Any]:
        """For results: what was used, and how its words were split."""
        return {key: value for key, value in asdict(self).items() if key != "folder"} | {"words": _splitter()[1]}


def class_weights(
    model: EvalModel, names: Sequence[str], templates: Sequence[str], knowledge: dict[str, list[str]] | None, cut: bool
) -> Tensor:
    """[D, C], unit columns, float32. `knowledge`: what to add to the texts of a class, from `read_knowledge`."""
    texts: list[str] = []
    counts: list[int] = []
    for name in names:
        additions = (knowledge or {}).get(name) or [""]
        own = [template.replace("{}", name) + addition for addition in additions for template in templates]
        texts += own
        counts.append(len(own))
    text_TD = F.normalize(model.texts(texts, cut), dim=1)
    means = [part.mean(dim=0) for part in text_TD.split(counts)]
    return F.normalize(torch.stack(means), dim=1).T.contiguous()


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
        for name, entry in _entries(path).items():
            value = entry.get(SOURCES[knowledge.source])
            if name in found:
                found[name].append(" ".join(value[:3]) if isinstance(value, list) else value)
    if knowledge.gpt3:
        path = Path(knowledge.folder) / "gpt3" / f"GPT3_{data_set}.tsv"
        entries = _entries(path)
        if missing := [name for name in names if name not in entries]:
            raise UserError(f"{path} has no entry for {len(missing)} classes of {data_set}: {missing[:3]}")
        for name in names:
            found[name] += entries[name]["gpt3"][: knowledge.gpt3]
    split, _ = _splitter()
    # A class without a definition still gets a blank, as in the benchmark's code.
    return {
        name: [" " + " ".join(split(f" ; {name} , {text}") if text is not None else []) for text in texts]
        for name, texts in found.items()
    }


def _entries(path: Path) -> dict[str, Any]:
    try:
        return {entry["classname"]: entry for entry in json.loads(path.read_text("utf-8"))}
    except OSError as error:
        raise UserError(
            f"--knowledge: {path} cannot be read: {error.strerror}; leave knowledge out, or get it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--knowledge: {path} is not a JSON list of objects with a classname: {error}") from None


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
