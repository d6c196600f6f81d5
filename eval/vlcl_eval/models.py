"""A model to evaluate: an image tower, a text encoder, and how an image is made ready for it.

`load(spec)` takes a vlcl run, a step folder, an exported folder or any folder with open_clip_config.json; a folder that
transformers wrote (CLIP, SigLIP and other dual encoders with get_image_features); or an open_clip name with its tag,
`ViT-B-32:openai`. Features are float32 and not normalised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from vlcl.checkpoint import find_model, load_model
from vlcl.errors import UserError
from vlcl.fingerprint import fingerprint, fingerprint_of, tokens_of
from vlcl.hf.weights import is_hf_folder

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")

# Tokenize texts; with `cut`, a text that is too long loses its end-of-text token, as in the ELEVATER toolkit.
Tokenize = Callable[[Sequence[str], bool], dict[str, Tensor]]


class ImageTower(nn.Module):
    """images [B, 3, H, W] -> features [B, D]. `tower` is the part that a fine-tune trains."""

    def __init__(self, model: nn.Module, tower: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.tower = model, tower
        self._encode = encode

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._encode(images_BCHW)


@dataclass(frozen=True)
class EvalModel:
    """`weights`: 16 hex digits over all that features depend on. `preprocess`: the model's own."""

    label: str
    image: ImageTower
    encode_tokens: Callable[[dict[str, Tensor]], Tensor]
    tokenize: Tokenize
    preprocess: PreprocessCfg
    context_length: int
    """In tokens."""
    weights: str
    has_text: bool = True
    """Not: an image tower alone, `encode_tokens` and `tokenize` raise UserError."""

    @property
    def num_visual(self) -> int:
        return sum(p.numel() for p in self.image.tower.parameters())

    @property
    def num_backbone(self) -> int:
        return sum(p.numel() for p in self.image.model.parameters())

    @property
    def image_size(self) -> int:
        size = self.preprocess.size
        return size if isinstance(size, int) else int(size[0])

    @torch.no_grad()
    def width(self) -> int:
        """D, of its image features."""
        device, side = next(self.image.model.parameters()).device, self.image_size
        return self.image(torch.zeros(1, 3, side, side, device=device)).shape[1]

    def to(self, device: torch.device) -> EvalModel:
        self.image.model.to(device)
        return self

    @torch.no_grad()
    def texts(self, texts: Sequence[str], cut: bool = False, batch_size: int = 256) -> Tensor:
        """[T, D] features of the texts, float32."""
        device = next(self.image.model.parameters()).device
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size], cut)
            parts.append(self.encode_tokens({name: x.to(device) for name, x in tokens.items()}).float())
        return torch.cat(parts)

    def transform(self, center_crop: bool | None) -> Callable[[Any], Tensor]:
        """PIL image -> [3, H, W]. True: ELEVATER's (short side to the input size, bicubic, centre crop); False: its
        squash to a square; None: the model's own."""
        cfg = self.preprocess
        if center_crop is not None:
            mode: Any = "shortest" if center_crop else "squash"
            cfg = replace(cfg, resize_mode=mode, interpolation="bicubic")
        transform: Any = image_transform_v2(cfg, is_train=False)
        return transform


def load(spec: str, averaged: bool = False) -> EvalModel:
    """UserError where `spec` is no model, with what it could be."""
    spec = spec.removeprefix("local-dir:")
    model = _from_transformers(Path(spec)) if is_hf_folder(Path(spec)) else _from_open_clip(spec, averaged)
    model.image.model.eval().requires_grad_(False)
    return model


def check_finite(model: EvalModel, *features: Tensor) -> None:
    """Scores of features that are no numbers would still look like scores."""
    if not all(bool(torch.isfinite(x).all()) for x in features):
        raise UserError(
            f"{model.label} gives features that are no finite numbers: there is nothing to score. Its weights may have "
            "diverged; if it was --precision bf16, try fp32"
        )


def label_of(spec: str) -> str:
    """A short name: the run's folder, the folder, or the open_clip name."""
    path = Path(spec)
    if not path.exists():
        return spec
    path = path.resolve()
    return path.parent.name + "/" + path.name if path.name.startswith("step-") else path.name


def _from_open_clip(spec: str, averaged: bool) -> EvalModel:
    folder = find_model(spec)
    try:
        built = load_model(spec, averaged)
    except UserError as error:
        raise UserError(str(error).replace("model.name=", "MODEL ").replace("model.pretrained=", "weights ")) from None
    clip = built.encoder.clip
    tokenizer: Any = built.tokenize
    length = built.config["model_cfg"].get("text_cfg", {}).get("context_length", 77)

    def tokenize(texts: Sequence[str], cut: bool) -> dict[str, Tensor]:
        if cut and isinstance(tokenizer, SimpleTokenizer):
            return {"text": cut_tokens(tokenizer, texts, length)}
        return {"text": tokenizer(list(texts))}

    preprocess = PreprocessCfg(**clip.visual.preprocess_cfg)
    if not built.encoder.has_text:
        tower = ImageTower(clip.visual, clip.visual, clip.visual)
        return EvalModel(
            label_of(spec), tower, lambda tokens: built.tokenize([]),
            lambda texts, cut: {"text": built.tokenize(texts)}, preprocess, 0, fingerprint_of(built), has_text=False,
        )  # fmt: skip
    random = folder is None and ":" not in spec
    return EvalModel(
        label_of(spec) + (" (random weights)" if random else ""),
        ImageTower(clip, clip.visual, clip.encode_image),
        lambda tokens: clip.encode_text(tokens["text"]),
        tokenize,
        preprocess,
        length,
        fingerprint_of(built),
    )


def cut_tokens(tokenizer: SimpleTokenizer, texts: Sequence[str], length: int) -> Tensor:
    """int64 [T, length]: start, text, end; what does not fit is cut with its end token."""
    tokens_TL = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id][:length]
        tokens_TL[row, : len(ids)] = torch.tensor(ids)
    return tokens_TL


def _from_transformers(folder: Path) -> EvalModel:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); save it there: "
            f"AutoTokenizer.from_pretrained(ID).save_pretrained({str(folder)!r})"
        )
    disable_progress_bar()
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        model: Any = AutoModel.from_pretrained(folder, **own).float()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **own)
        preprocess = _preprocess_config(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder} cannot be loaded by transformers: {str(error).splitlines()[0][:300]}") from None
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UserError(f"{folder} holds a {type(model).__name__}, which has no image and text features to compare")
    text_config = model.config.text_config
    length = int(getattr(text_config, "max_position_embeddings", 77))
    if len(tokenizer) < text_config.vocab_size // 2:
        raise UserError(
            f"{folder}: its tokenizer knows {len(tokenizer)} tokens, its model {text_config.vocab_size:,}: they do not "
            "belong together; save the right tokenizer there"
        )
    wants_mask = model.config.model_type not in ("siglip", "siglip2")  # trained with padding seen

    def tokenize(texts: Sequence[str], cut: bool) -> dict[str, Tensor]:
        batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        names = ("input_ids", "attention_mask") if wants_mask else ("input_ids",)
        return {name: batch[name] for name in names if name in batch}

    return EvalModel(
        label_of(str(folder)),
        ImageTower(model, _vision_parts(model), lambda images: _tensor(model.get_image_features(pixel_values=images))),
        lambda tokens: _tensor(model.get_text_features(**tokens)),
        tokenize,
        preprocess,
        length,
        fingerprint(model, model.config.to_json_string(), tokens_of(lambda texts: tokenize(texts, False)), preprocess),
    )


def _vision_parts(model: Any) -> nn.Module:
    """The tower with its projection, which transformers keeps beside it."""
    parts = [model.vision_model, getattr(model, "visual_projection", None)]
    return nn.ModuleList([part for part in parts if part is not None])


def _tensor(output: Any) -> Tensor:
    """transformers 5 returns a record whose pooler_output is the projected feature, 4 the feature itself."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _preprocess_config(folder: Path) -> PreprocessCfg:
    """The image processor's settings, as open_clip has them."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name}: save the model's image processor there")
    settings = json.loads(path.read_text())
    settings = settings.get("image_processor", settings)
    size, crop = settings.get("size", 224), settings.get("crop_size")
    side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    squash = isinstance(size, dict) and "height" in size
    if crop is not None and not squash:
        wanted = crop if isinstance(crop, int) else crop["height"]
        if settings.get("do_center_crop", True) and wanted != side:
            raise ValueError(f"{path}: resizing to {side} and cropping to {wanted} is not supported; make them equal")
    interpolation: Any = {2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 3), "bicubic")
    return PreprocessCfg(
        size=int(side),
        mean=tuple(settings.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(settings.get("image_std", (0.5, 0.5, 0.5))),
        interpolation=interpolation,
        resize_mode="squash" if squash else "shortest",
    )
