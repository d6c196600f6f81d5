"""What the pair table costs of a training step: read + write of a batch at N = 10 million rows, in the demo's step.

    python benchmarks/table_cost.py [--rows 10000000] [--batch 128] [--repeats 20]

One process; the step is forward, loss, backward, clip and AdamW of the demo model (configs/openmoji.yaml) on random
pixels, the table's part being timed inside of it. The claim in the docs is below 1 %.
"""

import statistics
import time
from typing import Annotated

import torch
import typer

from vlcl import distributed
from vlcl.config import load_config
from vlcl.loss_state import LossState
from vlcl.losses import build_loss
from vlcl.model import build_model


def main(
    rows: Annotated[int, typer.Option(help="N, rows of the table.")] = 10_000_000,
    batch: Annotated[int, typer.Option(help="Pairs a step.")] = 128,
    repeats: Annotated[int, typer.Option(help="Timed steps, after 3 to warm up.")] = 20,
) -> None:
    name = load_config("configs/openmoji.yaml").model.name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = build_model(name)
    encoder = built.encoder.to(device).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    loss = build_loss("em", num_pairs=rows)
    table = LossState(loss, rows, built.config["model_cfg"]["embed_dim"], device)
    size = built.config["preprocess_cfg"]["size"][0]
    images = torch.randn(batch, 3, size, size, device=device)
    tokens = built.tokenize(["two lines of a caption"] * batch).to(device)

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    steps, tables = [], []
    for _ in range(repeats + 3):
        row_B = torch.randint(rows, (batch,), device=device)
        start = now()
        features = encoder(images, tokens)
        peers = distributed.gather_peers(features, row_B)
        before_read = now()
        aux = table.read(peers.row_G)
        read = now() - before_read
        out = loss(features, peers, aux)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        before_write = now()
        table.write(peers.row_G, out.aux)
        end = now()
        steps.append(end - start)
        tables.append(read + end - before_write)
    step, cost = (statistics.median(values[3:]) for values in (steps, tables))
    share = statistics.median(t / s for t, s in zip(tables[3:], steps[3:]))
    print(f"{name} on {device}, batch {batch}, {rows:,} rows, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"step {1e3 * step:.1f} ms, table read + write {1e3 * cost:.3f} ms: {share:.3%} of the step")


if __name__ == "__main__":
    typer.run(main)
