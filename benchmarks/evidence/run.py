"""The trainings of docs/evidence.md: python benchmarks/evidence/run.py [STUDY ...] [--jobs 2]

Needs `vlcl data emoji data/emoji`; for the studies of icons, `vlcl data icons data/icons`; for those of views and of a
locked tower, what views.yaml, locked.yaml and icons-locked.yaml say. A finished training is a
line of docs/evidence/results.jsonl, and is not run again; delete its line to run it anew. Goes on where it was stopped.
Tables and figures of a study: runs/evidence/STUDY/compare.md and compare.png. Start it in the root of the checkout.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlcl.compare.command import compare
from vlcl.config import load_config
from vlcl.errors import UserError

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "docs" / "evidence" / "results.jsonl"
RELATIVE = "em:form=relative"  # the default until the form went with the batch, and what the parts were tried in
EM_HALF = f"{RELATIVE}:gamma=0.5"  # the default before; its gain is today's at batch 16 alone
EM_BEFORE = f"{RELATIVE}:positive=true:prediction=null:gamma=0.8:optim.logit_scale_ratio=1"  # and the one before that
FORMS = (RELATIVE, "em:form=absolute", "em:form=balanced")
CHOSEN_ON = "val/text_to_image_R@10"  # of another hand: R@1 is too small there to choose by
RATES = (1e-3, 2e-3, 4e-3)  # at batch 128, times the square root of batch size / 128
LOSSES = ("infonce", "dcl", "em")
PEERS = ("siglip:model.logit_scale_init=10", "sogclr", "fastclip-v1", "fastclip-v3", "neuclip:prototypes=1024")
# 4,096 prototypes, the default, would be one to three pairs here, and ten times as slow as the other losses


@dataclass(frozen=True)
class Study:
    """One comparison: what it asks, and what `vlcl compare` is told."""

    asks: str
    losses: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    config: str = "emoji.yaml"
    seeds: int = 3
    overrides: tuple[str, ...] = ()
    lrs: tuple[float, ...] = RATES  # one alone is taken for all, three seeds; of several the best is looked for
    chosen_on: str = CHOSEN_ON


def map_of_memory(name: str, config: str, lengths: Mapping[str, Mapping[int, int]]) -> dict[str, Study]:
    """How often pairs are seen, and how many there are: the studies NAME-PAIRS-EPOCHS, at one rate for all. lengths:
    by pairs, the epochs, and steps of warm-up for each."""
    some = [f"data.{split}=data/emoji/{vendor}/{{00000,00001}}.tar"
            for split, vendor in (("train", "google"), ("val", "openmoji"), ("test", "facebook"))]  # fmt: skip
    data = {"1k": some, "4k": ["data.train=data/emoji/google"], "11k": []}
    return {
        f"{name}-{pairs}-{epochs}": Study(
            f"Does memory pay with {pairs} pairs, each seen {epochs} times?", ("dcl", "em", "infonce"), (16,), config,
            overrides=(*data[pairs], f"train.epochs={epochs}", f"optim.warmup={warmup}"), lrs=(2e-3,),
        )
        for pairs, of_pairs in lengths.items()
        for epochs, warmup in of_pairs.items()
    }  # fmt: skip


STUDIES = {
    "first": Study("A small batch against a large one?", ("infonce", "em", "dcl"), (16, 256)),
    "emoji": Study("Does a small batch do a large one's work?", LOSSES, (16, 32, 64, 256)),
    "before": Study("And em as it was?", (EM_HALF, EM_BEFORE), (16, 32, 64, 256)),
    "gain": Study("At a large batch, how much should a visit count?", (RELATIVE, EM_HALF, "dcl"), (256,),
                  overrides=("train.epochs=40",), lrs=(2e-3,)),
    "gain-short": Study("And in a short training?",
                        (RELATIVE, *(f"{RELATIVE}:{other}" for other in (
                            "gamma=0.75", "gamma=0.9", "gamma_schedule=cosine:gamma_min=0.5")), "dcl"), (16,),
                        "locked.yaml", overrides=("train.epochs=5", "optim.warmup=60"), lrs=(2e-3,)),
    "long": Study("And after 40 epochs?", LOSSES, (16, 256, 64, 32), overrides=("train.epochs=40",),
                  lrs=(2e-3,)),
    "peers": Study("How do other losses with a memory do?",
                   ("infonce", "em", *PEERS), (32, 256)),
    "icons": Study("Does it carry over to other data?", LOSSES, (16, 64, 256), "icons.yaml"),
    "locked": Study("Against a locked image tower?", LOSSES, (16, 64, 256, 32), "locked.yaml"),
    "locked-long": Study("And after 40 epochs of that?", LOSSES, (16, 32, 64, 256), "locked.yaml",
                         overrides=("train.epochs=40",), lrs=(2e-3,)),
    "locked-peers": Study("How do other losses do there?", (*LOSSES, *PEERS), (32, 256, 16, 64),
                          "locked.yaml"),
    "locked-even": Study("And at 256, at the same rate for all?", (*LOSSES, "sogclr"), (256,), "locked.yaml",
                         lrs=(2e-3,)),
    "icons-locked": Study("Does that carry over to other data?", LOSSES, (16, 64, 256), "icons-locked.yaml"),
    "views": Study("And on pictures alone, against a momentum encoder's keys?", ("infonce", "dcl", RELATIVE),
                   (64, 128, 32, 256), "views.yaml", lrs=(2e-3,), chosen_on="val/knn_top1"),
    "views-rates": Study("At other rates?", ("infonce", "dcl", RELATIVE), (32, 256), "views.yaml", seeds=1,
                         lrs=(1e-3, 4e-3), chosen_on="val/knn_top1"),
    "icons-locked-24": Study("And after 24 epochs of them?", ("dcl", "em", "infonce"), (16,), "icons-locked.yaml",
                             overrides=("train.epochs=24",), lrs=(2e-3,)),
    "short": Study("And after 5 epochs of that?", LOSSES, (16,), "locked.yaml",
                   overrides=("train.epochs=5", "optim.warmup=60"), lrs=(2e-3,)),
    "ablation": Study("Which part does it, and at which gain?", (RELATIVE, "dcl", "infonce", *(
        f"{RELATIVE}:{other}" for other in (
            "positive=true", "prediction=null", "prediction=similarity", "prediction=level", "gamma=0.3", "gamma=0.75",
            "gamma=0.9", "gamma_schedule=cosine:gamma_min=0.5", "gamma_schedule=visits", "order=before", "mode=sample",
            "optim.logit_scale_ratio=1", "temperature=fixed", "optim.clip_norm=1.0", "optim.beta1=0.8",
            "gamma=0.75:temperature=fixed", "gamma=1:temperature=fixed", "bank=240", "bank=1008",
        )), *(f"em:form=absolute{other}" for other in ("", ":gamma=0.3", ":bank=240", ":temperature=fixed")),
        "em:form=balanced"), (16,), "locked.yaml", lrs=(2e-3,)),
    **map_of_memory("map", "emoji.yaml", {
        "1k": {15: 15, 45: 45, 120: 120}, "4k": {15: 60, 45: 200, 120: 200}, "11k": {5: 60, 15: 200, 40: 200},
    }),
    **map_of_memory("locked", "locked.yaml", {
        "4k": {5: 60, 15: 60, 45: 200, 120: 200}, "11k": {5: 60, 15: 200, 40: 200}, "1k": {15: 15, 45: 45, 120: 120},
    }),
}  # fmt: skip
STUDIES |= {
    f"{name}-forms": replace(study, asks="What should a positive pull with?", losses=FORMS)
    for name, study in STUDIES.items()
    if study.losses == LOSSES or (name.startswith(("map-", "locked-")) and name != "locked-peers")
}


def run(name: str, jobs: int) -> None:
    study = STUDIES[name]
    print(f"{name}: {study.asks}")
    weights = load_config(FOLDER / study.config, study.overrides).model.pretrained_image
    if weights and not Path(weights).is_file():
        script = f"python benchmarks/evidence/make_patches.py {study.config}"
        raise UserError(f"study {name}: {weights}, the weights of its locked tower, is not there; to make it: {script}")
    compare(
        FOLDER / study.config, losses=study.losses, batch_sizes=study.batch_sizes, seeds=study.seeds, lrs=study.lrs,
        scale_lr="sqrt", tune=len(study.lrs) > 1, select_on=study.chosen_on, results=RESULTS, discard=True, jobs=jobs,
        output=f"runs/evidence/{name}", overrides=study.overrides,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; none: all of them")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    asked = parser.parse_args()
    for name in asked.studies:
        if name not in STUDIES:
            parser.error(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    try:
        for name in asked.studies or STUDIES:
            run(name, asked.jobs)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the cells have saved; the same command goes on
