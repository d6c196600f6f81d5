"""The sections of the settings as frozen typed records (`loss`: losses.py); units are in the text under a field.

Nothing is converted silently: "8" is no number and "true" no bool; a whole number passes for a float. No torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlcl.config.errors import Allowed
from vlcl.config.types import (
    ColourJitter,
    Colours,
    ColourScales,
    Count,
    Fraction,
    Index,
    Positive,
    RandAugment,
    Range,
    Scale,
    Section,
    Share,
    ShareRange,
    Stages,
    Template,
    Word,
    Words,
)
from vlcl.data.decode import BACKGROUND, DEFAULT_LIMITS, IMAGE_KEY, TEXT_KEY
from vlcl.data.remote import CACHE_BYTES, READ_AHEAD

Colour = Annotated[
    str, Field(pattern=r"^(white|black|gr[ae]y|#[0-9a-fA-F]{6})$"), Allowed("white, black, grey, or #rrggbb")
]
# Keys of `data` that say what data.augment=crop does.
AUGMENTATION = (
    "crop_scale", "crop_ratio", "flip_prob", "rand_augment", "color_jitter", "color_jitter_prob", "gray_scale_prob",
    "blur_prob", "blur_sigma",
)  # fmt: skip


class DataConfig(Section):
    """Where the pairs come from and how they are read."""

    train: Word | Words
    """training shards: a pattern `shards/{0000..0331}.tar`, a folder, a file, a URL, or a list of these; several
    sources, each with its own manifest, are joined by `::`"""
    val: Word | Words | None = None
    """held-out shards, as `data.train`; null: no evaluation on pairs while training"""
    test: Word | Words | None = None
    """more held-out shards, evaluated once, at the end of the run: what choices were made on is `data.val`"""
    manifest: Word | Words | None = None
    """manifest of `data.train` (a list: one per source); for shards outside a local folder; null: `manifest.json`
    beside the shards"""
    val_manifest: Word | Words | None = None
    """manifest of `data.val` (a list: one per source)"""
    test_manifest: Word | Words | None = None
    """manifest of `data.test` (a list: one per source)"""
    allow_pipe: bool = False
    """run the commands of `pipe:` shards: set it for commands of your own"""
    weights: Annotated[list[Positive], Field(min_length=1)] | None = None
    """share of samples drawn from each source (any scale, one per source); needs `data.resample=true`; null: by size"""
    resample: bool = False
    """draw shards with replacement instead of reading each once an epoch"""
    workers: Index | None = None
    """reader processes per rank; 0: none, read in the training process; null: chosen by the machine"""
    slices: Count | None = None
    """equal parts that every global batch is put together from, each by streams of its own; numbers of ranks that
    divide it read each sample once; divides `train.batch_size`, and the order of samples depends on it; null: 8,
    4, 2 or 1, the most that does; 1 with `data.streams=1`"""
    streams: Count = 8
    """independently shuffled streams of a slice, which fill it in turn, a batch each; the order of samples depends on
    it, and not on `data.workers`; a multiple of `data.workers`"""
    shuffle: Count = 8192
    """samples held in the shuffle buffers of all streams together, on however many ranks (undecoded)"""
    image_key: Word = IMAGE_KEY
    """file endings of the image in a sample, the first that is there wins; joined by `;`"""
    text_key: Word | Words = TEXT_KEY
    """file ending of the captions in a sample, alternatives joined by `;`; a list: of several files, which all count"""
    text_lines: bool = True
    """each line of that file is a caption; false: the file is one caption, line breaks and all"""
    json_text_key: Word | Words | None = None
    """take the captions from this key of the sample's `json`, a text or a list of texts, instead of `data.text_key`; a
    list: of several keys, which all count"""
    captions: Literal["sample", "first", "all"] = "sample"
    """of several captions, training takes `sample`: one, drawn anew each epoch; `first`: the first; `all`: each in
    turn, the next one each epoch. Evaluation counts them all"""
    caption_weights: Annotated[list[Positive], Field(min_length=1)] | None = None
    """share of captions drawn from each of several `data.json_text_key` or `data.text_key` (any scale, one per key);
    null: all alike"""
    long_captions: Literal["start", "window", "sentence"] = "start"
    """what training sees of a caption with more tokens than `model.context_length`: its `start`; a `window` that begins
    at some word, or whole sentences from some `sentence` on, drawn anew each epoch. Evaluation sees the start"""
    background: Colour = BACKGROUND
    """what shows through the transparent parts of an image"""
    max_pixels: Count = DEFAULT_LIMITS.max_pixels
    """most pixels (width x height) of an image; a larger one is a bad sample, and is not decoded"""
    max_aspect: Positive = DEFAULT_LIMITS.max_aspect
    """most times that a side of an image may be the other; a longer one is a bad sample"""
    max_bytes: Count = DEFAULT_LIMITS.max_bytes
    """most bytes of a file of a sample; a larger one is a bad sample, and is not read"""
    max_caption: Count = DEFAULT_LIMITS.max_caption
    """most characters of a caption; a longer one is left out"""
    max_captions: Count = DEFAULT_LIMITS.max_captions
    """most captions of a sample; one with more is a bad sample"""
    max_json: Count = DEFAULT_LIMITS.max_json
    """most bytes of a sample's `json`, where `data.json_text_key` is set"""
    max_json_depth: Count = DEFAULT_LIMITS.max_json_depth
    """most lists and objects within each other in a sample's `json`"""
    decode: Literal["exact", "fast"] = "exact"
    """training pictures: `exact`: as torchvision crops and resizes them; `fast`: the same crop within rounding, for
    about half the time: large JPEGs are decoded at a smaller size. Evaluation is always exact"""
    augment: Literal["crop", "none"] = "crop"
    """training pictures: `crop` (a random part of the picture, anew each time, and then what the next nine settings
    ask for) or `none` (as in evaluation)"""
    crop_scale: ShareRange = Field(default_factory=lambda: [0.9, 1.0])
    """least and most share of the picture's area that the random crop takes (open_clip: `scale`)"""
    crop_ratio: Range | None = None
    """least and most width over height of that crop, which is then squashed to the input (open_clip: `ratio`); null:
    3/4 to 4/3"""
    flip_prob: Share = 0.0
    """share of pictures that are mirrored, left to right"""
    rand_augment: RandAugment | None = None
    """RandAugment: how many random operations a picture goes through, and their strength, as `[2, 9]`; null: none"""
    color_jitter: ColourJitter | None = None
    """most change of brightness, contrast, saturation (0.4: factors of 0.6 to 1.4) and hue (turns), as
    `[0.32, 0.32, 0.32, 0.08]`; null: none"""
    color_jitter_prob: Share = 1.0
    """share of pictures that `data.color_jitter` changes"""
    gray_scale_prob: Share = 0.0
    """share of pictures that lose their colour"""
    blur_prob: Share = 0.0
    """share of pictures that are blurred (Gaussian)"""
    blur_sigma: Range = Field(default_factory=lambda: [0.1, 2.0])
    """least and most standard deviation of that blur, in pixels of the input"""
    cache: Word | None = None
    """decode every sample once and keep it: `memory` (of each rank), or a folder, which runs share; for sets that fit;
    with `model.lock_image=true` and `data.augment=none`, what that tower gives; null: read the shards in every epoch"""
    read_ahead: Index = READ_AHEAD
    """bytes that are fetched ahead of each remote shard that is open (`data.streams` of them a rank); 0: none"""
    remote_cache: Word | None = None
    """folder of this machine that keeps copies of remote shards, which runs and ranks share; null: none"""
    remote_cache_bytes: Count = CACHE_BYTES
    """most bytes in that folder; the copy that was used least lately goes first"""
    max_bad_share: Share = 0.1
    """share of bad samples (unreadable image, no caption) from which on the run stops"""
    stages: Stages = Field(default_factory=list)
    """functions of your own that training samples go through before they are decoded, as `["mypkg.filters:keep"]`; each
    takes an iterator of samples and yields samples, as a stage of webdataset"""


class ModelConfig(Section):
    """The two towers, built by open_clip; or an image tower alone."""

    kind: Literal["clip", "views"] = "clip"
    """`clip`: an image and a text tower; `views`: an image tower with a momentum copy, for pictures alone (MoCo-v3; the
    section `views`)"""
    name: Word = "ViT-B-32"
    """an open_clip model, or one of vlcl's own (`ViT-Ti-16-64`, `ViT-Nano-8-64`, `ViT-Pico-8-32`); with
    `model.kind=views` its image tower, or one of timm's: `timm/NAME`"""
    pretrained: Word | None = None
    """start weights: an open_clip tag, or a local file or folder (of open_clip or transformers); null: random"""
    pretrained_image: Word | None = None
    """start weights of the image tower alone: a run, step folder or export of `model.kind=views`; null: none"""
    image_size: Count | None = None
    """side of the square input in pixels; null: the model's"""
    image_mean: Colours | None = None
    """mean of red, green and blue that is taken off a picture's values of 0 to 1; null: the model's"""
    image_std: ColourScales | None = None
    """standard deviation of red, green and blue that they are then divided by; null: the model's"""
    image_interpolation: Literal["bicubic", "bilinear"] | None = None
    """how pictures are resized; null: the model's, and bicubic for the random crop of training"""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """how a picture that is no square fits, in evaluation and with `data.augment=none`: its `shortest` side, and the
    middle is cut out; its `longest`, with black borders; `squash`: both; null: the model's"""
    context_length: Count | None = None
    """caption length in tokens; null: the model's"""
    patch_dropout: Fraction | None = None
    """share of image patches dropped in training (FLIP); null: the model's"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    lock_image: bool = False
    """freeze the image tower (LiT)"""
    lock_image_unlocked_groups: Index = 0
    """last layer groups of a locked image tower that train all the same"""
    lock_text: bool = False
    """freeze the text tower"""
    lock_text_unlocked_layers: Index = 0
    """last layers of a locked text tower that train all the same"""
    logit_scale_init: Scale | None = None
    """start of exp(logit_scale) = 1 / temperature, e.g. 14.3; null: that of the start weights, else the model's (14.3;
    with `loss.name=siglip` 10)"""
    logit_bias_init: float | None = None
    """start of the learned bias of the logits, for `loss.name=siglip`; null: none (with siglip: -10)"""
    logit_scale_max: Scale = 100.0
    """cap on exp(logit_scale), which is kept between 1 and this after every step"""


class TrainConfig(Section):
    """The run: its length, batch and place."""

    output: Word = "runs/run"
    """run folder; null or left out: `runs/` and the name of the config file"""
    steps: Count | None = None
    """length in optimizer steps; give this or `train.epochs` (the one given last wins)"""
    epochs: Positive | None = None
    """length in passes over the training pairs; 32 where neither is given"""
    batch_size: Count = 1024
    """pairs per optimizer step, over all ranks and accumulation chunks"""
    accumulate: Count = 1
    """chunks that a step is computed in, one after another (less memory); divides `train.batch_size`"""
    negatives: Literal["batch", "chunk"] = "batch"
    """with `train.accumulate`: each pair against the whole `batch` (exact, a second forward pass), or against its
    `chunk` alone (one forward pass; for `loss.name=em loss.order=before`, whose gradients add up)"""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """arithmetic of the towers; null: bf16 on a GPU that has it, else fp32"""
    seed: Index = 0
    """seed of weights, order, captions and augmentation"""
    ema: Fraction = 0.0
    """decay per step of an averaged copy of the weights; 0: no copy"""
    compile: bool = False
    """torch.compile the towers: slow first steps, faster later ones"""
    overwrite: bool = False
    """delete what a run folder of this name holds, instead of refusing it"""
    log_every: Count = 10
    """steps between lines of `metrics.jsonl`"""
    timeout: Positive | None = 600.0
    """seconds after which a run that stands still (a rank, a data worker, a collective) ends with exit code 1 and says
    who stands where; null: it waits"""
    on_anomaly: Literal["stop", "skip", "rewind"] = "stop"
    """at a loss or gradient that is not finite: `stop`; `skip` the step, its update and what the loss remembers of it;
    `rewind` to the newest checkpoint and leave its batch out. The last two do so at a loss spike as well"""
    max_anomalies: Count = 10
    """most steps in a row that are skipped, and most rewinds of a run: then it stops"""
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$"), Allowed("START:STOP, two steps")] | None = None
    """`START:STOP`: torch's profiler writes a trace of the steps after START to STOP, of rank 0, to `RUN/profile`: take
    few steps, and not the first; null: none"""
    loss_spike: Positive | None = 6.0
    """standard deviations above its running mean (100 steps) from which on the in-batch InfoNCE is a loss spike; null:
    none is"""

    @property
    def parts(self) -> int:
        """Of a step, each a batch of its own."""
        return self.accumulate if self.negatives == "chunk" else 1

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "epochs": 32}
        return values


class EvalConfig(Section):
    """Evaluation while training."""

    every: Count | None = None
    """steps between evaluations; null: only at the end"""
    batch_size: Count = 256
    """images or captions per forward pass of a rank"""
    zeroshot: Word | Words | None = None
    """folder with a folder of images for each class, for zero-shot accuracy; a list: of several sets; null: none"""
    templates: Annotated[list[Template], Field(min_length=1), Allowed('a list of texts with "{}" in each')] | None = (
        None
    )
    """prompts of the zero-shot classifier, `{}` being the class name; null: ImageNet's 80 for folders called by WordNet
    ids, else `["a photo of a {}."]`"""
    examples: Index = 8
    """retrieval examples shown in `report.html`"""


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count = 1000
    """steps between checkpoints; the last step is always saved"""
    async_save: bool = True
    """write in the background while training goes on, from a copy in host memory; false: training waits"""
    keep: Count = 2
    """newest checkpoints kept"""
    keep_every: Count | None = None
    """checkpoints at multiples of this many steps are kept for good; a multiple of `checkpoint.every`; null: none"""
    keep_best: Word | None = None
    """a metric of `data.val` or `eval.zeroshot`, such as `val/text_to_image_R@1`: the checkpoint with the best is
    kept as well, of those that were evaluated (`eval.every`); null: none"""
    remote: Word | None = None
    """a copy of the run folder in a store, `s3://BUCKET/runs/NAME`, also gs, az: each checkpoint is sent there in the
    background, `keep...` hold there too, and `resume` fetches what is newer there than here; null: none"""


class LogConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=lambda: ["tensorboard"])
    """any of them, or `[]`"""
