"""How many tokens captions have, and which are cut: as training counts them. Imports torch, when it is asked."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 4096  # longer texts count as this long


@dataclass(frozen=True)
class Model:
    """What of a model decides how samples are seen. Settings of `vlcl.config.ModelConfig`; None: the model's own."""

    name: str
    image_size: int | None = None
    context_length: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Of a model: side of its square input in pixels, context length in tokens, and its evaluation's resize mode."""

    side: int
    context_length: int
    resize_mode: str


def inputs_of(model: Model) -> Inputs:
    """Raises UserError where there is no such model."""
    from vlcl.model import model_config

    config = model_config(model.name)
    sizes = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    side = model.image_size or (min(sizes) if isinstance(sizes, list | tuple) else sizes)
    length = model.context_length or config["model_cfg"]["text_cfg"].get("context_length", 77)
    return Inputs(side, length, config.get("preprocess_cfg", {}).get("resize_mode", "shortest"))


@functools.cache
def _decoder(model: Model) -> Any:
    """Training's own; loaded before processes are forked, so that they have it."""
    from vlcl.data.reader import Decoder
    from vlcl.model import tokenizer_of

    def no_pictures(image: object) -> Any:
        raise AssertionError(image)

    return Decoder(no_pictures, tokenizer_of(model.name, model.context_length))


def load(model: Model) -> None:
    """Raises UserError where the tokenizer cannot be loaded."""
    _decoder(model)


def count_tokens(model: Model, texts: Sequence[str]) -> tuple[list[int], int]:
    """Tokens of each text, those of its start and end included, and how many of the texts training cuts
    (`data/truncated`). Tokenizers that cannot be asked for more room give no lengths: []."""
    decoder = _decoder(model)
    if not texts or decoder.padding is None:
        return [], int(decoder.tokens(texts)[1].sum()) if texts else 0
    lengths, waiting = [0] * len(texts), list(range(len(texts)))
    most = decoder.tokenize.context_length
    for room in (max(most + 1, 128), MOST_TOKENS):  # few captions need the second
        if waiting:
            tokens_TL = decoder.tokenize([texts[n] for n in waiting], context_length=room)
            for n, length in zip(waiting, _lengths(tokens_TL, decoder.padding)):
                lengths[n] = length
        waiting = [n for n in waiting if lengths[n] >= room]
    near = [text for text, length in zip(texts, lengths) if length >= most - 1]
    return lengths, int(decoder.tokens(near)[1].sum()) if near else 0


def _lengths(tokens_TL: Any, padding: int) -> list[int]:
    """[T] places of the last token that is no padding, plus one."""
    from_end = (tokens_TL.flip(1) != padding).int().argmax(dim=1)
    empty = (tokens_TL == padding).all(dim=1)
    return (tokens_TL.shape[1] - from_end).masked_fill(empty, 0).tolist()
