"""Proof that an exported folder computes what the model computes: each library loads the files, features are compared.

Two questions, kept apart. Do the towers compute the same from the same pixels and tokens? Over the tolerance the export
fails. And do processor and tokenizer make the same pixels and tokens of a picture and a text? Where they cannot
(resizing is done by another library, the mending of odd texts has limits) the difference is counted and told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from vlcl.errors import UserError
from vlcl.hf.forms import Form
from vlcl.model import Built, DualEncoder

TOLERANCE = 1e-5  # of unit features
PIXELS = 0.02  # mean difference of normalised pixels; another mean, size or crop is far above it
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


@torch.no_grad()
def check_transformers(folder: Path, form: Form, built: Built, pairs: Pairs, ref: Reference, found: Findings) -> None:
    """Load `folder` as transformers does and compare; UserError over the tolerance."""
    from transformers import AutoModel, AutoProcessor

    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)

    def image(pixels: Tensor) -> Tensor:
        return _unit(model.get_image_features(pixel_values=pixels))

    def text(tokens: Tensor, **more: Tensor) -> Tensor:
        return _unit(model.get_text_features(input_ids=tokens, **more))

    more = {}
    if form.name == "VisionTextDualEncoderModel":  # open_clip masks padding inside its tower
        more["attention_mask"] = (ref.tokens_TL != model.config.text_config.pad_token_id).long()
    for tower, run in (("image", lambda: image(ref.pixels_BCHW)), ("text", lambda: text(ref.tokens_TL, **more))):
        _compare("transformers", tower, run, ref, found, (model, form.stages[tower]))
    _check_processor(processor, built)
    pictures = [*pairs.images, *drawn_pairs().images]  # of which some need resizing in any case
    ours = torch.stack([built.preprocess_eval(x) for x in pictures])
    theirs = processor(images=pictures, return_tensors="pt").pixel_values
    found.pictures = float((image(theirs) - ref.encoder.image(ours)).abs().max())
    length = ref.tokens_TL.shape[1]
    encoded = processor.tokenizer(
        list(pairs.texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    _check_tokens(encoded, built.tokenize, pairs.texts, ref, found, text)


def _check_tokens(
    encoded: Any, tokenize: Any, texts: Sequence[str], ref: Reference, found: Findings, run: Callable[..., Tensor]
) -> None:
    """Texts through the exported tokenizer: the same tokens, but for odd texts, and then the same features."""
    end = getattr(tokenize, "eot_token_id", None)
    ours, theirs = ref.tokens_TL.tolist(), encoded.input_ids.tolist()
    same = [_used(a, end) == _used(b, end) for a, b in zip(ours, theirs)]
    found.other_tokens = [sentence for sentence, equal in zip(texts, same) if not equal]
    if plain := [sentence for sentence in found.other_tokens if _is_plain(sentence)]:
        raise UserError(f"the exported tokenizer makes other tokens of {plain[0]!r} than the model's own: not exported")
    more = {"attention_mask": encoded.attention_mask} if "attention_mask" in encoded else {}
    error = float((run(encoded.input_ids, **more) - ref.text_TD)[torch.tensor(same)].abs().max())
    if not error <= TOLERANCE:
        raise UserError(
            f"texts through the exported tokenizer give features that differ by {error:.1e} from the model's, though "
            "the words become the same tokens (their padding differs): not exported"
        )


def _check_processor(processor: Any, built: Built) -> None:
    """Pixels of smooth pictures: nothing to resize in one, in the other twice as much as fits; UserError where they
    differ by more than libraries' ways of resizing do."""
    size = built.config["preprocess_cfg"]["size"]
    height, width = (size, size) if isinstance(size, int) else size
    for image in (_smooth(width, height, 0), _smooth(4 * width, 2 * height, 1)):
        theirs = processor(images=[image], return_tensors="pt").pixel_values[0]
        ours = built.preprocess_eval(image)
        if theirs.shape != ours.shape or not float((theirs - ours).abs().mean()) <= PIXELS:
            raise UserError("the exported image processor makes other pixels of a picture than the model's own")


@torch.no_grad()
def check_open_clip(folder: Path, built: Built, pairs: Pairs, ref: Reference, found: Findings) -> None:
    """Load `folder` as open_clip does and compare; UserError over the tolerance."""
    model: Any = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokenize: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    transform: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    if not torch.equal(tokenize(pairs.texts), ref.tokens_TL):
        raise UserError("open_clip's tokenizer of the exported folder makes other tokens than the model's own")
    if not torch.equal(transform(pairs.images[0]), built.preprocess_eval(pairs.images[0])):
        raise UserError("open_clip's preprocessing of the exported folder makes other pixels than the model's own")
    encoder = DualEncoder(model)
    _compare("open_clip", "image", lambda: encoder.image(ref.pixels_BCHW), ref, found)
    _compare("open_clip", "text", lambda: encoder.text(ref.tokens_TL), ref, found)


def check_features(
    library: str, run: Mapping[str, Callable[[Tensor], Tensor]], ref: Reference, found: Findings
) -> None:
    """Compare towers given as functions of pixels and tokens, one input at a time and all at once."""
    for tower, inputs in (("image", ref.pixels_BCHW), ("text", ref.tokens_TL)):
        encode = run[tower]
        _compare(library, tower, lambda encode=encode, inputs=inputs: torch.cat(
            [encode(inputs[:1]), encode(inputs)[1:]]), ref, found)  # fmt: skip


def _compare(
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
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            into[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unit(output: Any) -> Tensor:
    """transformers 5 returns a record whose pooler_output is the projected feature, 4 the feature itself."""
    return F.normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=1)


def _used(tokens: list[int], end: int | None) -> list[int]:
    """Without the padding behind the end-of-text token, where libraries pad differently and it changes nothing."""
    return tokens if end is None or end not in tokens else tokens[: tokens.index(end) + 1]


def _is_plain(text: str) -> bool:
    """Whether no mending of texts has anything to do here."""
    return text.isascii() and text.isprintable() and not any(x in text for x in "&<") and " ".join(text.split()) == text


def drawn_pairs() -> Pairs:
    """Pictures for a model without data, of several sizes."""
    sizes = ((64, 64), (120, 80), (80, 121), (300, 200), (224, 224), (97, 200))
    images = [_smooth(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    return Pairs(images, ["a red circle", "noise", "a photo of a dog"], "drawn pictures")


def _smooth(width: int, height: int, seed: int) -> Image.Image:
    """A picture of a few soft patches of colour."""
    coarse = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return Image.fromarray((smooth * 255).byte().permute(1, 2, 0).contiguous().numpy())
