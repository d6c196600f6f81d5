"""The two towers as ONNX files: pixels or tokens to unit features, any number of them at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlcl.errors import UserError
from vlcl.export.check import Reference
from vlcl.model import DualEncoder

OPSET = 20
FILES = {"image": "onnx/image_encoder.onnx", "text": "onnx/text_encoder.onnx"}
NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}
_ONE_FILE = 1_800_000_000  # bytes; protobuf's limit is 2 GiB, beyond it weights lie beside the graph


class _Tower(nn.Module):
    def __init__(self, encoder: DualEncoder, tower: str) -> None:
        super().__init__()
        self.encoder, self.tower = encoder, tower

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder.image(inputs) if self.tower == "image" else self.encoder.text(inputs)


def require_packages() -> None:
    """UserError where a package that the ONNX export needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'vlcl[export]'")


def write_onnx(folder: Path, ref: Reference) -> dict[str, Callable[[Tensor], Tensor]]:
    """Write both towers under `folder`, in float32; returns them as ONNX Runtime runs them."""
    (folder / "onnx").mkdir()
    towers = {}
    for tower, inputs in (("image", ref.pixels_BCHW), ("text", ref.tokens_TL)):
        path = folder / FILES[tower]
        example = inputs[:1].expand(2, *inputs.shape[1:])  # one alone would be taken for a fixed size
        _export(_Tower(ref.encoder, tower).eval(), example, path, NAMES[tower])
        towers[tower] = _runner(path)
    return towers


def _export(tower: _Tower, example: Tensor, path: Path, names: tuple[str, str]) -> None:
    size = sum(x.numel() * x.element_size() for x in tower.parameters())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
        warnings.simplefilter("ignore")  # about what torch does inside
        torch.onnx.export(
            tower, (example,), str(path), dynamo=True, opset_version=OPSET, input_names=[names[0]],
            output_names=[names[1]], dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}},
            external_data=size > _ONE_FILE, verbose=False,
        )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _runner(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor:
        output: Any = session.run(None, {name: inputs.numpy()})[0]
        return torch.from_numpy(output)

    return run
