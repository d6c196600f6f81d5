"""Weights of an image tower from a file of its own or of a larger model: `model.pretrained_image`."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from vlcl.errors import UserError, first_line
from vlcl.pieces import read, stored

FILES = ("model.safetensors", "open_clip_model.safetensors")
HEADS = ("proj", "head.", "fc.")  # of the target: the map to the common space, which pictures alone have none for


def load_image_weights(visual: nn.Module, path: str) -> None:
    """Copy into `visual` (open_clip's, or timm's) the tower in `path`: a run of `model.kind: views`, a step folder or
    an export of one, any folder or file in safetensors with open_clip's names. What `visual` has after the tower, a
    linear head, keeps its start. UserError where weights are missing, or are of another architecture."""
    file = _file(Path(path))
    try:
        weights = read(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.pretrained_image={path!r}: {file} cannot be read: {first_line(error)[:200]}") from None
    prefix = "visual."
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    wanted = visual.state_dict()
    if any(name.startswith("trunk.") for name in wanted) and not any(name.startswith("trunk.") for name in weights):
        weights = {f"trunk.{name}": x for name, x in weights.items()}  # open_clip's name for a tower of timm
    _check(path, wanted, weights)
    visual.load_state_dict({name: x for name, x in weights.items() if name in wanted}, strict=False)


def _file(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    for folder in (path, *sorted(path.glob("step-*"), reverse=True)):
        for place in (*(folder / name for name in FILES), stored(folder, FILES[0])):
            if place.exists():
                return place
    raise UserError(
        f"model.pretrained_image={str(path)!r}: no weights there; give a run folder, a step folder or an export of "
        f"model.kind=views, or a .safetensors file (looked for {', '.join(FILES)})"
    )


def _check(path: str, wanted: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in weights and not name.startswith(HEADS)]
    other = [
        f"{name} is {list(weights[name].shape)} there, {list(x.shape)} here"
        for name, x in wanted.items()
        if name in weights and weights[name].shape != x.shape
    ]
    if missing or other:
        what = other[0] if other else f"it has no {missing[0]}"
        raise UserError(
            f"model.pretrained_image={path!r} is of another image tower than model.name: {what} "
            f"({len(missing) + len(other)} of {len(wanted)} weights do not fit). Take the model.name of that run"
        )
