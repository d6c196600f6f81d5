"""Every loss: time of forward and backward against B, doubling, and the exponent between the last two.

    python benchmarks/loss_scaling.py [--largest 4096] [--repeats 5]

Median of the rounds. All losses compare all pairs of a batch, so that the exponent tends to 2; below it, what is linear
in B still counts. NeuCLIP has 1,024 prototypes here: its own part is linear in B.
"""

import math
import statistics
from typing import Annotated

import loss_cost
import typer
from loss_cost import make_step, seconds_of

from vlcl.losses import PRESETS


def main(
    largest: Annotated[int, typer.Option(help="Largest B.")] = 4096,
    width: Annotated[int, typer.Option(help="D.")] = 256,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
) -> None:
    batches = [largest // 16, largest // 8, largest // 4, largest // 2, largest]
    print("loss          " + "".join(f"{f'B={batch}':>12}" for batch in batches) + "    exponent   (ms)")
    for name in PRESETS:
        settings = {"prototypes": 1024, "prototype_steps": 2} if name == "neuclip" else {}
        loss_cost.LOSSES[name] = (name, settings)
        times = []
        for batch in batches:
            step = make_step(name, batch, width)
            step()
            times.append(1e3 * statistics.median(seconds_of(step) for _ in range(repeats)))
        exponent = math.log2(times[-1] / times[-2])
        print(f"{name:14}" + "".join(f"{value:12.1f}" for value in times) + f"{exponent:12.2f}")


if __name__ == "__main__":
    typer.run(main)
