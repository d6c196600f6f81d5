"""What an export format is: its files, when it fits a model, how it is written and checked, and what the card says.

formats.py lists them. What a new one forgot is told by tests/test_export_formats.py.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vlcl.data.decode import BACKGROUND
from vlcl.errors import UserError
from vlcl.export.check import Findings, Pairs, Reference
from vlcl.hf.forms import Form
from vlcl.model import Built


@dataclass(frozen=True)
class Job:
    """A model on its way into `folder`. `config`: open_clip's format, with no word of weights to fetch from elsewhere.

    `form`: the model's in transformers, with its `weights` there; where it has none, `reason` says why.
    `full`, `stored`: the features to compare with, of the model itself and of its weights as they are stored (`half`).
    """

    folder: Path
    built: Built
    config: dict[str, Any]
    half: bool
    form: Form | None
    reason: str | None
    weights: Mapping[str, Tensor]
    pairs: Pairs
    full: Reference
    stored: Reference
    found: Findings
    background: str = BACKGROUND
    """What transparent parts of pictures showed in training."""

    @property
    def open_picture(self) -> str:
        """Lines of a snippet that open a picture as training saw it: no library does so by itself in all versions."""
        return f"""picture = Image.open("picture.jpg").convert("RGBA")
picture = Image.alpha_composite(Image.new("RGBA", picture.size, "{self.background}"), picture).convert("RGB")"""

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.config["model_cfg"]["text_cfg"].get("context_length", 77)


class Format(ABC):
    """Files for one library. Methods that have a default here are about what most formats lack."""

    name: str
    """The library that loads the files, as checks and the card call it."""
    files: frozenset[str]
    """All that it may write, with `/`: what --overwrite may replace."""
    card_place: int
    """Its usage comes after that of formats with a smaller one; the first is the card's `library_name`."""
    tag: str | None = None
    """Of the card, where `library_name` does not say it."""
    option: str | None = None
    """The keyword of `export_model`, and flag of `vlcl export`, that asks for it; None: it is always written."""
    packages: tuple[str, ...] = ()
    """What it needs installed, of the extra `export`."""
    converted: bool = False
    """Whether its files are computed from the running model, which takes long: only after all others passed."""
    half_note: str | None = None
    """What the card says of it where --half rounded the others' weights."""
    subfolder: str | None = None
    """All its files are in there; a hub repository loses that of an earlier export."""

    def require_packages(self) -> None:
        """UserError where a package that it needs is not installed; asked before the work."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--{self.option} needs {', '.join(missing)}: pip install 'vlcl[export]'")

    def why_not(self, job: Job) -> str | None:
        """Why the model cannot be written so; None where it can."""
        return None

    def label(self, job: Job) -> str | None:
        """What the command says before it writes; None of what an option has asked for, or another format implies."""
        return None

    @abstractmethod
    def write(self, job: Job) -> None:
        """Write the files. UserError where they could not hold the model."""

    @abstractmethod
    def check(self, job: Job) -> None:
        """Load the files as the library does, and compare features (check.py), which puts the differences into
        `job.found`; UserError over the tolerance."""

    @abstractmethod
    def usage(self, name: str, job: Job) -> list[str]:
        """Paragraphs of the card, of which one is a snippet that runs as it stands. `name`: the folder, or a hub's
        REPO with "/"."""

    def remark(self, job: Job) -> str | None:
        """A line of the card's summary, about what the format lacks of the model; asked where it is not written too."""
        return None

    def note(self, found: Findings) -> str | None:
        """What the command says after the check."""
        return None

    def check_notes(self, found: Findings) -> list[str]:
        """Paragraphs of the card about the check, beside the table of differences."""
        return []


def save_weights(weights: Mapping[str, Tensor], path: Path, half: bool) -> None:
    """`weights` as safetensors, floats in float16 with `half`; UserError where that cannot hold them."""
    tensors = {}
    for name, x in weights.items():
        stored = x.detach().half() if half and x.is_floating_point() else x.detach()
        if half and not bool(stored.isfinite().all()):
            raise UserError(f"--half: {name} has values beyond float16's range; export without --half")
        tensors[name] = stored.clone().contiguous()  # safetensors refuses tensors that share memory
    save_file(tensors, path, metadata={"format": "pt"})


def asked_for(formats: Sequence[Format], options: Mapping[str, bool]) -> list[Format]:
    """Those of `formats` that are always written, and those that `options` ask for; TypeError for other options."""
    if unknown := options.keys() - {x.option for x in formats}:
        raise TypeError(f"there is no export option {', '.join(sorted(unknown))}")
    return [x for x in formats if x.option is None or options.get(x.option)]
