"""`vlcl models`: the architectures that `model.name` takes, their pretrained tags, sizes, and export forms.

Parameters and forms are measured on torch's meta device, without memory for weights, and kept in architectures.json:
`python -m vlcl.architectures > vlcl/architectures.json` measures all again (minutes). Those whose text tower is
described on the Hugging Face hub alone are in no table: None.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import open_clip
import torch
from torch import nn

from vlcl.errors import UserError
from vlcl.hf.forms import find_form
from vlcl.hf.towers import NoForm
from vlcl.model import model_config


@dataclass(frozen=True)
class Architecture:
    """parameters: of both towers and what is beside them. form: the class of transformers that an export is for, None
    where it is open_clip's format alone (`reason` says why)."""

    parameters: int | None
    form: str | None
    reason: str | None = None


def names(word: str | None = None) -> list[str]:
    """All, or those with `word` in them or in one of their tags. UserError with the nearest where there are none."""
    known = open_clip.list_models()
    if word is None:
        return known
    found = [name for name in known if word.lower() in " ".join([name, *tags(name)]).lower()]
    if not found:
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; vlcl models lists all"
        raise UserError(f"no architecture or tag has {word!r} in its name{hint}")
    return found


def tags(name: str) -> list[str]:
    return open_clip.list_pretrained_tags_by_model(name)


def describe(name: str) -> Architecture:
    """From the table, or measured where open_clip is newer than it."""
    return _table().get(name) or measure(name)


@cache
def _table() -> dict[str, Architecture]:
    text = (resources.files("vlcl") / "architectures.json").read_text(encoding="utf-8")
    return {name: Architecture(**row) for name, row in json.loads(text).items()}


def measure(name: str) -> Architecture:
    """Build `name` without memory for weights."""
    config = model_config(name)
    try:
        with torch.device("meta"):
            clip: Any = open_clip.create_model(name, load_weights=False, device="meta", pretrained_hf=False)
    except OSError:
        return Architecture(None, None, "its text tower is described on the Hugging Face hub")
    config["preprocess_cfg"] = clip.visual.preprocess_cfg
    count = sum(p.numel() for p in clip.parameters())
    clip.logit_scale = nn.Parameter(torch.zeros(()))  # its value is part of a form
    tokenizer: Any = open_clip.tokenizer._tokenizer  # of forms only CLIP's own asks for it
    try:
        return Architecture(count, find_form(clip, config, tokenizer).hf_class.name)
    except NoForm as reason:
        return Architecture(count, None, str(reason))


def as_table(found: Sequence[str], with_tags: bool) -> str:
    """A line an architecture, its tags below it or counted."""
    rows = [("model.name", "parameters", "pixels", "tokens", "tags", "export (transformers)")]
    for name in found:
        config, about = model_config(name)["model_cfg"], describe(name)
        side = config["vision_cfg"].get("image_size", 224)
        size = f"{about.parameters / 1e6:,.1f} M" if about.parameters else "?"
        side = side if isinstance(side, int) else side[0]
        length = config["text_cfg"].get("context_length", 77)
        form = about.form or ("?" if about.parameters is None else "open_clip's format alone")
        rows.append((name, size, str(side), str(length), str(len(tags(name))), form))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for row in rows:
        middle = "  ".join(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5]))
        lines.append(f"{row[0].ljust(widths[0])}  {middle}  {row[5]}")
        if with_tags and row is not rows[0]:
            lines += [f"    model.pretrained={tag}" for tag in tags(row[0])]
    return "\n".join(lines)


def main(word: str | None, with_tags: bool) -> None:
    """The command."""
    found = names(word)
    print(as_table(found, with_tags or word is not None))
    print(f"{len(found)} architectures; ?: the text tower is described on the Hugging Face hub" if word is None else "")


if __name__ == "__main__":
    measured = {name: asdict(measure(name)) for name in open_clip.list_models()}
    print(json.dumps(measured, indent=1))
