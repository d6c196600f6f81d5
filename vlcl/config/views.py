"""The section `views`: pictures alone, `model.kind=views` (MoCo-v3). No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from vlcl.config.errors import Allowed
from vlcl.config.sections import AUGMENTATION
from vlcl.config.types import (
    ColourJitter,
    Count,
    Fraction,
    Index,
    Positive,
    Range,
    Rate,
    Section,
    Share,
    ShareRange,
    Word,
    Words,
)

ViewShares = Annotated[
    list[Share], Field(min_length=2, max_length=2), Allowed("two numbers >= 0 and <= 1: of view one and view two")
]


class ViewsConfig(Section):
    """Of `model.kind: views`: two views of a picture are the pair, and a momentum copy of the tower embeds what they
    are compared with. The defaults are MoCo-v3's for ViTs."""

    OF_TOWERS: ClassVar[tuple[str, ...]] = (
        "projector_layers", "projector_hidden", "projector_width", "predictor_layers", "predictor_hidden",
        "predictor_norm", "fixed_positions", "freeze_patches", "temperature",
    )  # fmt: skip
    OF_PICTURES: ClassVar[tuple[str, ...]] = (
        "crop_scale", "flip_prob", "color_jitter", "color_jitter_prob", "gray_scale_prob", "blur_prob", "blur_sigma",
        "solarize_prob",
    )  # fmt: skip

    projector_layers: Count = 3
    """linear layers of the projector (MoCo-v3's ResNets: 2)"""
    projector_hidden: Count = 4096
    """width between them"""
    projector_width: Count = 256
    """width of the embeddings that are compared"""
    predictor_layers: Count = 2
    """linear layers of the predictor"""
    predictor_hidden: Count = 4096
    """width between them"""
    predictor_norm: bool = True
    """a BatchNorm (without weights) after the predictor's last layer (MoCo-v3's ResNets: false)"""
    fixed_positions: bool = True
    """ViTs: sines and cosines in two dimensions for positions, which do not train"""
    freeze_patches: bool = True
    """ViTs: the patch projection stays as it was initialized (MoCo-v3's `--stop-grad-conv1`)"""
    momentum: Fraction = 0.99
    """share of the momentum copy that a step keeps, at the start of the run"""
    momentum_end: Rate = 1.0
    """and at its end, along a cosine; the same number: constant"""
    temperature: Rate = 0.2
    """tau; fixed where `optim.logit_scale_lr` is 0, else its start"""
    crop_scale: ShareRange = Field(default_factory=lambda: [0.08, 1.0])
    """least and most share of the picture's area that a random crop takes (MoCo-v3's ResNets: 0.2 to 1)"""
    flip_prob: Share = 0.5
    """share of views that are mirrored, left to right"""
    color_jitter: ColourJitter | None = Field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    """most change of brightness, contrast, saturation (0.4: factors of 0.6 to 1.4) and hue (turns); null: none"""
    color_jitter_prob: Share = 0.8
    """share of views that it changes"""
    gray_scale_prob: Share = 0.2
    """share of views that lose their colour"""
    blur_prob: ViewShares = Field(default_factory=lambda: [1.0, 0.1])
    """share of blurred pictures (Gaussian), in view one and in view two"""
    blur_sigma: Range = Field(default_factory=lambda: [0.1, 2.0])
    """least and most standard deviation of that blur, in pixels of an input of 224; smaller inputs: in proportion"""
    solarize_prob: ViewShares = Field(default_factory=lambda: [0.0, 0.2])
    """share of solarized pictures (values from 128 on are inverted), in view one and in view two"""
    knn: Word | Words | None = None
    """labelled pictures that are the neighbours of the kNN classifier: shards with a `cls` file a sample, or a folder
    with a folder of images for each class; its questions are the pictures of `data.val` and `data.test`, with `cls`
    files. null: those of `data.train`, if they are labelled"""
    knn_neighbours: Count = 20
    """neighbours that vote"""
    knn_temperature: Positive = 0.07
    """their votes weigh e^(cosine / this)"""

    linear_epochs: Index = 0
    """epochs of a linear classifier that is trained at the end of the run, on the features of the pictures of
    `views.knn`, and judged on those of `data.val` and `data.test`; 0: none"""

    def only(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Some of the settings, as keyword arguments: OF_TOWERS or OF_PICTURES."""
        return self.model_dump(include=set(names))


# What `model.kind=views` has no use for.
UNUSED = (
    "model.pretrained", "model.context_length", "model.patch_dropout", "model.lock_image", "model.lock_text",
    "model.logit_scale_init", "data.cache", "data.augment", "data.decode", "data.json_text_key", "data.caption_weights",
    "data.long_captions", "loss.same_caption", "optim.text_lr", "optim.text_layer_decay", "eval.zeroshot", "train.ema",
)  # fmt: skip
INSTEAD = {
    "model.pretrained": "take model.pretrained_image",
    "model.logit_scale_init": "take views.temperature",
    "data.augment": "views are always random",
    "data.cache": "pictures are decoded anew for each pair of views",
    "optim.text_lr": "projector and predictor learn at optim.lr, the tower at optim.image_lr",
    "eval.zeroshot": "there is no text tower: take data.val with labels, and views.knn",
    "train.ema": "the momentum copy is one (views.momentum)",
}


def view_checks(config: Any) -> list[tuple[bool, str, str]]:
    """Settings of the whole Config that do not go with its `model.kind`: wrong?, the keys it is about, what to say."""
    if config.model.kind != "views":
        return [
            (
                True,
                f"views.{name} model.kind",
                f"views.{name} needs model.kind=views; it is {config.model.kind}",
            )
            for name in _changed(config.views)
        ]
    unused = [key for key in UNUSED if key.partition(".")[2] in _changed(getattr(config, key.partition(".")[0]))]
    unused += [f"data.{name}" for name in _changed(config.data) if name in AUGMENTATION]
    return [
        *((True, f"{key} model.kind",
           f"{key} means nothing with model.kind=views" + (f": {INSTEAD[key]}" if key in INSTEAD else ""))
          for key in unused),
        (config.train.accumulate > 1, "train.accumulate model.kind",
         f"train.accumulate={config.train.accumulate} with model.kind=views: BatchNorm of projector and predictor must "
         "see the whole batch; take 1, and model.grad_checkpointing=true where memory is short"),
        (config.loss.warm_passes > 0, "loss.warm model.kind",
         "loss.warm with model.kind=views would fill rows with BatchNorm as it is in evaluation, of other values than "
         "training has; leave it out"),
    ]  # fmt: skip


def _changed(section: Section) -> list[str]:
    fields = type(section).model_fields
    return [name for name, x in fields.items() if getattr(section, name) != x.get_default(call_default_factory=True)]
