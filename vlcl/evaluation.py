"""Evaluation while training: EVALUATORS is the list, a new evaluation is one more entry (and its metrics' records).
Those of AT_THE_END run once, after the last step.

An evaluator is called on all ranks with the weights in evaluation mode, and yields the names and values of its metrics,
the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vlcl import distributed
from vlcl.config.samples import limits_of
from vlcl.data.decode import decode_image
from vlcl.data.reader import Sources
from vlcl.data.stream import EvalStream, make_loader
from vlcl.from_config import make_decoder, zeroshot_sets
from vlcl.logs import METRICS_FILE, RunLog, read_metrics
from vlcl.metrics import is_held_out, is_test
from vlcl.report.page import examples_as_text, save_examples
from vlcl.report.pictures import GRID_FILE
from vlcl.run import Run
from vlcl.sharding import gathered
from vlcl.view_evaluation import linear, neighbours
from vlcl.zeroshot import EncodedPairs, encode_pairs, infonce, retrieval, retrieval_examples, zeroshot_folder

Say = Callable[[str], None]  # for what is worth reading once, at the end of the run
Evaluator = Callable[[Run, Say], Iterator[tuple[str, float]]]


def held_out_pairs(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Retrieval among the pairs of data.val, and examples of it in the run folder; of pictures alone, kNN."""
    if run.val is None:
        return
    if run.bank is not None:
        yield from neighbours(run, "val")
        return
    pairs, examples, built = encode(run, run.val, "val"), run.config.eval.examples, run.state.built
    yield from scores_of(run, pairs, "val")
    if distributed.rank() == 0 and examples:
        decoder = make_decoder(run.config, built.preprocess_eval, built.tokenize)
        found = retrieval_examples(pairs, run.val, decoder, examples)
        save_examples(run.folder, *found)
        say(examples_as_text(*found))


def test_pairs(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Retrieval among the pairs of data.test; of pictures alone, kNN."""
    if run.test is not None and run.bank is not None:
        yield from neighbours(run, "test")
    elif run.test is not None:
        yield from scores_of(run, encode(run, run.test, "test"), "test")


def encode(run: Run, sources: Sources, split: str) -> EncodedPairs:
    """Features of held-out pairs, by the weights that are judged (a collective)."""
    reader, device = run.readers[split], run.accelerator.device
    size = run.config.eval.batch_size
    stream = EvalStream(sources, size, reader, distributed.rank(), distributed.world_size())
    loader = make_loader(stream, 0 if reader.at_hand else run.workers, device)
    batches = run.watch.each(loader, f"step {run.state.step}: evaluating on data.{split}")
    return encode_pairs(run.state.encoder_to_judge, batches, device, run.accelerator.autocast)


def scores_of(run: Run, pairs: EncodedPairs, split: str) -> Iterator[tuple[str, float]]:
    """Loss and recall among the pairs, and how many were left out."""
    scale = float(run.state.encoder_to_judge.clip.logit_scale.exp())
    yield f"{split}/infonce", infonce(pairs, scale, run.config.train.batch_size)
    for name, value in retrieval(pairs).items():
        yield f"{split}/{name}", value
    yield f"{split}/skipped", sum(pairs.skipped.values())


def class_folders(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Zero-shot accuracy on the sets of eval.zeroshot: the mean over them and, where there are several, of each."""
    settings, state, accelerator, data = run.config.eval, run.state, run.accelerator, run.config.data
    of_sets: dict[str, dict[str, float]] = {}
    for name, folder in zeroshot_sets(settings.zeroshot).items():
        of_sets[name] = zeroshot_folder(
            state.encoder_to_judge, state.built, folder, settings.templates, settings.batch_size,
            accelerator.device, accelerator.autocast,
            partial(decode_image, limits=limits_of(data), background=data.background),
            partial(run.watch.at, f"step {state.step}: evaluating on eval.zeroshot, {name}"),
        )  # fmt: skip
    for key in next(iter(of_sets.values()), {}):
        yield f"val/{key}", sum(scores[key] for scores in of_sets.values()) / len(of_sets)
        if len(of_sets) > 1:
            yield from ((f"val/{key}/{name}", scores[key]) for name, scores in of_sets.items())


def linear_classifiers(run: Run, say: Say) -> Iterator[tuple[str, float]]:
    """Of pictures alone, on what data.val and data.test have."""
    for split, sources in (("val", run.val), ("test", run.test)):
        if sources is not None and run.bank is not None:
            yield from linear(run, split)


EVALUATORS: tuple[Evaluator, ...] = (held_out_pairs, class_folders)
AT_THE_END: tuple[Evaluator, ...] = (test_pairs, linear_classifiers)


@torch.no_grad()
def evaluate(run: Run, log: RunLog, last: bool) -> dict[str, float]:
    """Run all EVALUATORS and log what they find (a collective); the averaged weights are judged where there are some.
    `last`: of the run, which says more, and runs AT_THE_END as well."""
    encoder = run.state.encoder_to_judge
    training = encoder.training
    encoder.eval()
    say = log.message if last else _say_nothing
    evaluators = EVALUATORS + AT_THE_END * last
    with gathered(encoder):
        results = {name: value for evaluator in evaluators for name, value in evaluator(run, say)}
    encoder.train(training)
    if results:
        log.metrics(run.state.step, results)
    if run.val is not None and run.config.eval.examples:
        log.picture(run.state.step, "retrieval", run.folder / GRID_FILE)
    return results


def _say_nothing(text: str) -> None:
    del text


def evaluated(run: Run, last: bool) -> bool:
    """Whether metrics.jsonl has an evaluation of this step (the same answer on every rank); `last`: that of the end."""
    found = False
    if distributed.rank() == 0 and (run.folder / METRICS_FILE).is_file():
        of_evaluation = is_test if last and run.test is not None else is_held_out
        lines = read_metrics(run.folder)
        found = any(line["step"] == run.state.step and any(map(of_evaluation, line)) for line in lines)
    return distributed.broadcast(found)
