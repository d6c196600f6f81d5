"""Evaluation while training on pictures alone: nearest neighbours and, at the end, a linear classifier, both on the
labels of `data.val` and `data.test`. vlcl/evaluation.py calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from torch import Tensor

from vlcl import distributed
from vlcl.data.decode import BadSample
from vlcl.errors import UserError
from vlcl.from_config import picture_decoder_of
from vlcl.labelled import LabelledPictures
from vlcl.probe import Labelled, LinearProtocol, encode_labelled, knn_accuracy, linear_accuracy, nearest
from vlcl.report.page import Hit, RetrievalExample, save_examples
from vlcl.run import Run

SHOWN = 5  # neighbours of an example


def _encoded(run: Run, name: str) -> Labelled:
    """Features and labels of "bank", "val" or "test", by the weights of now; kept until the next step."""
    key = (name, run.state.step)
    if key not in run.features:
        for old in [old for old in run.features if old[1] != run.state.step]:
            del run.features[old]
        pictures = _pictures(run, name)
        built, device, size = run.state.built, run.accelerator.device, run.config.eval.batch_size
        batches = run.watch.each(
            pictures.batches(built.preprocess_eval, size, run.workers, device, pixels=True),
            f"step {run.state.step}: evaluating on {pictures.name}",
        )
        encoder = run.state.encoder_to_judge

        def encode(images_BCHW: Tensor) -> Tensor:
            return encoder.clip.encode_image(encoder.normalized(images_BCHW))

        found = encode_labelled(encode, batches, device, run.accelerator.autocast)
        if not len(found.label_N):
            raise UserError(
                f"{pictures.name}: none of the pictures has a label that can be read (a .cls file with a number). "
                "Name labelled ones with views.knn and data.val, or leave out data.val and data.test"
            )
        run.features[key] = found
    return run.features[key]


def _pictures(run: Run, name: str) -> LabelledPictures:
    if name == "bank":
        assert run.bank is not None
        return run.bank
    sources = run.val if name == "val" else run.test
    assert sources is not None
    return LabelledPictures(f"data.{name}", sources, picture_decoder_of(run.config.data))


def neighbours(run: Run, split: str) -> Iterator[tuple[str, float]]:
    """kNN accuracy of `data.val` or `data.test`, and examples of neighbours in the run folder."""
    views, bank, queries = run.config.views, _encoded(run, "bank"), _encoded(run, split)
    yield f"{split}/knn_top1", knn_accuracy(bank, queries, views.knn_neighbours, views.knn_temperature)
    yield f"{split}/skipped", float(queries.skipped)
    if split == "val" and distributed.rank() == 0 and run.config.eval.examples:
        examples = neighbour_examples(
            _pictures(run, split), queries, _pictures(run, "bank"), bank, run.config.eval.examples
        )
        save_examples(run.folder, examples, [])


def linear(run: Run, split: str) -> Iterator[tuple[str, float]]:
    """Accuracy of a linear classifier of the bank's features on `data.val` or `data.test`."""
    epochs = run.config.views.linear_epochs
    if not epochs:
        return
    bank, queries = _encoded(run, "bank"), _encoded(run, split)
    value = 0.0
    if distributed.rank() == 0:
        value = linear_accuracy(bank, [queries], LinearProtocol(epochs, seed=run.config.train.seed)).accuracies[0]
    yield f"{split}/linear_top1", distributed.broadcast(value)


def neighbour_examples(
    asked: LabelledPictures, queries: Labelled, of: LabelledPictures, bank: Labelled, count: int
) -> list[RetrievalExample]:
    """The nearest pictures of the bank to `count` of the queries, spread evenly; right are those of the same class."""
    total, found = len(queries.row_N), []
    for i in [int((place + 0.5) * total / count) for place in range(min(count, total))]:
        cosine_QK, place_QK = nearest(bank.feature_ND, queries.feature_ND[i : i + 1], max(SHOWN, 100))
        with suppress(BadSample, OSError):  # examples are for looking at; a shard that fails now costs one of them
            image, name = asked.picture(int(queries.row_N[i]))
            same_K = bank.label_N[place_QK[0]] == queries.label_N[i]
            hits = []
            for n in range(min(SHOWN, len(same_K))):
                neighbour, its_name = of.picture(int(bank.row_N[place_QK[0, n]]))
                hits.append(Hit(neighbour, its_name, float(cosine_QK[0, n]), bool(same_K[n])))
            rank = int(same_K.int().argmax()) + 1 if bool(same_K.any()) else len(same_K) + 1
            found.append(RetrievalExample(name, rank, None, hits, image))
    return found
