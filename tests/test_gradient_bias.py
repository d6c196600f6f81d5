"""The gradient-bias diagnostic: against dense autograd, all batches enumerated, pure noise, and end to end."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import assert_same
from shards import make_shards, tiny_model
from torch import Tensor
from typer.testing import CliRunner

from vlcl.batch import Aux, Features, Peers
from vlcl.cli import app
from vlcl.config import load_config
from vlcl.gradient_bias.batches import (
    Embeddings,
    Estimator,
    Heads,
    LogScale,
    Pairs,
    batch_gradients,
    exact_gradient,
    permutation_gradients,
)  # fmt: skip
from vlcl.gradient_bias.measure import Tally, exact_statistics, held, measure, predicted_bias, standard_estimators
from vlcl.gradient_bias.towers import embed, encoder_weights
from vlcl.losses import ContrastiveLoss
from vlcl.losses.estep import EStep, Rate
from vlcl.losses.mstep import Temperature
from vlcl.losses.predictors import Level
from vlcl.model import build_model
from vlcl.train import train


def make_pairs(num: int, width: int = 16, noise: float = 1.0, scale: float = 9.0, seed: int = 0) -> Pairs:
    g = torch.Generator().manual_seed(seed)
    shared, *own = (torch.randn(num, width, generator=g, dtype=torch.float64) for _ in range(3))
    image, text = (shared + noise * x for x in own)
    return Pairs.of(image, text, scale)


def dense_gradients(pairs: Pairs, index: Tensor) -> list[Tensor]:
    """InfoNCE on the pairs `index` by autograd through all similarities and the normalization to length 1."""
    image, text = (x.clone().requires_grad_() for x in (pairs.image_ND, pairs.text_ND))
    log_scale = torch.tensor(math.log(pairs.scale), dtype=torch.float64, requires_grad=True)
    logits = log_scale.exp() * F.normalize(image[index], dim=1) @ F.normalize(text[index], dim=1).T
    label = torch.arange(len(index))
    loss = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    return list(torch.autograd.grad(loss, [image, text, log_scale]))


def as_vector(gradients: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in gradients[:2]])


def test_the_exact_gradient_is_that_of_all_pairs_in_one_matrix() -> None:
    pairs = make_pairs(256)
    expected = dense_gradients(pairs, torch.arange(256))
    got = exact_gradient(pairs)
    assert_same([got.image_JBD[0], got.text_JBD[0], got.log_scale_J[0]], expected)


def called(loss: ContrastiveLoss, pairs: Pairs, index: Tensor, memory: Aux, step: int) -> tuple[list[Tensor], Aux]:
    """The loss itself on one batch: gradients in place, and what it remembers."""
    image, text = (x.clone().requires_grad_() for x in (pairs.image_ND, pairs.text_ND))
    log_scale = torch.tensor(math.log(pairs.scale), dtype=torch.float64, requires_grad=True)
    own_image, own_text = (F.normalize(x[index], dim=1) for x in (image, text))
    visits = None if memory.visits_G is None else memory.visits_G[index]
    aux = Aux({name: x[index] for name, x in memory.rows.items()}, visits, memory.shared)
    peers = Peers(own_image.detach(), own_text.detach(), index)
    out = loss(Features(own_image, own_text, log_scale.exp()), peers, aux, step)
    return list(torch.autograd.grad(out.loss, [image, text, log_scale])), out.aux or Aux()


LOSSES = [
    ContrastiveLoss(),
    ContrastiveLoss(positive=False, epsilon=1e-3),
    ContrastiveLoss(60, EStep(Rate(gamma=0.3)), order="before"),
    ContrastiveLoss(60, EStep(Rate(gamma=0.3)), max_log_weight=-2.0, epsilon=1e-2),
    ContrastiveLoss(60, EStep(Rate("adaptive", log_alpha=1.0)), form="absolute"),
    ContrastiveLoss(60, EStep(Rate("visits")), form="absolute", positive=False, order="before"),
    ContrastiveLoss(60, EStep(Rate(gamma=0.4)), form="balanced"),
    ContrastiveLoss(60, EStep(Rate(gamma=0.5), Level())),
    ContrastiveLoss(60, EStep(Rate(gamma=0.5), Level()), order="before"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=range(len(LOSSES)))
def test_batches_at_once_are_calls_of_the_loss_one_after_another(loss: ContrastiveLoss) -> None:
    pairs = make_pairs(60)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(60, 2, generator=g, dtype=torch.float64) - 4
    rows[::4] = torch.nan
    visits = torch.where(rows[:, 0].isnan(), 0, 3)
    shared = {name: x.double() for name, x in loss.initial(16).items()}
    memory = Aux(dict.fromkeys(loss.columns, rows), visits, shared)
    index_JB = torch.randperm(60, generator=g)[:56].view(8, 7)
    got, after, _ = permutation_gradients(Estimator("x", loss, memory, step=2), pairs, index_JB, memory, g)
    for number, index in enumerate(index_JB):
        expected, new = called(loss, pairs, index, memory, step=2)
        assert_same(
            [got.image_JBD[number], got.text_JBD[number], got.log_scale_J[number]],
            [expected[0][index], expected[1][index], expected[2]],
        )
        if new.rows:
            assert_same([after.rows["residual"][index]], [new.rows["residual"]])
        memory = replace(memory, shared={**memory.shared, **new.shared})
    assert_same(after.shared.values(), memory.shared.values(), 1e-6)  # the loss keeps them in float32


def test_a_sampled_u_is_another_a() -> None:
    pairs = make_pairs(40)
    a = exact_statistics(pairs).a_NK
    sampled = ContrastiveLoss(40, EStep(Rate()), order="before", positive=False, sample=True)
    index = torch.arange(40).view(4, 10)
    drawn = torch.empty(4, 10, 2, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(5))
    visits = torch.ones(40, dtype=torch.long)
    got, *_ = batch_gradients(sampled, pairs, index, Aux({"residual": a}, visits), 0, torch.Generator().manual_seed(5))
    other = Aux({"residual": a - drawn.log().view(40, 2)}, visits)
    expected, *_ = batch_gradients(replace(sampled, sample=False), pairs, index, other, 0, torch.Generator())
    assert_same(
        [got.image_JBD, got.text_JBD, got.log_scale_J], [expected.image_JBD, expected.text_JBD, expected.log_scale_J]
    )


def expectation(estimator: Estimator, pairs: Pairs, size: int) -> Tensor:
    """The gradient of a batch, averaged over all batches there are."""
    index_JB = torch.tensor(list(itertools.combinations(range(len(pairs)), size)))
    total = torch.zeros(2 * len(pairs), pairs.image_ND.shape[1], dtype=torch.float64)
    gradients, *_ = batch_gradients(estimator.loss, pairs, index_JB, estimator.memory, 0, torch.Generator())
    for index, image, text in zip(index_JB, gradients.image_JBD, gradients.text_JBD):
        total.index_add_(0, torch.cat([index, index + len(pairs)]), torch.cat([image, text]))
    return (total / len(index_JB)).flatten()


@pytest.mark.parametrize("size", [2, 3])
def test_small_enough_to_enumerate_all_batches(size: int) -> None:
    pairs = make_pairs(6, width=4, scale=3.0)
    exact = Embeddings(6).vector(exact_gradient(pairs))
    held_a = held("exact a", exact_statistics(pairs).a_NK, "")
    torch.testing.assert_close(expectation(held_a, pairs, size), exact, rtol=1e-10, atol=1e-10)
    # The bias of InfoNCE, from the dense loss alone
    batches = list(itertools.combinations(range(6), size))
    mean = torch.stack([as_vector(dense_gradients(pairs, torch.tensor(index))) for index in batches]).mean(dim=0)
    bias = float((mean - exact).norm() / exact.norm())
    assert bias > 0.05
    (record,) = measure(pairs.image_ND, pairs.text_ND, 3.0, [size], 400, [Estimator("infonce")])
    assert record.detected
    assert abs(record.bias - bias) < 3 * record.bias_se
    assert record.bias_se < 0.05 * bias
    cosine = float(F.cosine_similarity(mean, exact, dim=0))
    assert record.cosine_corrected == pytest.approx(cosine, abs=0.02)
    assert record.along == pytest.approx(float(mean @ exact / exact.square().sum()), abs=3 * record.along_se)


def test_bias_falls_with_the_batch_and_exact_a_has_none() -> None:
    pairs = make_pairs(256)
    found = measure(pairs.image_ND, pairs.text_ND, pairs.scale, [4, 16, 64, 256], 24)
    by_name = {name: [r for r in found if r.estimator == name] for name in ("infonce", "exact a", "sampled u")}
    biases = [r.bias for r in by_name["infonce"]]
    assert all(r.detected for r in by_name["infonce"][:3])
    assert biases == sorted(biases, reverse=True)
    assert biases[0] > 3 * biases[2]
    assert not by_name["infonce"][3].detected  # a batch of all pairs is the loss itself
    assert biases[3] < 1e-6
    assert [r.batch_size for r in by_name["exact a"] if r.detected] == []
    sampled, exact, plain = (by_name[name][0].sd_batch or 0.0 for name in ("sampled u", "exact a", "infonce"))
    assert sampled > exact > plain > 0
    assert all(r.a_error_abs < 1e-12 for r in by_name["exact a"])
    assert by_name["infonce"][0].a_error < -0.1  # the log of a small mean is too small


def test_noise_alone_is_not_read_as_bias() -> None:
    exact = torch.randn(40, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    squares, seen = [], 0
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        tally = Tally(exact, 20)
        for _ in range(20):
            tally.add(exact + 3 * torch.randn(40, generator=g, dtype=torch.float64), torch.zeros(1))
        found = tally.summary()
        squares.append(math.copysign(found["bias"] ** 2, found["bias"]))
        seen += found["detected"]
        assert found["sd_permutation"] == pytest.approx(3 * 40**0.5 / float(exact.norm()), rel=0.25)
    mean, error = torch.tensor(squares).mean(), torch.tensor(squares).std() / 100**0.5
    assert abs(mean) < 3 * error  # unbiased: half of them are negative
    assert seen <= 5


def test_a_bias_below_the_noise_is_found_with_enough_draws() -> None:
    exact = torch.ones(40, dtype=torch.float64)
    tally, g = Tally(exact, 4000), torch.Generator().manual_seed(0)
    for _ in range(4000):
        tally.add(1.2 * exact + 3 * torch.randn(40, generator=g, dtype=torch.float64), None)
    found = tally.summary()
    assert found["detected"]
    assert found["bias"] == pytest.approx(0.2, abs=3 * found["bias_se"])
    assert found["along"] == pytest.approx(1.2, abs=3 * found["along_se"])
    assert found["sd_batch"] is None


def test_unbiased_over_seeds_on_real_batches() -> None:
    pairs = make_pairs(64)
    estimators = [held("exact a", exact_statistics(pairs).a_NK, "")]
    found = [measure(pairs.image_ND, pairs.text_ND, 9.0, [8], 16, estimators, seed=seed)[0] for seed in range(12)]
    assert sum(r.detected for r in found) <= 1
    signed = torch.tensor([math.copysign(r.bias**2, r.bias) for r in found])
    assert abs(signed.mean()) < 3 * signed.std() / 12**0.5


def test_kappa_by_hand() -> None:
    image = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    scale = math.log(2) / 0.8  # anchor 0 has negatives of e^s = 2 and 1: p = 2/3, 1/3
    exact = exact_statistics(Pairs.of(image, torch.eye(3, dtype=torch.float64), scale))
    assert float(exact.kappa_NK[0, 0]) == pytest.approx(2 * (4 / 9 + 1 / 9))
    assert float(exact.a_NK[0, 0]) == pytest.approx(math.log(1.5) - 0.6 * scale)
    assert exact.kappa_NK[1:, 0].tolist() == pytest.approx([1.0, 1.0])  # both negatives alike
    # text 0 sees images 1 and 2, both at 0; text 1 sees image 0 at 0.8 and image 2 at 0
    assert exact.kappa_NK[:, 1].tolist() == pytest.approx([1.0, 10 / 9, 1.0])
    assert float(exact.a_NK[1, 1]) == pytest.approx(math.log(1.5) - scale)


@pytest.mark.parametrize("positive", [True, False])
def test_first_order_theory_holds_for_large_batches(positive: bool) -> None:
    pairs = make_pairs(384, scale=4.0)
    exact = exact_statistics(pairs)
    assert float(exact.kappa_NK.median()) < 4
    target = Embeddings(384)
    reference = target.vector(exact_gradient(pairs))
    estimators = [Estimator("own", ContrastiveLoss(positive=positive))]
    for record in measure(pairs.image_ND, pairs.text_ND, 4.0, [48, 128], 48, estimators):
        predicted = float(target.vector(predicted_bias(pairs, exact, record.batch_size, positive)).norm())
        assert record.detected
        assert record.bias == pytest.approx(predicted / float(reference.norm()), rel=0.1, abs=2 * record.bias_se)


def test_first_order_theory_by_the_formula_of_each_anchor() -> None:
    """The sum over anchors of its coefficients times R and R2, each a gradient by autograd."""
    pairs, size = make_pairs(24, width=5), 9
    exact = exact_statistics(pairs)
    image, text = (x.clone().requires_grad_() for x in (pairs.image_ND, pairs.text_ND))
    cos = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    m, n, total = size - 1, 23, torch.zeros((), dtype=torch.float64)
    for k, side in enumerate((cos, cos.T)):
        for i in range(24):
            others = torch.arange(24) != i
            h = pairs.scale * (side[i][others] - side[i, i])
            z = h.detach().exp()
            p, p2 = z / z.sum(), z**2 / (z**2).sum()
            kappa, g = float(n * (p**2).sum()), float(z.mean())
            assert float(exact.kappa_NK[i, k]) == pytest.approx(kappa)
            first = 1 - g / (g + 1 / n) + (1 / m - 1 / n) * kappa
            total = total + (first * (p @ h) - (1 / m - 1 / n) * kappa * (p2 @ h)) / (2 * 24)
    expected = torch.autograd.grad(total, [image, text])
    got = predicted_bias(pairs, exact, size, positive=False)
    assert_same([got.image_JBD[0], got.text_JBD[0]], expected)


def test_a_table_that_remembers_converges_and_is_measured_on() -> None:
    """gamma = 0.1: an average over ten visits, nearly exact."""
    pairs = make_pairs(128)
    loss = ContrastiveLoss(128, EStep(Rate(gamma=0.1)), order="before")
    memory = Aux({"residual": torch.full((128, 2), torch.nan, dtype=torch.float64)}, torch.zeros(128, dtype=torch.long))
    found = measure(
        pairs.image_ND, pairs.text_ND, pairs.scale, [8], 64,
        [Estimator("empty", loss, memory), Estimator("converged", loss, memory, passes=30, between=5)],
    )  # fmt: skip
    assert found[0].a_error_abs > 0.3  # the batch's own, every time
    assert found[1].a_error_abs < 0.25
    assert found[1].bias_high < found[0].bias_low


def test_heads_and_weights_are_the_chain_rule(tmp_path: Path) -> None:
    encoder = build_model(tiny_model(tmp_path)).encoder.double().eval()
    g = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, 32, 32, generator=g, dtype=torch.float64)
    tokens = torch.randint(1, 1000, (20, 8), generator=g)
    names = ["visual.proj", "text_projection", "visual.conv1.weight"]
    wanted = [dict(encoder.clip.named_parameters())[name] for name in names]
    features = encoder(images, tokens)
    peers = Peers(features.image_BD.detach(), features.text_BD.detach(), torch.arange(20))
    expected = torch.autograd.grad(ContrastiveLoss()(features, peers).loss, wanted)

    pairs = Pairs.of(features.image_BD.detach(), features.text_BD.detach(), float(features.logit_scale.detach()))
    exact = exact_gradient(pairs)
    embedded = embed_batches(encoder, images, tokens)
    assert embedded.notes == []
    heads = Heads(embedded.inputs, embedded.lengths)
    torch.testing.assert_close(heads.vector(exact), torch.cat([x.flatten() for x in expected[:2]]))
    target, image, _ = encoder_weights(encoder, images, tokens, "visual.conv1.*")
    torch.testing.assert_close(target.vector(exact), expected[2].flatten(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(image, pairs.image_ND)
    # The squared norm of each batch's gradient, without the matrices
    index = torch.arange(20).view(4, 5)
    batches, *_ = batch_gradients(ContrastiveLoss(), pairs, index, Aux(), 0, g)
    single = [batch_gradients(ContrastiveLoss(), pairs, one[None], Aux(), 0, g)[0] for one in index]
    for anything in (heads, Embeddings(20), LogScale()):
        squares = torch.stack([anything.vector(one).square().sum() for one in single])
        torch.testing.assert_close(anything.squares(batches), squares)


def embed_batches(encoder: Any, images: Tensor, tokens: Tensor) -> Any:
    from vlcl.batch import Batch

    rows = torch.arange(len(images)).flip(0)  # embed sorts
    batches = [Batch(images.flip(0)[i : i + 8], tokens.flip(0)[i : i + 8], rows[i : i + 8]) for i in (0, 8, 16)]
    return embed(encoder, batches, torch.device("cpu"))


def test_measure_says_what_is_wrong() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match="permutations=2"):
        measure(x, x, 5.0, [4], 2)
    with pytest.raises(ValueError, match=r"\[1, 9\]"):
        measure(x, x, 5.0, [1, 4, 9], 3)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bias")
    shards = make_shards(folder / "shards", (30, 41, 25))
    train(load_config(None, [
        f"data.train={shards}", f"model.name={tiny_model(folder / 'model')}", f"train.output={folder / 'run'}",
        "train.steps=16", "train.batch_size=12", "optim.warmup=2", "optim.lr=1e-3", "checkpoint.every=8",
        "data.workers=0", "data.streams=2", "log.trackers=[]", "train.precision=fp32",
    ]))  # fmt: skip
    return folder


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["bias", *map(str, arguments)])


def test_the_command_end_to_end(run_folder: Path) -> None:
    result = invoke(run_folder / "run", "--batch-sizes", "4,16", "--permutations", 6,
                    "--weights", "visual.transformer.*", "--weight-pairs", 12)  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("effective number of negatives", "relative bias", "B=16", "stored a against exact a", "epoch stale"):
        assert text in result.output
    report = json.loads((run_folder / "run/bias/bias.json").read_text())
    assert (run_folder / "run/bias/bias.png").read_bytes().startswith(b"\x89PNG")
    assert (report["pairs"], report["step"], report["settings"]["seed"]) == (96, 16, 0)
    names = {"infonce", "dcl", "exact a", "sampled u", "table as trained", "table converged", "1 epoch stale"}
    assert set(report["estimators"]) == names
    found = {(r["estimator"], r["target"], r["batch_size"]) for r in report["records"]}
    targets = {"projection heads", "embeddings", "logit_scale"}
    assert {f[:2] for f in found} >= {(name, target) for name in names for target in targets}
    assert ("infonce", "weights visual.transformer.*", 4) in found
    assert report["table_error"]["rows_written"] == 1.0


def test_a_step_folder_a_part_of_the_pairs_and_other_shards(run_folder: Path) -> None:
    moved = run_folder / "elsewhere"
    make_shards(moved, (20, 20))
    result = invoke(run_folder / "run/step-00000008", "--batch-sizes", "4", "--permutations", 3, "--pairs", 20,
                    "--estimators", "infonce,table,stale", "--data", moved, "--output", run_folder / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((run_folder / "out/bias.json").read_text())
    assert list(report["estimators"]) == ["infonce"]
    notes = " ".join(report["notes"])
    for text in ("not the shards", "no older checkpoint", "--pairs=20"):
        assert text in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOWHERE"], "there is no such folder"),
        (["RUN", "--batch-sizes", "8,x"], "whole numbers"),
        (["RUN", "--batch-sizes", "1,8"], "--batch-sizes has 1"),
        (["RUN", "--batch-sizes", "8,500"], "--batch-sizes has 500, more than the 96 pairs"),
        (["RUN", "--permutations", "2"], "--permutations=2: at least 3"),
        (["RUN", "--estimators", "exakt"], "'exakt'; allowed: infonce"),
        (["RUN", "--data", "GONE"], "--data SHARDS"),
        (["RUN", "--weights", "nothing.*", "--batch-sizes", "4", "--permutations", "3", "--estimators", "infonce"],
         "matches no weight"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_error(run_folder: Path, arguments: list[str], message: str) -> None:
    result = invoke(*(str(run_folder / "run") if word == "RUN" else word for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")


def test_several_processes_are_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in invoke(run_folder / "run").stderr


def test_standard_estimators_need_no_run() -> None:
    names = [estimator.name for estimator in standard_estimators(exact_statistics(make_pairs(8)))]
    assert names == ["infonce", "dcl", "exact a", "sampled u"]
    assert Temperature().kind == "learned"
