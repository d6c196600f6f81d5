"""Evaluation while training: EVALUATORS is the list, a new evaluation is one more entry (and its metrics' records).

An evaluator is called on all ranks with the weights in evaluation mode, and yields the names and values of its metrics,
the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlcl import distributed
from vlcl.data.stream import EvalStream, make_loader
from vlcl.from_config import make_decoder
from vlcl.logs import METRICS_FILE, RunLog, read_metrics
from vlcl.metrics import is_held_out
from vlcl.report.page import examples_as_text, save_examples
from vlcl.run import Run
from vlcl.zeroshot import encode_pairs, retrieval, retrieval_examples, zeroshot_folder

Say = Callable[[str], None]  # for what is worth reading once, at the end of the run
Evaluator = Callable[[Run, Say], Iterator[tuple[str, float]]]


def held_out_pairs(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Retrieval among the pairs of data.val, and examples of it in the run folder."""
    if run.val is None or run.val_reader is None:
        return
    settings, state, device = run.config.eval, run.state, run.accelerator.device
    stream = EvalStream(run.val, settings.batch_size, run.val_reader, distributed.rank(), distributed.world_size())
    loader = make_loader(stream, 0 if run.val_reader.at_hand else run.workers, device)
    pairs = encode_pairs(state.encoder_to_judge, loader, device, run.accelerator.autocast)
    yield from retrieval(pairs).items()
    yield "skipped", sum(pairs.skipped.values())
    if distributed.rank() == 0 and settings.examples:
        decoder = make_decoder(run.config, state.built.preprocess_eval, state.built.tokenize)
        examples = retrieval_examples(pairs, run.val, decoder, settings.examples)
        save_examples(run.folder, *examples)
        say(examples_as_text(*examples))


def class_folder(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Zero-shot accuracy on the folder of classes eval.zeroshot."""
    settings, state, accelerator = run.config.eval, run.state, run.accelerator
    if settings.zeroshot:
        scores = zeroshot_folder(
            state.encoder_to_judge, state.built, settings.zeroshot, settings.templates, settings.batch_size,
            accelerator.device, accelerator.autocast,
        )  # fmt: skip
        yield from scores.items()


EVALUATORS: tuple[Evaluator, ...] = (held_out_pairs, class_folder)


@torch.no_grad()
def evaluate(run: Run, log: RunLog, last: bool) -> dict[str, float]:
    """Run all EVALUATORS and log what they find as val/NAME (a collective); the averaged weights are judged where there
    are some. `last`: of the run, which says more."""
    encoder = run.state.encoder_to_judge
    training = encoder.training
    encoder.eval()
    say = log.message if last else _say_nothing
    results = {f"val/{name}": value for evaluator in EVALUATORS for name, value in evaluator(run, say)}
    encoder.train(training)
    if results:
        log.metrics(run.state.step, results)
    return results


def _say_nothing(text: str) -> None:
    del text


def evaluated(run: Run) -> bool:
    """Whether metrics.jsonl has an evaluation of this step (the same answer on every rank)."""
    found = False
    if distributed.rank() == 0 and (run.folder / METRICS_FILE).is_file():
        found = any(line["step"] == run.state.step and any(map(is_held_out, line)) for line in read_metrics(run.folder))
    return distributed.broadcast(found)
