"""What goes wrong in a run without an error: found in the numbers of each step, counted, and written down.

    loss       the loss is not finite
    gradient   the gradient's norm is not finite
    spike      the in-batch InfoNCE is far above its running mean (`train.loss_spike`). Not the generalized loss, whose
               estimate moves by itself where rows are visited again
    clip       the gradient was clipped in each of the last 100 steps
    scale      logit_scale is at one of its bounds, for 100 steps
    drift      what the table remembers, and a loss uses, is far from what it finds, for 100 steps

The first two stop a run, or are left out (`train.on_anomaly`; vlcl/recovery.py does it), a spike is left out where
that is asked for, the others are told once. The numbers are means over the ranks: all ranks find the same.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlcl.files import replace_text

FOLDER = "anomalies"  # in RUN, a file a step
STREAK = 100  # steps in a row until it is told
HORIZON = 100  # steps of the running mean of the loss
STALE = 2.0  # nats: a remembered weight is wrong by a factor of 7
NEAR = 1e-3  # of a bound, relative
MOST_FILES = 100  # of steps that nothing depends on

MEANING = {
    "loss": "loss that is not finite",
    "gradient": "gradient that is not finite",
    "spike": "loss spike",
    "clip": "gradient clipped in each of the last 100 steps",
    "scale": "logit_scale at its bound for 100 steps",
    "drift": "table drift above 2 nats for 100 steps",
}
NOT_FINITE = ("loss", "gradient")


@dataclass(frozen=True)
class Limits:
    """What is normal in a run. clip_norm, loss_spike: its settings. scale_bounds: of exp(logit_scale); None where it is
    fixed. scaled: fp16, whose scaler finds and leaves out gradients that are not finite by itself. leaves_out: whether
    train.on_anomaly is skip or rewind."""

    clip_norm: float | None = None
    loss_spike: float | None = None
    scale_bounds: tuple[float, float] | None = None
    scaled: bool = False
    leaves_out: bool = False


@dataclass
class Anomalies:
    """What was found so far, a part of a checkpoint. counts: steps by kind. streaks: steps in a row by kind. in_a_row:
    steps left out without one between. mean, variance: of the loss, over `seen` steps at most HORIZON."""

    counts: dict[str, int] = field(default_factory=dict)
    streaks: dict[str, int] = field(default_factory=dict)
    in_a_row: int = 0
    rewinds: int = 0
    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Anomalies:
        """From `dataclasses.asdict`. ValueError where that is something else."""
        made = cls(**saved)
        whole = [*made.counts.values(), *made.streaks.values(), made.in_a_row, made.rewinds, made.seen]
        if any(type(x) is not int for x in whole) or any(type(x) is not float for x in (made.mean, made.variance)):
            raise ValueError("counts of anomalies must be numbers")
        return made

    def judge(self, values: Mapping[str, float], limits: Limits) -> tuple[str, ...]:
        """The kinds that a step's values show; they are counted. `values`: objective (what was differentiated),
        infonce, grad_norm, logit_scale (as a factor), drift, gamma, as far as they are there."""
        found = [kind for kind, seen in self._at_once(values, limits).items() if seen]
        if not (found and limits.leaves_out) and "loss" not in found and "infonce" in values:
            self._remember(values["infonce"], limits)
        for kind, seen in _lasting(values, limits).items():
            self.streaks[kind] = self.streaks.get(kind, 0) + 1 if seen else 0
            found += [kind] * (self.streaks[kind] >= STREAK)
        self.counts = dict(Counter(self.counts) + Counter(found))
        return tuple(found)

    def acts_on(self, found: Sequence[str], limits: Limits) -> list[str]:
        """Those of the kinds for which a run stops or leaves a step out."""
        return [kind for kind in found if kind in NOT_FINITE or (kind == "spike" and limits.leaves_out)]

    def _at_once(self, values: Mapping[str, float], limits: Limits) -> dict[str, bool]:
        loss, norm = values["objective"], values.get("grad_norm", 0.0)
        infonce, highest = values.get("infonce", 0.0), self._highest(limits)
        return {
            "loss": not math.isfinite(loss),
            "gradient": math.isfinite(loss) and not math.isfinite(norm) and not limits.scaled,
            "spike": math.isfinite(loss) and infonce > highest,
        }

    def _highest(self, limits: Limits) -> float:
        """The highest loss that is no spike."""
        if limits.loss_spike is None or self.seen < HORIZON:
            return math.inf
        return self.mean + limits.loss_spike * math.sqrt(self.variance)

    def _remember(self, loss: float, limits: Limits) -> None:
        """Running mean and variance. A spike counts as the highest that is none: were it left out, a loss that stays
        at a new level would be one for ever."""
        if not math.isfinite(loss):
            return
        difference = min(loss, self._highest(limits)) - self.mean
        self.seen = min(self.seen + 1, HORIZON)
        share = 1 / self.seen
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)


def _lasting(values: Mapping[str, float], limits: Limits) -> dict[str, bool]:
    """What is wrong only if it goes on."""
    scale, bounds = values.get("logit_scale", math.nan), limits.scale_bounds or ()
    used = values.get("drift", 0.0) * (1 - values.get("gamma", 0.0))  # a row that is all new remembers nothing
    return {
        "clip": limits.clip_norm is not None and values.get("grad_norm", 0.0) > limits.clip_norm,
        "scale": any(abs(scale - bound) <= NEAR * bound for bound in bounds),
        "drift": used > STALE,
    }


def in_words(kind: str, values: Mapping[str, float], limits: Limits) -> str:
    """What a lasting anomaly means, and what to change."""
    if kind == "clip":
        norm = values["grad_norm"]
        return (
            f"the gradient's norm was above optim.clip_norm={limits.clip_norm:g} in each of the last {STREAK} steps "
            f"(now {norm:.3g}): batches of every kind are scaled to one length. Set optim.clip_norm={2 * norm:.2g}, so "
            "that it holds back outliers alone, or null"
        )
    if kind == "scale":
        low, high = limits.scale_bounds or (math.nan, math.nan)
        change = "lower optim.logit_scale_lr"
        if values["logit_scale"] > (low + high) / 2:
            change += ", raise model.logit_scale_max, or fix it with optim.logit_scale_lr=0"
        return (
            f"exp(logit_scale) has been at its bound for {STREAK} steps ({values['logit_scale']:.4g}; it is kept "
            f"between {low:g} and {high:g}): the temperature does not learn any more. To change it: {change}"
        )
    return (
        f"what the table remembers is off by {values['drift']:.1f} nats when a pair comes again, for {STREAK} steps: "
        "rows change faster than they are visited. To change it: a larger loss.gamma (1 remembers nothing), or a lower "
        "optim.lr"
    )


def dump(run: Path, step: int, content: Mapping[str, Any], bounded: bool) -> Path | None:
    """Write RUN/anomalies/step-N.json; `bounded`: None where MOST_FILES are there. OSError where it cannot be written.

    docs/training.md has what is in it. A number that is not finite is null.
    """
    folder = Path(run) / FOLDER
    folder.mkdir(exist_ok=True)
    if bounded and sum(1 for _ in folder.glob("step-*.json")) >= MOST_FILES:
        return None
    path = folder / f"step-{step:08d}.json"
    replace_text(path, json.dumps({"step": step, **content}, allow_nan=False) + "\n")
    return path


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Rewound:
    """What a rewind has written down: the steps whose batches are left out, and what was found."""

    left_out: frozenset[int]
    kinds: tuple[str, ...]


def rewinds_after(run: Path, step: int) -> list[Rewound]:
    """The rewinds of a run that a later step than `step` has caused. Files that are not of vlcl are passed over."""
    found = []
    for path in sorted((Path(run) / FOLDER).glob("step-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["action"] == "rewind" and int(content["step"]) > step:
                kinds = tuple(kind for kind in MEANING if kind in content["kinds"])
                found.append(Rewound(frozenset(int(x) for x in content["left_out"]), kinds))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found
