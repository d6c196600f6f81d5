"""Locked towers (LiT, Zhai et al., 2022): what of a model is frozen, and which part of an image tower is done before
anything that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn

from vlcl.errors import UserError, first_line


def lock_towers(name: str, clip: Any, image: bool, image_groups: int, text: bool, text_layers: int) -> None:
    """Freeze towers but for their last parts. UserError where open_clip has no parts of this architecture."""
    # CoCa's towers have locks, CoCa itself has none; CLIP's text tower is the model itself.
    tower = clip.text if hasattr(clip, "text_decoder") else None
    if image:
        with _told_what_locks(name, f"model.lock_image_unlocked_groups={image_groups}"):
            clip.visual.lock(unlocked_groups=image_groups)
        freeze_statistics(clip.visual)
    if text:
        with _told_what_locks(name, f"model.lock_text_unlocked_layers={text_layers}"), redirect_stdout(StringIO()):
            (tower.lock if tower else clip.lock_text_tower)(unlocked_layers=text_layers, freeze_layer_norm=True)


def freeze_statistics(module: nn.Module) -> None:
    """BatchNorms whose weights are frozen keep their statistics as well. By timm, which knows those of its own that
    have the activation in them: open_clip's way loses it, and with it what such a tower has learned."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if not any(p.requires_grad for p in child.parameters()):
                setattr(module, name, freeze_batch_norm_2d(child))
        else:
            freeze_statistics(child)


@contextmanager
def _told_what_locks(name: str, setting: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of open_clip, of timm, of transformers
        why = first_line(error)[:200] or type(error).__name__
        key = setting.partition("=")[0]
        raise UserError(
            f"{setting}: open_clip cannot lock a part of this tower of model.name={name!r} ({why}); leave {key} out to "
            "freeze the whole tower"
        ) from None


def before_training(clip: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """(the frozen part of the image tower, pictures -> what it gives, that -> what the tower gives), where one thing
    follows the other: the whole tower, or a trunk of timm's, which open_clip locks and leaves the head to train. None
    where they do not."""
    visual = clip.visual
    if not any(p.requires_grad for p in visual.parameters()):
        return visual, clip.encode_image, lambda x: x
    trunk, head = getattr(visual, "trunk", None), getattr(visual, "head", None)
    if trunk is None or head is None or any(p.requires_grad for p in trunk.parameters()):
        return None
    return trunk, trunk, head
