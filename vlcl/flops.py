"""How much arithmetic a training pair costs, by torch's FLOP counter, and what share of a GPU's peak a run reaches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vlcl.metrics import PER_DEVICE
from vlcl.model import DualEncoder

# Dense matrix products in bf16 (V100: fp16), 1e12 FLOP/s, of NVIDIA's data sheets. The first that fits is taken.
PEAKS = {
    r"B200": 2250, r"H100 PCIe": 756, r"H100 NVL": 835, r"G?H[128]00": 989, r"A[18]00": 312, r"L40S": 362, r"L40": 181,
    r"L4": 121, r"V100": 125,
}  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """pair: FLOPs of a training pair, 0 where they are not known. peak: FLOP/s of a device; None where not known."""

    pair: float = 0.0
    peak: float | None = None

    def speeds(self, values: Mapping[str, float]) -> dict[str, float]:
        """What a log line has of it, from its samples a second."""
        reached = self.pair * values[PER_DEVICE.name]
        found = {"speed/tflops_per_device": reached / 1e12} if self.pair else {}
        return found | ({"speed/mfu": reached / self.peak} if self.pair and self.peak else {})


def arithmetic_of(
    encoder: DualEncoder, config: Mapping[str, Any], device: torch.device, precision: str, checkpointed: bool,
    kept: bool = False,
) -> Arithmetic:  # fmt: skip
    """Of training on a GPU, in an accelerate precision; on a CPU, whose peak says little, nothing is counted."""
    if device.type != "cuda" or not encoder.has_text:
        return Arithmetic()
    peak = peak_of(torch.cuda.get_device_name(device)) if precision in ("bf16", "fp16") else None
    return Arithmetic(flops_of_pair(encoder, config, checkpointed, kept) or 0.0, peak)


def peak_of(name: str) -> float | None:
    """FLOP/s in bf16 of the GPU that torch calls by this name."""
    return next((peak * 1e12 for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}\b", name)), None)


def flops_of_pair(
    encoder: DualEncoder, config: Mapping[str, Any], checkpointed: bool = False, kept: bool = False
) -> float | None:
    """FLOPs of a pair's way through the towers and back, 2 a multiplication with its addition, without those of the
    loss and what is computed twice to save memory. On the meta device: it takes no memory and leaves no trace.

    encoder: not yet compiled or sharded. config: open_clip's, of the model. checkpointed: whether its blocks are
    computed twice, which is put back. kept: whether what the frozen part of the image tower gives is at hand
    (vlcl/frozen.py). None where it cannot be computed so.
    """
    size, length = config["preprocess_cfg"]["size"], config["model_cfg"]["text_cfg"].get("context_length", 77)
    height, width = (size, size) if isinstance(size, int) else size
    meta = {name: x.detach().to("meta").requires_grad_(x.requires_grad) for name, x in encoder.named_parameters()}
    meta |= {name: x.to("meta") for name, x in encoder.named_buffers()}
    images = torch.empty(2, 3, height, width, device="meta")
    if kept and (features := _frozen(encoder, height, width)) is not None:
        images = torch.empty_like(features, device="meta")
    tokens = torch.zeros(2, length, dtype=torch.long, device="meta")
    if checkpointed:
        encoder.clip.set_grad_checkpointing(False)
    try:
        with FlopCounterMode(display=False) as counter:
            features = functional_call(encoder, meta, (images, tokens))
            total = features.image_BD.sum() + features.text_BD.sum()
            if total.requires_grad:
                total.backward()
    except Exception:  # a tower that the meta device does not take, of whatever library: no reason to stop a run
        return None
    finally:
        if checkpointed:
            encoder.clip.set_grad_checkpointing()
    return counter.get_total_flops() / len(images)


@torch.no_grad()
def _frozen(encoder: DualEncoder, height: int, width: int) -> torch.Tensor | None:
    return encoder.frozen_image(torch.zeros(2, 3, height, width))
