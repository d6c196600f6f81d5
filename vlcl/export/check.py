"""Proof that an exported folder computes what the model computes: features to compare with, and the comparison.

Each format (format.py) loads its files as its library does and calls `compare`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlcl.errors import UserError
from vlcl.model import Built, DualEncoder

TOLERANCE = 1e-5  # of unit features
HALF_TOLERANCE = 1e-2  # what float16 weights may change of them

# Texts that tokenizers are known to disagree on, after some that they must not.
TEXTS = (
    "a photo of a cat.", "Two DOGS, running: fast!", "don't stop 24/7", "DON'T shout, IT'S late", "", "wow! " * 200,
    " ".join(["many more words than fit"] * 60),
    "salt &amp; pepper", "it’s a “test”", "\U0001f600 grinning face \U0001f1e9\U0001f1ea", "café\u0301 naïve",
    "two  spaces\tand\na new line", "ｆｕｌｌ width", "schÃ¶n", "<b>bold</b> &lt;i&gt;", "a <|endoftext|> b",
    "三匹の猫", "&#39;single&#39; &nbsp; space", "ﬁne ﬂow", "x" * 300,
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Pictures and texts to compare on, and where they come from."""

    images: Sequence[Image.Image]
    captions: Sequence[str]
    origin: str

    @property
    def texts(self) -> list[str]:
        return [*self.captions, *TEXTS]


@dataclass
class Findings:
    """Largest absolute differences of unit features, and the texts that become other tokens."""

    origin: str
    images: int
    texts: int
    errors: dict[str, float] = field(default_factory=dict)
    """By library and tower, from the same pixels and tokens."""
    half: float | None = None
    """What float16 weights change of the features, where they are stored so."""
    pictures: float | None = None
    """From the same pictures, each library with its own preprocessing."""
    transparent: dict[str, float] = field(default_factory=dict)
    """By library, of transparent pictures that it gets as they are, against what training saw."""
    other_tokens: list[str] = field(default_factory=list)

    def by_library(self) -> dict[str, dict[str, float]]:
        """Library -> tower -> error."""
        found: dict[str, dict[str, float]] = {}
        for key, error in self.errors.items():
            library, tower = key.rsplit(" ", 1)
            found.setdefault(library, {})[tower] = error
        return found


@dataclass(frozen=True)
class Reference:
    """What the model itself computes, in float32."""

    encoder: DualEncoder
    pixels_BCHW: Tensor
    tokens_TL: Tensor
    image_BD: Tensor
    text_TD: Tensor


@torch.no_grad()
def reference(built: Built, pairs: Pairs) -> Reference:
    """Features of the pairs and TEXTS. UserError where they are no finite numbers: nothing could be compared."""
    pixels = torch.stack([built.preprocess_eval(image) for image in pairs.images])
    ref = _features(built.encoder.float().eval(), pixels, built.tokenize(pairs.texts))
    if not bool(torch.isfinite(ref.image_BD).all() and torch.isfinite(ref.text_TD).all()):
        raise UserError("the model's features are no finite numbers (its training may have diverged): not exported")
    return ref


def _features(encoder: DualEncoder, pixels_BCHW: Tensor, tokens_TL: Tensor) -> Reference:
    image, text = (torch.cat([encode(x) for x in inputs.split(16)])
                   for encode, inputs in ((encoder.image, pixels_BCHW), (encoder.text, tokens_TL)))  # fmt: skip
    return Reference(encoder, pixels_BCHW, tokens_TL, image, text)


@torch.no_grad()
def half_reference(full: Reference, found: Findings) -> Reference:
    """The same of the model with its weights rounded to float16, which is what the files hold."""
    rounded = _features(copy.deepcopy(full.encoder).half().float(), full.pixels_BCHW, full.tokens_TL)
    features = ((rounded.image_BD, full.image_BD), (rounded.text_TD, full.text_TD))
    found.half = max(float((a - b).abs().max()) for a, b in features)
    if not found.half <= HALF_TOLERANCE:
        raise UserError(
            f"--half: float16 weights change features by {found.half:.1e} (allowed: {HALF_TOLERANCE:.0e}); export "
            "without --half"
        )
    return rounded


def compare_towers(
    library: str, run: Mapping[str, Callable[[Tensor], Tensor]], ref: Reference, found: Findings
) -> None:
    """Compare towers given as functions of pixels and tokens, one input at a time and all at once."""
    for tower, inputs in (("image", ref.pixels_BCHW), ("text", ref.tokens_TL)):
        encode = run[tower]
        compare(library, tower, lambda encode=encode, inputs=inputs: torch.cat(
            [encode(inputs[:1]), encode(inputs)[1:]]), ref, found)  # fmt: skip


def compare(
    library: str, tower: str, run: Callable[[], Tensor], ref: Reference, found: Findings,
    layers: tuple[nn.Module, list[tuple[str, str]]] | None = None,
) -> None:  # fmt: skip
    wanted = ref.image_BD if tower == "image" else ref.text_TD
    error = float((run() - wanted).abs().max())
    found.errors[f"{library} {tower}"] = error
    if error <= TOLERANCE:  # a NaN is over it
        return
    where = "" if layers is None else _first_difference(tower, ref, layers, run)
    raise UserError(
        f"the {tower} tower as {library} loads it differs by {error:.1e} from the model's features (allowed: "
        f"{TOLERANCE:.0e}){where}. Nothing was written"
    )


def _first_difference(
    tower: str, ref: Reference, layers: tuple[nn.Module, list[tuple[str, str]]], run: Callable[[], Tensor]
) -> str:
    """The first module whose output differs from that of its counterpart, relative to the output's size."""
    model, stages = layers
    own, other = {}, {}
    with _outputs(ref.encoder.clip, [ours for ours, _ in stages], own):
        ref.encoder.image(ref.pixels_BCHW) if tower == "image" else ref.encoder.text(ref.tokens_TL)
    with _outputs(model, [theirs for _, theirs in stages], other):
        run()
    for ours, theirs in stages:
        if own[ours].shape != other[theirs].shape:
            return f", first in the shape of {theirs} ({ours})"
        if not float((own[ours] - other[theirs]).abs().max() / own[ours].abs().max()) <= TOLERANCE:
            return f", first at {theirs} ({ours})"
    return ", first after its last layer, in the pooling or the projection"


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str], into: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            into[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn_pairs() -> Pairs:
    """Pictures for a model without data, of several sizes."""
    sizes = ((64, 64), (120, 80), (80, 121), (300, 200), (224, 224), (97, 200))
    images = [smooth(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    return Pairs(images, ["a red circle", "noise", "a photo of a dog"], "drawn pictures")


def cropped_pictures(side: int) -> list[Image.Image]:
    """Pictures that lose 1 to 8 pixels to a crop of that side, with sharp edges: libraries round half of an odd number
    to different places, and a shift by a pixel is seen at edges."""
    wide = [_patches(side + more, side, more, "nearest") for more in range(1, 9)]
    return [*wide, *(_patches(side, side + more, more, "nearest") for more in range(1, 9))]


def transparent_pictures() -> list[Image.Image]:
    """A black shape on nothing in the modes that pictures are transparent in: RGBA, grey with alpha, a palette."""
    rgba = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (20, 15, 60, 55))
    rgba.paste((200, 30, 30, 128), (50, 40, 80, 65))
    palette = rgba.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    return [rgba, rgba.convert("LA"), palette]


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """A picture of a few soft patches of colour."""
    return _patches(width, height, seed, "bilinear")


def _patches(width: int, height: int, seed: int, mode: str) -> Image.Image:
    coarse = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    drawn = F.interpolate(coarse, size=(height, width), mode=mode)[0]
    return Image.fromarray((drawn * 255).byte().permute(1, 2, 0).contiguous().numpy())
