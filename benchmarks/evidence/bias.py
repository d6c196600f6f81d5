"""Bias and noise along a training, beside the score: `em` at batch 32 of the study `emoji`, seed 0.

    vlcl data emoji data/emoji && python benchmarks/evidence/bias.py

One training with a checkpoint and an evaluation after epochs 1, 5, 10 and 15, then `vlcl bias` on each. Writes
docs/evidence/bias.md: |bias| and the standard deviation of one batch's gradient, both over the norm of the exact
gradient over all pairs, at batch 32, for the projection heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from few_shot import vlcl

FOLDER = Path(__file__).parent
RUN = Path("runs/evidence/bias")
TABLE = FOLDER.parents[1] / "docs" / "evidence" / "bias.md"
BATCH, RATE, EPOCH, EPOCHS = 32, 5e-4, 354, (1, 5, 10, 15)
ESTIMATORS = {"infonce": "the batch (`infonce`)", "dcl": "the batch, positive out (`dcl`)",
              "table as trained": "the rows of `em`", "exact a": "exact"}  # fmt: skip


def main() -> None:
    vlcl("train", str(FOLDER / "emoji.yaml"), f"train.batch_size={BATCH}", f"optim.lr={RATE}", f"train.output={RUN}",
         f"checkpoint.every={EPOCH}", "checkpoint.keep=100", f"eval.every={EPOCH}", "resume=auto",
         "loss.form=relative")  # fmt: skip # the default when the committed table was made
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    rows = []
    for epoch in EPOCHS:
        step = epoch * EPOCH
        output = RUN / f"bias-{epoch}"
        vlcl("bias", str(RUN / f"step-{step:08d}"), "--batch-sizes", str(BATCH), "--output", str(output))
        found = json.loads((output / "bias.json").read_text())
        score = next(x["val/infonce"] for x in lines if x["step"] == step and "val/infonce" in x)
        rows.append([str(epoch), f"{score:.2f}", f"{found['kappa']['p50']:.0f}", *cells(found)])
    head = ["epoch", "InfoNCE on OpenMoji", "κ, median", *ESTIMATORS.values()]
    table = [head, ["---"] * len(head), *rows]
    TABLE.write_text("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


def cells(found: dict[str, Any]) -> list[str]:
    """Bias, or the most that it can be, and noise of each estimator."""
    heads = {x["estimator"]: x for x in found["records"] if x["target"] == "projection heads"}
    of_each = [heads[name] for name in ESTIMATORS]
    biases = [f"{x['bias']:.2f}" if x["detected"] else f"< {x['bias_high']:.2f}" for x in of_each]
    return [f"{bias} ({x['sd_batch']:.2g})" for bias, x in zip(biases, of_each)]


if __name__ == "__main__":
    main()
