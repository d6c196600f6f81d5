"""The two towers as ONNX files: pixels or tokens to unit features, any number of them at a time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlcl.export.check import compare_towers
from vlcl.export.format import Format, Job
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


class Onnx(Format):
    """Both towers in float32, of the weights before any rounding."""

    name = "ONNX Runtime"
    files = frozenset({*FILES.values(), *(f"{file}.data" for file in FILES.values())})
    card_place = 4
    tag = "onnx"
    option = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    converted = True
    half_note = "ONNX is of the full weights"
    subfolder = "onnx"

    def write(self, job: Job) -> None:
        (job.folder / "onnx").mkdir()
        for tower, inputs in (("image", job.full.pixels_BCHW), ("text", job.full.tokens_TL)):
            example = inputs[:1].expand(2, *inputs.shape[1:])  # one alone would be taken for a fixed size
            _export(_Tower(job.full.encoder, tower).eval(), example, job.folder / FILES[tower], NAMES[tower])

    def check(self, job: Job) -> None:
        towers = {tower: _runner(job.folder / file) for tower, file in FILES.items()}
        compare_towers(self.name, towers, job.full, job.found)

    def usage(self, name: str, job: Job) -> list[str]:
        files = [f'"{name}/{file}"' for file in FILES.values()]
        if "/" in name:
            files = [f'hf_hub_download("{name}", "{file}")' for file in FILES.values()]
        fetch = "from huggingface_hub import hf_hub_download\n" if "/" in name else ""
        how = (
            "With ONNX Runtime (`onnx/*.onnx`, float32, any batch size; vectors of length 1), here with open_clip's\n"
            "preprocessing from above:"
        )
        return [how, f"""```python
import onnxruntime
{fetch}
encode_image = onnxruntime.InferenceSession({files[0]})
encode_text = onnxruntime.InferenceSession({files[1]})
{job.open_picture}
pixels = preprocess(picture)[None].numpy()
[image] = encode_image.run(None, {{"pixel_values": pixels}})
[texts] = encode_text.run(None, {{"input_ids": tokenizer(["a photo of a cat", "a photo of a dog"]).numpy()}})
print(image @ texts.T)
```"""]  # fmt: skip


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
def _quiet() -> Iterator[None]:
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
