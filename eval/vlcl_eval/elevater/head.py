"""Where the heads start, and the tower without its last projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlcl.errors import UserError
from vlcl_eval.elevater.probe import HeadStart, language_head, random_head
from vlcl_eval.models import EvalModel


def head_start(init: str, class_DC: Tensor, projection: Tensor | None) -> HeadStart:
    """`class_DC` [D, C]: unit text embeddings. The head takes over a `projection` [width, D]: W' = W projection'."""
    start = language_head(class_DC) if init == "language" else random_head(*class_DC.shape, seed=0)
    if projection is None:
        return start
    return HeadStart(start.weight_CD @ projection.detach().cpu().float().T, start.bias_C)


@contextmanager
def merged(model: EvalModel, wanted: bool) -> Iterator[Tensor | None]:
    """Take the tower's last projection [width, D] away while the block runs, and yield it (None if not wanted)."""
    if not wanted:
        yield None
        return
    tower: Any = model.image.tower
    projection = getattr(tower, "proj", None)
    if not isinstance(projection, torch.nn.Parameter):
        raise UserError(f"--merge needs an open_clip ViT with a projection; {model.label} has a {type(tower).__name__}")
    tower.proj = None
    try:
        yield projection
    finally:
        tower.proj = projection
