"""The 5-shot linear probe with the benchmark's whole search, on digits: image forwards, and the time of the search.

    python benchmarks/eval_probe.py [MODEL] [--shots 5] [--seeds 0,1,2]

Forwards: what `vlcl eval elevater` sends through the image tower against what the benchmark's own procedure does for
the same records (90 or fewer runs of 10 epochs, 50 final epochs over training and test images). Time: the search on
cached features, all settings as one batched head, against the same settings one run at a time with torch's own layers,
loader and optimizer on the same features (the peer, in turns). Without MODEL: a ViT-B/32 of random weights.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vlcl_data_prep.mnist import build_mnist
from vlcl_eval.datasets.find import find_data_set
from vlcl_eval.elevater.command import evaluate
from vlcl_eval.elevater.metrics import accuracy
from vlcl_eval.elevater.probe import HeadStart, Task, language_head
from vlcl_eval.elevater.search import Setting, search
from vlcl_eval.elevater.tasks import draw_subset, probe_trainer
from vlcl_eval.elevater.work import Protocol
from vlcl_eval.features import Extractor
from vlcl_eval.models import load
from vlcl_eval.text import class_weights


def one_run(task: Task, start: HeadStart, setting: Setting, epochs: int = 10) -> float:
    """Best score of one setting, trained by itself."""
    norm = nn.BatchNorm1d(task.train_ND.shape[1], affine=False)
    linear = nn.Linear(start.weight_CD.shape[1], start.weight_CD.shape[0])
    linear.weight.data, linear.bias.data = start.weight_CD.clone(), start.bias_C.clone()
    optimizer = torch.optim.SGD(linear.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    loader = DataLoader(
        TensorDataset(task.train_ND, task.train_target), 64, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    best = 0.0
    for _ in range(epochs):
        norm.train()
        for x, y in loader:
            if len(x) > 1:
                optimizer.zero_grad()
                F.cross_entropy(linear(norm(x)), y).backward()
                optimizer.step()
        norm.eval()
        with torch.no_grad():
            best = max(best, task.score(linear(norm(task.test_ND)).softmax(1), task.test_target))
    return best


def main(
    model: Annotated[str, typer.Argument(help="As for vlcl eval elevater.")] = "ViT-B-32",
    shots: Annotated[int, typer.Option(help="Training images a class.")] = 5,
    seeds: Annotated[str, typer.Option(help="Of the subsets.")] = "0,1,2",
) -> None:
    numbers = tuple(int(seed) for seed in seeds.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_mnist(folder / "data")
        cache = folder / "cache"
        torch.manual_seed(0)  # a name without a tag has random weights: the same ones twice
        loaded = load(model)
        torch.manual_seed(0)
        began = time.perf_counter()
        protocol = Protocol(shots=(shots,), seeds=numbers, modes=("elevater",))
        records, _ = evaluate(model, folder / "data", ["mnist"], protocol, output=folder, cache=cache, say=print)
        whole = time.perf_counter() - began
        forwards, reference = (sum(r["images"][key] for r in records) for key in ("forwards", "reference"))
        print(f"image forwards: {forwards:,}; the benchmark's procedure: {reference:,}, {reference / forwards:.0f} x")
        print(f"all {len(records)} seeds, features included: {whole:.1f} s")
        data = find_data_set(folder / "data", "mnist")
        start = language_head(class_weights(loaded, data.classes, data.templates, None, cut=False))
        extractor = Extractor(loaded, cache, torch.device("cpu"))
        times: dict[str, list[float]] = {"batched": [], "one at a time": []}
        for seed in numbers:
            subset = draw_subset(data, data.train, shots, seed)
            features, _ = extractor.features(data, data.train, subset.rows)
            place = {row: i for i, row in enumerate(subset.rows)}

            def rows(wanted: list[int], features: Tensor = features, place: dict[int, int] = place) -> Tensor:
                return features[[place[row] for row in wanted]]

            targets = data.targets(data.train)
            test = (rows(subset.val), targets[subset.val])
            trainer = probe_trainer(rows, targets, subset, test, start, accuracy, torch.device("cpu"))
            task = Task(rows(subset.train), targets[subset.train], *test, accuracy)
            began = time.perf_counter()
            found = search(trainer.scores)
            times["batched"].append(time.perf_counter() - began)
            began = time.perf_counter()
            alone = search(lambda settings, task=task: [one_run(task, start, s) for s in settings])
            times["one at a time"].append(time.perf_counter() - began)
            same = "the same" if found.best == alone.best else "another"
            scored = f"{len(found.scores)} settings, best val {100 * found.score:.1f} %"
            print(f"seed {seed}: {scored}; one at a time chooses {same}")
    batched, one = (statistics.median(values) for values in times.values())
    ratio = f"{one / batched:.0f} x"
    print(f"search, median of {len(numbers)} seeds: batched {batched:.2f} s, one at a time {one:.1f} s, {ratio}")


if __name__ == "__main__":
    typer.run(main)
