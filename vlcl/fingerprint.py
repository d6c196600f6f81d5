"""What makes two models the same: weights, architecture, tokenizer and preprocessing in 16 hex digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from vlcl.model import Built

# Two tokenizers that agree on these are taken for the same.
PROBES = ("a photo of a cat.", 'The quick brown fox: jumps, over "the" lazy dog!', " ".join(map(str, range(10))))


def fingerprint(model: nn.Module, *about: object) -> str:
    """Over the weights and `about`: all else that the features depend on."""
    digest = hashlib.sha256(repr(about).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tokens_of(tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> list[tuple[str, list[list[int]]]]:
    """What a tokenizer makes of PROBES."""
    return sorted((name, x.tolist()) for name, x in tokenize(PROBES).items())


def fingerprint_of(built: Built) -> str:
    clip = built.encoder.clip
    tokens = tokens_of(lambda texts: {"text": built.tokenize(list(texts))}) if built.encoder.has_text else []
    config = json.dumps(built.config.get("views", built.config["model_cfg"]), sort_keys=True)
    return fingerprint(clip, config, tokens, PreprocessCfg(**clip.visual.preprocess_cfg))
