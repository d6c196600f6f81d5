"""Where each tensor of an open_clip model lies in transformers' model of the same shape, and the way between the two.

One table of links serves both directions: `vlcl export` reads it from left to right, `model.pretrained=FOLDER` of a
Hugging Face folder from right to left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Link:
    """The same numbers under open_clip's and under transformers' names; several names are joined along the first axis.

    `transposed`: open_clip computes x @ W where transformers has a Linear.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False

    def turned(self) -> Link:
        return Link(self.theirs, self.ours, self.transposed)


def convert(links: Iterable[Link], source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """`source` under the names on the right of `links`, each in the shape that `shapes` gives for it.

    KeyError where `source` lacks a tensor, ValueError where one does not have the numbers of its shape.
    """
    converted = {}
    for link in links:
        parts = [source[name] for name in link.ours]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if link.transposed:
            joined = joined.T
        wanted = [shapes[name] for name in link.theirs]
        if joined.numel() != sum(shape.numel() for shape in wanted) or (
            joined.ndim > 1 and joined.shape[-1] != wanted[0][-1]
        ):
            raise ValueError(
                f"{' + '.join(link.ours)} is {tuple(joined.shape)}, {' + '.join(link.theirs)} needs "
                f"{' + '.join(str(tuple(shape)) for shape in wanted)}"
            )
        sizes = [shape[0] for shape in wanted] if len(wanted) > 1 else None
        pieces = joined.split(sizes) if sizes else [joined]
        for name, shape, piece in zip(link.theirs, wanted, pieces):
            converted[name] = piece.reshape(shape).contiguous()
    return converted


def clip_vision_links(ours: str, theirs: str, layers: int) -> list[Link]:
    """The trunk of a ViT of open_clip, its projection left out. `ours`: "visual."; `theirs`: "vision_model."."""
    return [
        _same(f"{ours}class_embedding", f"{theirs}embeddings.class_embedding"),
        _same(f"{ours}conv1.weight", f"{theirs}embeddings.patch_embedding.weight"),
        _same(f"{ours}positional_embedding", f"{theirs}embeddings.position_embedding.weight"),
        *_module(f"{ours}ln_pre", f"{theirs}pre_layrnorm"),
        *_blocks(f"{ours}transformer.resblocks.", f"{theirs}encoder.layers.", layers, _open_clip_block),
        *_module(f"{ours}ln_post", f"{theirs}post_layernorm"),
    ]


def text_links(ours: str, layers: int) -> list[Link]:
    """The text transformer of open_clip, its projection left out. `ours`: "" for CLIP, "text." for CustomTextCLIP."""
    return [
        _same(f"{ours}token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        _same(f"{ours}positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *_blocks(f"{ours}transformer.resblocks.", "text_model.encoder.layers.", layers, _open_clip_block),
        *_module(f"{ours}ln_final", "text_model.final_layer_norm"),
    ]


def siglip_vision_links(theirs: str, layers: int) -> list[Link]:
    """timm's ViT with a pooling head, as SigLIP has it. `theirs`: "vision_model."."""
    ours, pool, head = "visual.trunk.", "visual.trunk.attn_pool.", f"{theirs}head."
    return [
        *_module(f"{ours}patch_embed.proj", f"{theirs}embeddings.patch_embedding"),
        _same(f"{ours}pos_embed", f"{theirs}embeddings.position_embedding.weight"),
        *_blocks(f"{ours}blocks.", f"{theirs}encoder.layers.", layers, _timm_block),
        *_module(f"{ours}norm", f"{theirs}post_layernorm"),
        _same(f"{pool}latent", f"{head}probe"),
        *(Link((f"{pool}q.{x}", f"{pool}kv.{x}"), (f"{head}attention.in_proj_{x}",)) for x in PARAMETERS),
        *_module(f"{pool}proj", f"{head}attention.out_proj"),
        *_module(f"{pool}norm", f"{head}layernorm"),
        *_module(f"{pool}mlp.fc1", f"{head}mlp.fc1"),
        *_module(f"{pool}mlp.fc2", f"{head}mlp.fc2"),
    ]


def projection(ours: str, theirs: str) -> Link:
    """open_clip's [width, D] matrix, transformers' Linear without a bias."""
    return Link((ours,), (f"{theirs}.weight",), transposed=True)


def named(names: Sequence[str]) -> list[Link]:
    """Tensors that have the same name on both sides."""
    return [_same(name, name) for name in names]


def moved(ours: str, theirs: str, names: Iterable[str]) -> list[Link]:
    """Tensors that have another prefix."""
    return [_same(ours + name, theirs + name) for name in names]


def _same(ours: str, theirs: str) -> Link:
    return Link((ours,), (theirs,))


def _module(ours: str, theirs: str) -> list[Link]:
    return [_same(f"{ours}.{x}", f"{theirs}.{x}") for x in PARAMETERS]


def _blocks(ours: str, theirs: str, layers: int, block: Callable[[str, str], list[Link]]) -> list[Link]:
    return [link for i in range(layers) for link in block(f"{ours}{i}.", f"{theirs}{i}.")]


def _open_clip_block(ours: str, theirs: str) -> list[Link]:
    return [
        *(Link((f"{ours}attn.in_proj_{x}",), _qkv(theirs, x)) for x in PARAMETERS),
        *_module(f"{ours}attn.out_proj", f"{theirs}self_attn.out_proj"),
        *_module(f"{ours}ln_1", f"{theirs}layer_norm1"),
        *_module(f"{ours}ln_2", f"{theirs}layer_norm2"),
        *_module(f"{ours}mlp.c_fc", f"{theirs}mlp.fc1"),
        *_module(f"{ours}mlp.c_proj", f"{theirs}mlp.fc2"),
    ]


def _timm_block(ours: str, theirs: str) -> list[Link]:
    return [
        *(Link((f"{ours}attn.qkv.{x}",), _qkv(theirs, x)) for x in PARAMETERS),
        *_module(f"{ours}attn.proj", f"{theirs}self_attn.out_proj"),
        *_module(f"{ours}norm1", f"{theirs}layer_norm1"),
        *_module(f"{ours}norm2", f"{theirs}layer_norm2"),
        *_module(f"{ours}mlp.fc1", f"{theirs}mlp.fc1"),
        *_module(f"{ours}mlp.fc2", f"{theirs}mlp.fc2"),
    ]


def _qkv(theirs: str, parameter: str) -> tuple[str, ...]:
    return tuple(f"{theirs}self_attn.{x}_proj.{parameter}" for x in "qkv")
