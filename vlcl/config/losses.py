"""The loss block of the settings: one record a loss, chosen by `loss.name`, so that no loss carries another's settings.

The records' fields are the keyword arguments of the presets of vlcl/losses/presets.py, `name`, `warm` and
`same_caption` apart; their defaults are the presets'. What else must be known of a loss before there is one (its bias,
whether chunks add up, which settings disagree) is said here, too.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Tag

from vlcl.config.by_batch import form_of, gain_of
from vlcl.config.errors import sections_of
from vlcl.config.types import Count, Index, NotNegative, Positive, Rate, Section

Check = tuple[bool, str, str]  # wrong?, the keys it is about, what to say


class LossSection(Section):
    """What the trainer asks of any loss's settings."""

    bias_init: ClassVar[float | None] = None
    """start of the bias that the loss learns, where `model.logit_bias_init` is not set; None: it learns none"""
    scale_init: ClassVar[float | None] = None
    """start of the scale, where neither `model.logit_scale_init` nor start weights say it; None: the model's"""

    same_caption: Literal["negative", "ignore"] = "negative"
    """pairs of a batch whose captions have the same tokens: each other's `negative`, or they `ignore` each other"""

    @property
    def learns_bias(self) -> bool:
        return self.bias_init is not None

    @property
    def warm_passes(self) -> int:
        """Passes over the data that fill its rows before the first update."""
        return 0

    @property
    def decomposable(self) -> bool:
        """Whether gradients of chunks, each with negatives of its own, add up to one of the same loss."""
        return False

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of its preset."""
        return self.model_dump(exclude={"name", "warm", "same_caption"})

    def choices(self, pairs: int) -> dict[str, Any]:
        """What its settings come to, of those that are null and go with the number of pairs (`pairs`: of a batch, or a
        chunk) that an estimate is over."""
        return {}

    def chunk_checks(self) -> list[Check]:
        """What is wrong with `train.negatives=chunk`."""
        return [
            (not self.decomposable, "train.negatives loss.order",
             "train.negatives=chunk needs a loss whose gradients add up over chunks: loss.name=em loss.order=before "
             f"(got loss.name={_loss_name(self)})"),
        ]  # fmt: skip

    def checks(self) -> list[Check]:
        """Its settings that are fine alone and not together."""
        return []


class InfoNCEConfig(LossSection):
    """InfoNCE, the loss of CLIP: the batch's own normalizer. It has no settings of its own."""

    name: Literal["infonce"] = "infonce"
    """which loss"""


class DCLConfig(LossSection):
    """Decoupled contrastive learning: InfoNCE without the positive in its normalizer. No settings of its own."""

    name: Literal["dcl"] = "dcl"
    """which loss"""


class SigLIPConfig(LossSection):
    """SigLIP: a yes-or-no question a pair, with a learned bias. Where they are not set and there are no start weights,
    `model.logit_bias_init` is -10 and `model.logit_scale_init` 10. It has no settings of its own."""

    bias_init: ClassVar[float | None] = -10.0
    scale_init: ClassVar[float | None] = 10.0

    name: Literal["siglip"] = "siglip"
    """which loss"""


class Remembering(LossSection):
    """What the losses with a table share."""

    warming_is_useless: ClassVar[str | None] = None
    """why filling the table beforehand would change nothing"""

    warm: Index = 0
    """passes over the data with frozen weights that fill the table before the first update (for pretrained weights)"""
    epsilon: NotNegative = 1e-14
    """floor under a row's mean of e^(similarity - positive's)"""

    @property
    def warm_passes(self) -> int:
        return self.warm

    def checks(self) -> list[Check]:
        return [
            (self.warm > 0 and self.warming_is_useless is not None, "loss.warm",
             f"loss.warm={self.warm} would change nothing: loss.name={_loss_name(self)} {self.warming_is_useless}; "
             "leave it out"),
        ]  # fmt: skip


class SogCLRConfig(Remembering):
    """SogCLR: a moving average a row, the positive out, a fixed temperature (`model.logit_scale_init`)."""

    name: Literal["sogclr"] = "sogclr"
    """which loss"""
    gamma: Rate = 0.9
    """weight of this batch in a row's running average; 1: no memory"""


class PairTemperature(Remembering):
    """Temperatures of their own for each pair and direction."""

    rho: NotNegative = 7.0
    """holds a temperature up: the loss is tau (l + rho)"""
    tau: Positive = 0.03
    """temperature at a row's first visit"""
    tau_lr: NotNegative = 0.0133
    """learning rate of the temperatures"""
    tau_min: Positive = 0.01
    """smallest temperature"""
    tau_max: Rate = 1.0
    """largest temperature"""

    def checks(self) -> list[Check]:
        return [*super().checks(), _bounds(self.tau_min, self.tau, self.tau_max)]


class ISogCLRConfig(PairTemperature):
    """iSogCLR: SogCLR with a temperature a pair and direction, moved by momentum."""

    name: Literal["isogclr"] = "isogclr"
    """which loss"""
    gamma: Rate = 0.8
    """weight of this batch in a row's running average; 1: no memory"""
    epsilon: NotNegative = 1e-10
    """floor under a row's mean of e^(similarity - positive's)"""
    rho: NotNegative = 6.0
    """holds a temperature up: the loss is tau (l + rho)"""
    tau: Positive = 0.01
    """temperature at a row's first visit"""
    tau_lr: NotNegative = 1e-3
    """learning rate of the temperatures"""
    tau_min: Positive = 0.005
    """smallest temperature"""
    tau_max: Rate = 0.05
    """largest temperature"""


FIRST_EPOCH = "takes only the batch in its first epoch"


class FastCLIPv1Config(Remembering):
    """FastCLIP-v1: SogCLR with a rate that falls from 1 along a cosine, epoch by epoch."""

    warming_is_useless: ClassVar[str | None] = FIRST_EPOCH

    name: Literal["fastclip-v1"] = "fastclip-v1"
    """which loss"""
    gamma_min: Rate = 0.2
    """end of the cosine"""
    gamma_epochs: Rate = 0.5
    """share of the run's epochs that the cosine takes"""


class FastCLIPv2Config(PairTemperature):
    """FastCLIP-v2: v1's rate with a temperature a pair and direction, moved by Adam."""

    warming_is_useless: ClassVar[str | None] = FIRST_EPOCH

    name: Literal["fastclip-v2"] = "fastclip-v2"
    """which loss"""
    gamma_min: Rate = 0.2
    """end of the cosine"""
    gamma_epochs: Rate = 0.5
    """share of the run's epochs that the cosine takes"""


class FastCLIPv3Config(Remembering):
    """FastCLIP-v3: v1's rate with one learned temperature in a robust loss (set `optim.logit_scale_lr`)."""

    warming_is_useless: ClassVar[str | None] = FIRST_EPOCH

    name: Literal["fastclip-v3"] = "fastclip-v3"
    """which loss"""
    gamma_min: Rate = 0.2
    """end of the cosine"""
    gamma_epochs: Rate = 0.5
    """share of the run's epochs that the cosine takes"""
    rho: NotNegative = 6.5
    """holds the temperature up: the loss is tau (l + rho)"""


class SCENTConfig(Remembering):
    """SCENT: FastCLIP-v3 with a rate of each row's own, sigmoid(a + log alpha)."""

    name: Literal["scent"] = "scent"
    """which loss"""
    log_alpha: float = 10.0
    """log of the step size alpha"""
    rho: NotNegative = 6.5
    """holds the temperature up: the loss is tau (l + rho)"""


class NeuCLIPConfig(Remembering):
    """NeuCLIP: log-normalizers predicted from the embeddings by trained prototypes; no row is remembered."""

    warming_is_useless: ClassVar[str | None] = "remembers no rows"

    name: Literal["neuclip"] = "neuclip"
    """which loss"""
    prototypes: Count = 4096
    """prototypes a direction"""
    prototype_steps: Count = 10
    """AdaGrad steps of the prototypes per batch"""
    prototype_lr: Positive = 0.01
    """their learning rate"""
    restart: Count = 500
    """optimizer steps after which the prototypes start anew from the batches' embeddings"""
    rho: NotNegative = 6.5
    """holds the temperature up: the loss is tau (l + rho)"""


class EMConfig(Remembering):
    """The default: every pair against all others, with one remembered log-normalizer a pair and direction."""

    name: Literal["em"] = "em"
    """which loss"""
    mode: Literal["mean", "sample"] = "mean"
    """E-step: `mean` of the auxiliary variable, or a `sample` of it"""
    order: Literal["before", "after"] = "after"
    """weights from a pair's row `before` this batch is mixed into it, or `after`"""
    form: Literal["relative", "balanced", "absolute"] | None = None
    """what a positive pulls with: `relative`: the sum of its negatives' weights; `absolute`: what is right if rows are
    (1, but for `loss.positive`); `balanced`: that, times what makes all pairs of the batch pull as much as they push.
    `relative` is also what rows are, where `loss.prediction` does not take the pair's similarity out. null: `absolute`
    where the E-step averages over 32 pairs or fewer, else `balanced`; `relative` with another `loss.order` or
    `loss.prediction` than the defaults"""
    gamma: Rate | None = None
    """weight of this batch in a row's running average; 1: no memory; null: what goes with the pairs that the E-step
    averages over: 0.5 for 16, 0.73 for 64, 0.9 for 256 and more"""
    gamma_schedule: Literal["constant", "cosine", "visits", "adaptive", "sgd"] = "constant"
    """`constant`: gamma; `cosine`: from 1 down to `loss.gamma_min` over the run; `visits`: 1 / visits of the row;
    `adaptive`: sigmoid(row + `loss.log_alpha`); `sgd`: a gradient step of size gamma instead of an average"""
    gamma_min: Rate = 0.2
    """end of the cosine schedule"""
    log_alpha: float = 10.0
    """of the adaptive schedule"""
    prediction: Literal["drift", "level", "similarity", "prototypes"] | None = "drift"
    """what is known of a row when it is used, of which it keeps the distance: the running `level` of all rows, the
    pair's own `similarity`, both (`drift`), or `prototypes` (NeuCLIP's); null: nothing"""
    epsilon: NotNegative = 1e-8
    """floor under a row's mean of e^(similarity - positive's), outside the relative form of e^similarity"""
    positive: bool = False
    """count the pair itself in its normalizer, beside N - 1 negatives; not: the limit of infinitely many negatives"""
    max_log_weight: float | None = None
    """cap on the log of a negative's weight (0: that of InfoNCE's weights); null: none"""
    bank: Index = 0
    """recent pairs of all ranks that the E-step averages over, besides the batch"""
    bank_negatives: bool = False
    """take the bank's pairs as negatives of the M-step, too"""
    temperature: Literal["learned", "fixed", "rho", "pair"] = "learned"
    """`learned`: logit_scale by its gradient; `fixed`; `rho`: of the loss tau (l + rho) (FastCLIP-v3's); `pair`: one a
    pair and direction, by momentum (iSogCLR's)"""
    rho: NotNegative = 6.5
    """of `rho` and `pair`: holds the temperature up"""
    tau: Positive = 0.05
    """of `pair`: temperature at a row's first visit"""
    tau_lr: NotNegative = 1e-3
    """of `pair`: learning rate of the temperatures"""
    tau_min: Positive = 0.01
    """of `pair`: smallest temperature"""
    tau_max: Rate = 1.0
    """of `pair`: largest temperature"""

    @property
    def decomposable(self) -> bool:
        return self.order == "before"

    def choices(self, pairs: int) -> dict[str, Any]:
        pairs += self.bank
        form = form_of(pairs, self.order, self.prediction) if self.form is None else self.form
        return {"gamma": gain_of(pairs) if self.gamma is None else self.gamma, "form": form}

    def chunk_checks(self) -> list[Check]:
        return [
            *super().chunk_checks(),
            (self.mode == "sample" or self.prediction == "prototypes", "train.negatives loss.mode loss.prediction",
             "train.negatives=chunk goes with neither loss.mode=sample nor loss.prediction=prototypes"),
        ]  # fmt: skip

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            _bounds(self.tau_min, self.tau, self.tau_max),
            (self.bank_negatives and not self.bank, "loss.bank_negatives loss.bank",
             "loss.bank_negatives=true needs a bank: set loss.bank to a number of pairs"),
        ]  # fmt: skip


def _bounds(low: float, start: float, high: float) -> Check:
    text = f"loss.tau={start} is not between loss.tau_min={low} and loss.tau_max={high}"
    return not low <= start <= high, "loss.tau loss.tau_min loss.tau_max", text


def _loss_name(value: Any) -> str:
    """The name of a loss block, which is the tag of the union. One without a name is of the default loss."""
    return value.get("name", "em") if isinstance(value, dict) else getattr(value, "name", "")


LossConfig = Annotated[
    Annotated[InfoNCEConfig, Tag("infonce")]
    | Annotated[DCLConfig, Tag("dcl")]
    | Annotated[SigLIPConfig, Tag("siglip")]
    | Annotated[SogCLRConfig, Tag("sogclr")]
    | Annotated[ISogCLRConfig, Tag("isogclr")]
    | Annotated[FastCLIPv1Config, Tag("fastclip-v1")]
    | Annotated[FastCLIPv2Config, Tag("fastclip-v2")]
    | Annotated[FastCLIPv3Config, Tag("fastclip-v3")]
    | Annotated[SCENTConfig, Tag("scent")]
    | Annotated[NeuCLIPConfig, Tag("neuclip")]
    | Annotated[EMConfig, Tag("em")],
    Discriminator(_loss_name),
]

_RECORDS = {
    name: record for name, record in sections_of(get_args(LossConfig)[0]).items() if issubclass(record, LossSection)
}


def default_settings(name: str) -> dict[str, Any]:
    """Every setting of the loss called `name`, as it is where nobody says otherwise. KeyError for an unknown name."""
    return _RECORDS[name]().settings()
