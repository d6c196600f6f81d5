"""Every preset against slow loops in float64, and the table of identities of docs/losses.md, a row a test."""

from __future__ import annotations

import math
from dataclasses import replace
from types import NoneType
from typing import Any, get_args

import open_clip
import pytest
import torch
import torch.nn.functional as F
from loss_oracle import D, G, N, Spec, assert_same, make_aux, make_pairs, one_rank, oracle, remembered
from torch import Tensor

from vlcl.batch import Aux, Features, Peers
from vlcl.config import Config, load_config
from vlcl.config.by_batch import gain_of
from vlcl.config.errors import sections_of
from vlcl.config.losses import EMConfig, default_settings
from vlcl.from_config import make_loss
from vlcl.losses import PRESETS, ContrastiveLoss, SigLIPLoss, build_loss
from vlcl.losses.contrastive import _Step
from vlcl.losses.estep import EStep, Rate
from vlcl.losses.mstep import Temperature
from vlcl.losses.predictors import PREDICTORS


def momentum(lr: float, low: float, high: float):
    def move(tau: float, gradient: float, known: dict[str, float], visits: int) -> dict[str, float]:
        mean = 0.0 if math.isnan(known["tau_mean"]) else known["tau_mean"]
        mean = 0.1 * mean + 0.9 * max(-5.0, min(5.0, gradient))
        return {"tau": max(low, min(high, tau - lr * mean)), "tau_mean": mean}

    return move


def adam(lr: float, low: float, high: float):
    def move(tau: float, gradient: float, known: dict[str, float], visits: int) -> dict[str, float]:
        g = max(-5.0, min(5.0, gradient))
        mean, square = (0.0 if math.isnan(known[name]) else known[name] for name in ("tau_mean", "tau_square"))
        mean, square = 0.9 * mean + 0.1 * g, 0.98 * square + 0.02 * g * g
        step = mean / (1 - 0.9 ** (visits + 1)) / (math.sqrt(square / (1 - 0.98 ** (visits + 1))) + 1e-8)
        return {"tau": max(low, min(high, tau - lr * step)), "tau_mean": mean, "tau_square": square}

    return move


def fast(a: float, visits: int, step: int) -> float:
    """A run of 40 steps, 10 an epoch: the cosine takes 2 epochs, a step of epoch e has e's value."""
    return 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * min(step // 10 / 2, 1)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


EM = {"positive": True, "epsilon": 1e-8}
# Of `em`: N finite, a row in the form of its weights, nothing else known of it.
PLAIN: dict[str, Any] = {"form": "relative", "positive": True, "prediction": None, "gamma": 0.8}


def em(num_pairs: int = N, **settings: Any) -> Any:
    return build_loss("em", num_pairs=num_pairs, **(PLAIN | settings))


CASES: dict[str, tuple[str, dict[str, Any], Spec]] = {
    "infonce": ("infonce", {}, Spec(positive=True, num_pairs=None)),
    "dcl": ("dcl", {}, Spec(num_pairs=None)),
    "sogclr": ("sogclr", {}, Spec(rate=lambda a, n, s: 0.9, epsilon=1e-14, temperature="fixed")),
    "isogclr": (
        "isogclr",
        {"tau": 0.05, "tau_max": 0.2},
        Spec(rate=lambda a, n, s: 0.8, epsilon=1e-10, temperature="pair", rho=6.0, move=momentum(1e-3, 0.005, 0.2)),
    ),
    "fastclip-v1": ("fastclip-v1", {}, Spec(rate=fast, epsilon=1e-14, temperature="fixed")),
    "fastclip-v2": (
        "fastclip-v2",
        {"tau": 0.05},
        Spec(rate=fast, epsilon=1e-14, temperature="pair", rho=7.0, move=adam(0.0133, 0.01, 1.0)),
    ),
    "fastclip-v3": ("fastclip-v3", {}, Spec(rate=fast, epsilon=1e-14, temperature="rho", rho=6.5)),
    "scent": (
        "scent",
        {"log_alpha": 0.3},
        Spec(rate=lambda a, n, s: sigmoid(a + 0.3), epsilon=1e-14, temperature="rho", rho=6.5),
    ),
    "em": ("em", {}, Spec(rate=lambda a, n, s: 0.8, **EM)),
    "em-before": ("em", {"order": "before"}, Spec(rate=lambda a, n, s: 0.8, order="before", **EM)),
    "em-absolute": ("em", {"form": "absolute"}, Spec(rate=lambda a, n, s: 0.8, form="absolute", **EM)),
    "em-absolute-before": (
        "em",
        {"form": "absolute", "order": "before", "positive": False},
        Spec(rate=lambda a, n, s: 0.8, form="absolute", order="before", epsilon=1e-8),
    ),
    "em-absolute-pair": (
        "em",
        {"form": "absolute", "positive": False, "temperature": "pair"},
        Spec(
            rate=lambda a, n, s: 0.8,
            form="absolute",
            epsilon=1e-8,
            temperature="pair",
            rho=6.5,
            move=momentum(1e-3, 0.01, 1.0),
        ),
    ),
    "em-balanced": ("em", {"form": "balanced"}, Spec(rate=lambda a, n, s: 0.8, form="balanced", **EM)),
    "em-balanced-before": (
        "em",
        {"form": "balanced", "order": "before", "positive": False, "temperature": "rho", "max_log_weight": -1.0},
        Spec(
            rate=lambda a, n, s: 0.8,
            form="balanced",
            order="before",
            epsilon=1e-8,
            temperature="rho",
            rho=6.5,
            max_log_weight=-1.0,
        ),
    ),
    "em-cosine": (
        "em",
        {"gamma_schedule": "cosine"},
        Spec(rate=lambda a, n, s: 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * s / 40)), **EM),
    ),
    "em-visits": ("em", {"gamma_schedule": "visits"}, Spec(rate=lambda a, n, s: 1 / (n + 1), **EM)),
    "em-sgd": ("em", {"gamma_schedule": "sgd", "gamma": 0.3}, Spec(rate=lambda a, n, s: 0.3, sgd=True, **EM)),
    "em-capped": (
        "em",
        {"max_log_weight": -3.0, "order": "before"},
        Spec(rate=lambda a, n, s: 0.8, order="before", max_log_weight=-3.0, **EM),
    ),
    "em-fixed": ("em", {"temperature": "fixed"}, Spec(rate=lambda a, n, s: 0.8, temperature="fixed", **EM)),
    "em-rho": ("em", {"temperature": "rho"}, Spec(rate=lambda a, n, s: 0.8, temperature="rho", rho=6.5, **EM)),
    "em-pair": (
        "em",
        {"temperature": "pair", "order": "before"},
        Spec(
            rate=lambda a, n, s: 0.8, temperature="pair", rho=6.5, move=momentum(1e-3, 0.01, 1.0), order="before", **EM
        ),
    ),
}


@pytest.mark.parametrize("step", [0, 13])
@pytest.mark.parametrize("seen", ["some", "all"])  # all: order "before" needs one pass over the tiles only
@pytest.mark.parametrize("case", list(CASES))
def test_a_preset_is_its_slow_loop(case: str, seen: str, step: int) -> None:
    name, settings, spec = CASES[case]
    plain = PLAIN if name == "em" else {}
    loss = build_loss(name, num_pairs=N, total_steps=40, steps_per_epoch=10, **(plain | settings))
    image, text, row = make_pairs(duplicates=True)
    aux = make_aux(row, loss)
    if seen == "all":
        assert aux.visits_G is not None
        aux = Aux({name: x.nan_to_num(0.06) for name, x in aux.rows.items()}, aux.visits_G + 1, aux.shared)
    out, grads = one_rank(loss, image, text, row, aux, step=step)
    value, expected, rows = oracle(spec, image, text, row, aux, step=step)
    assert out.loss.item() == pytest.approx(value, abs=1e-11)
    assert_same(grads, expected, 1e-10)
    got = {} if out.aux is None else out.aux.rows
    assert got.keys() == rows.keys()
    assert_same([got[key] for key in rows], rows.values())


# Captions of the pairs, as 64-bit hashes are; pair 7 is pair 2 once more, with another one.
CAPTION = torch.tensor([5, 5, 0, 1, -(1 << 63), 0, 2, 3, 5, 4, -(1 << 63), (1 << 63) - 1])


@pytest.mark.parametrize("case", list(CASES))
def test_pairs_of_one_caption_are_no_negatives(case: str) -> None:
    """Every preset, with rows known and unknown, against the slow loop."""
    name, settings, spec = CASES[case]
    plain = PLAIN if name == "em" else {}
    span = {"num_pairs": N, "total_steps": 40, "steps_per_epoch": 10}
    loss = build_loss(name, **span, **(plain | settings), same_caption="ignore")
    image, text, row = make_pairs(duplicates=True)
    some = make_aux(row, loss)
    assert some.visits_G is not None
    known = Aux({name: x.nan_to_num(0.06) for name, x in some.rows.items()}, some.visits_G + 1, some.shared)
    for aux in (some, known):
        out, grads = one_rank(loss, image, text, row, aux, step=13, caption=CAPTION)
        value, expected, rows = oracle(spec, image, text, row, aux, step=13, caption=CAPTION)
        assert out.loss.item() == pytest.approx(value, abs=1e-11)
        assert_same(grads, expected, 1e-10)
        assert_same([remembered(out).rows[key] for key in rows] if rows else [], rows.values())
        without, _, _ = oracle(spec, image, text, row, aux, step=13)
        assert abs(value - without) > 1e-4
        untold, _ = one_rank(build_loss(name, **span, **(plain | settings)), image, text, row, aux, step=13)
        assert untold.loss.item() == pytest.approx(without, abs=1e-11)
    with pytest.raises(ValueError, match=r"needs peers\.caption_G"):
        one_rank(loss, image, text, row, some)


def test_captions_count_in_the_bank_in_siglip_and_in_prototypes() -> None:
    image, text, row = make_pairs()
    g = torch.Generator().manual_seed(3)
    bank = [F.normalize(torch.randn(8, D, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    bank_row = torch.cat([row[:2], torch.tensor([33, 34, 35]), torch.full((3,), -1)])
    bank_caption = torch.tensor([9, 5, 5, 0, 9, 5, 5, 0])  # the last three places are empty, whatever they say
    for bank_negatives in (False, True):
        loss = em(bank=8, bank_negatives=bank_negatives, same_caption="ignore")
        aux = make_aux(row, loss)
        shared = {"bank_image": bank[0], "bank_text": bank[1], "bank_row": bank_row, "bank_caption": bank_caption}
        aux = Aux(aux.rows, aux.visits_G, shared)
        out, grads = one_rank(loss, image, text, row, aux, caption=CAPTION)
        parts = (bank[0], bank[1], bank_row, bank_caption)
        spec = Spec(rate=lambda a, n, s: 0.8, bank=parts, bank_negatives=bank_negatives, **EM)
        value, expected, _ = oracle(spec, image, text, row, aux, caption=CAPTION)
        assert out.loss.item() == pytest.approx(value, abs=1e-11)
        assert_same(grads, expected, 1e-10)
        assert remembered(out).shared["bank_caption"].tolist() == CAPTION[:8].tolist()
        assert remembered(out).shared["bank_row"].tolist() == row[:8].tolist()
    siglip = build_loss("siglip", num_pairs=N, same_caption="ignore")
    out, grads = one_rank(siglip, image, text, row, None, scale=10.0, bias=-3.0, caption=CAPTION)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    logits = 10.0 * leaves[0] @ leaves[1].T - 3.0
    apart = CAPTION[:, None] != CAPTION
    loop = (F.softplus(-logits.diagonal()).sum() + F.softplus(logits[apart]).sum()) / G
    assert out.loss.item() == pytest.approx(loop.item(), abs=1e-10)
    assert_same(grads[:2], torch.autograd.grad(loop, leaves), 1e-10)
    neuclip = build_loss("neuclip", num_pairs=N, prototypes=8, prototype_steps=2, same_caption="ignore")
    aux = make_aux(row, neuclip)
    plain, _ = one_rank(build_loss("neuclip", num_pairs=N, prototypes=8, prototype_steps=2), image, text, row, aux)
    out, _ = one_rank(neuclip, image, text, row, aux, caption=CAPTION)  # they learn from the estimates without them
    assert not torch.equal(remembered(out).shared["prototypes"], remembered(plain).shared["prototypes"])


def test_captions_that_all_differ_change_nothing() -> None:
    image, text, row = make_pairs(duplicates=True, dtype=torch.float32)
    caption = torch.arange(G)
    caption[7] = caption[2]
    for name in ("infonce", "em", "siglip"):
        bias = -10.0 if name == "siglip" else None
        ours = build_loss(name, num_pairs=N, same_caption="ignore")
        aux = make_aux(row, ours)
        out, grads = one_rank(ours, image, text, row, aux, bias=bias, caption=caption)
        plain, expected = one_rank(build_loss(name, num_pairs=N), image, text, row, aux, bias=bias)
        assert torch.equal(out.loss, plain.loss)
        assert all(torch.equal(x, y) for x, y in zip(grads, expected))


def test_rows_without_pairs_of_one_caption_are_another_memory() -> None:
    assert build_loss("em", num_pairs=N, same_caption="ignore").meaning_of_rows == (
        "prediction drift, same captions ignored"
    )
    assert build_loss("infonce", num_pairs=N, same_caption="ignore").meaning_of_rows == "plain"  # it remembers nothing


def test_every_preset_has_a_case() -> None:
    covered = {name for name, _, _ in CASES.values()} | {"siglip", "neuclip"}  # these two below
    assert covered == set(PRESETS)


@pytest.mark.parametrize("form", ["relative", "balanced", "absolute"])
@pytest.mark.parametrize("num_pairs", [G, 10**6])
def test_em_but_for_its_form_as_it_is_by_default(num_pairs: int, form: str) -> None:
    """Its slow loop, with rows whose level and own similarity are put in anew; N is in the value alone."""
    image, text, row = make_pairs()
    own = 7.0 * (image * text).sum(dim=1, keepdim=True).expand(-1, 2) * (form == "relative")
    loss = build_loss("em", num_pairs=num_pairs, form=form)
    visits, level = torch.ones(G, dtype=torch.long), torch.tensor([-0.4, 0.9, 0.5])
    kept = torch.linspace(-1, 2, 2 * G, dtype=torch.float64).view(G, 2)
    out, grads = one_rank(loss, image, text, row, Aux({"residual": kept}, visits, {"level": level}))
    now = remembered(out).shared["level"]
    spec = Spec(rate=lambda a, n, s: 0.5, form=form, epsilon=1e-8, num_pairs=num_pairs)
    rows = Aux({"residual": kept + now[:2] / now[2] - own}, visits)
    value, expected, new = oracle(spec, image, text, row, rows)
    assert out.loss.item() == pytest.approx(value, abs=1e-6)  # the level is kept in float32
    assert_same(grads, expected, 1e-6)
    assert_same([remembered(out).rows["residual"] + now[:2] / now[2] - own], [new["residual"]], 1e-6)


def test_the_defaults_are_those_of_the_settings() -> None:
    assert set(PRESETS) == set(sections_of(Config.model_fields["loss"].annotation))
    for name in PRESETS:
        assert build_loss(name, num_pairs=N) == build_loss(name, num_pairs=N, **default_settings(name))
    assert em(gamma=0.5) != em()
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        build_loss("em", num_pairs=N, gama=0.5)
    with pytest.raises(KeyError, match="infonc"):
        build_loss("infonc", num_pairs=N)


def test_the_predictions_are_those_of_the_settings() -> None:
    allowed, null = get_args(EMConfig.model_fields["prediction"].annotation)
    assert null is NoneType
    assert set(get_args(allowed)) == set(PREDICTORS)


@pytest.mark.parametrize(
    ("name", "settings", "meaning"),
    [
        ("infonce", {}, "plain"),
        ("siglip", {}, "plain"),
        ("isogclr", {}, "plain"),
        ("neuclip", {"prototypes": 9}, "prototypes 9"),
        ("em", {}, "prediction drift"),
        ("em", {"form": "absolute"}, "prediction drift"),  # the same rows: the pair's own similarity is not in them
        ("em", {"prediction": "similarity"}, "prediction similarity"),
        ("em", {"form": "relative", "prediction": None, "gamma": 0.3, "temperature": "rho"}, "plain"),
        ("em", {"prediction": None, "form": "absolute"}, "form absolute"),
        (
            "em",
            {"bank": 8, "temperature": "pair", "prediction": "level", "form": "absolute"},
            "form absolute, prediction level, temperature pair, bank 8",
        ),
    ],
)
def test_a_loss_says_what_its_rows_mean(name: str, settings: dict[str, Any], meaning: str) -> None:
    """Checkpoints are told apart by these words, so they stay as they are."""
    assert build_loss(name, num_pairs=N, **settings).meaning_of_rows == meaning


@pytest.mark.parametrize("bank_negatives", [False, True])
@pytest.mark.parametrize("order", ["after", "before"])
def test_a_bank_is_its_slow_loop(bank_negatives: bool, order: str) -> None:
    image, text, row = make_pairs()
    g = torch.Generator().manual_seed(3)
    bank_row = torch.cat([row[:2], torch.tensor([33, 34, 35]), torch.full((3,), -1)])
    bank = [F.normalize(torch.randn(8, D, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    loss = em(bank=8, bank_negatives=bank_negatives, order=order)
    aux = make_aux(row, loss)
    aux = Aux(aux.rows, aux.visits_G, {"bank_image": bank[0], "bank_text": bank[1], "bank_row": bank_row})
    spec = Spec(
        rate=lambda a, n, s: 0.8, bank=(bank[0], bank[1], bank_row), bank_negatives=bank_negatives, order=order, **EM
    )
    for aux_ in (aux, Aux({"residual": aux.rows["residual"].nan_to_num(0.1)}, aux.visits_G, aux.shared)):
        out, grads = one_rank(loss, image, text, row, aux_)
        value, expected, rows = oracle(spec, image, text, row, aux_)
        assert out.loss.item() == pytest.approx(value, abs=1e-11)
        assert_same(grads, expected, 1e-10)
        assert_same([remembered(out).rows["residual"]], [rows["residual"]])
        assert_same([remembered(out).shared["bank_image"]], [image[:8]])  # newest first, the oldest dropped
        assert remembered(out).shared["bank_row"].tolist() == row[:8].tolist()


def test_a_bank_fills_up_with_what_passed() -> None:
    loss = em(bank=20)
    image, text, row = make_pairs()
    aux = make_aux(row, loss)
    out, _ = one_rank(loss, image, text, row, aux)
    assert remembered(out).shared["bank_row"].tolist() == [*row.tolist(), *[-1] * 8]
    again, _ = one_rank(
        loss, image.flip(0), text.flip(0), row.flip(0), Aux(aux.rows, aux.visits_G, remembered(out).shared)
    )
    assert remembered(again).shared["bank_row"].tolist() == [*row.flip(0).tolist(), *row[:8].tolist()]


# The table of identities.


def test_the_batchs_normalizer_with_the_positive_is_open_clips_loss() -> None:
    image, text, row = make_pairs()
    out, grads = one_rank(build_loss("infonce", num_pairs=N), image, text, row, None)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    log_scale = torch.tensor(math.log(7.0), dtype=torch.float64, requires_grad=True)
    value = open_clip.ClipLoss()(*leaves, log_scale.exp())
    assert out.loss.item() == pytest.approx(value.item(), abs=1e-12)
    assert_same(grads, torch.autograd.grad(value, [*leaves, log_scale]), 1e-12)


def test_em_is_infonce_when_the_batch_is_the_data() -> None:
    image, text, row = make_pairs()
    ours = em(num_pairs=G, gamma=1.0, epsilon=0.0)
    unseen = Aux({"residual": torch.full((G, 2), torch.nan)}, torch.zeros(G, dtype=torch.long))
    for aux in (make_aux(row), unseen):
        out, grads = one_rank(ours, image, text, row, aux)
        expected_out, expected = one_rank(build_loss("infonce", num_pairs=G), image, text, row, None)
        assert out.loss.item() == pytest.approx(expected_out.loss.item(), abs=1e-12)
        assert_same(grads, expected, 1e-12)


@pytest.mark.parametrize("name", ["sogclr", "fastclip-v1"])
def test_without_memory_sogclr_and_fastclips_first_epoch_are_dcl(name: str) -> None:
    """Features' gradients; their temperature is fixed."""
    image, text, row = make_pairs()
    settings: dict[str, Any] = {"gamma": 1.0} if name == "sogclr" else {}
    loss = build_loss(name, num_pairs=N, total_steps=40, steps_per_epoch=10, epsilon=0.0, **settings)
    _, grads = one_rank(loss, image, text, row, make_aux(row, loss), step=9)
    _, expected = one_rank(build_loss("dcl", num_pairs=N), image, text, row, None)
    assert_same(grads[:2], expected[:2], 1e-12)
    assert grads[2] == 0


def test_scents_rate_is_its_mirror_descent() -> None:
    """nu + log(1 + alpha e^{a_hat}) - log(1 + alpha e^{nu})  =  a moving average at sigmoid(nu + log alpha)."""
    g = torch.Generator().manual_seed(0)
    nu, a_hat = torch.randn(50, 2, generator=g, dtype=torch.float64) * 4, torch.randn(50, 2, generator=g).double() * 4
    rate = Rate("adaptive", log_alpha=1.5)
    got = rate.mix(nu, a_hat, rate.of(nu, torch.ones(50), 0))
    alpha = math.exp(1.5)
    expected = nu + torch.log1p(alpha * a_hat.exp()) - torch.log1p(alpha * nu.exp())
    assert_same([got], [expected], 1e-9)


def test_visits_make_a_running_mean() -> None:
    rate, values = Rate("visits"), torch.randn(6, 1, 2, dtype=torch.float64)
    a = torch.full((1, 2), torch.nan, dtype=torch.float64)
    for visits, value in enumerate(values):
        a = rate.mix(a, value, rate.of(a, torch.tensor([visits]), 0))
    assert_same([a], [values.exp().mean(dim=0).log()])


def test_sampled_u_averages_to_the_mean_and_depends_on_seed_and_step_alone() -> None:
    image, text, row = make_pairs()
    aux = make_aux(row)
    _, mean = one_rank(em(), image, text, row, aux)
    sampling = em(mode="sample", seed=3)
    sampled = [one_rank(sampling, image, text, row, aux, step=s)[1][0] for s in range(2000)]
    again = one_rank(em(mode="sample", seed=3), image, text, row, aux, step=5)[1][0]
    assert torch.equal(again, sampled[5])
    assert not torch.equal(sampled[5], sampled[6])
    assert (torch.stack(sampled).mean(0) - mean[0]).norm() / mean[0].norm() < 0.06


def test_the_absolute_form_is_amorlips_encoder_loss() -> None:
    """-2 mean(s_ii) + mean_i sum_j e^{s_ij} / lambda_i, both ways, halved; lambda given, positives outside of it."""
    image, text, row = make_pairs()
    g = torch.Generator().manual_seed(2)
    a = torch.randn(G, 2, generator=g, dtype=torch.float64)
    loss = em(num_pairs=G, form="absolute", positive=False, order="before", epsilon=0.0)
    _, grads = one_rank(loss, image, text, row, Aux({"residual": a}, torch.ones(G, dtype=torch.long)))
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    log_scale = torch.tensor(math.log(7.0), dtype=torch.float64, requires_grad=True)
    s = log_scale.exp() * leaves[0] @ leaves[1].T
    off = ~torch.eye(G, dtype=torch.bool)
    both = [(s * 1.0, a[:, 0]), (s.T * 1.0, a[:, 1])]
    terms = sum((x.exp() * off).sum(1).div(lam.exp() * (G - 1)).mean() for x, lam in both)
    assert_same(grads, torch.autograd.grad((terms - 2 * s.diagonal().mean()) / 2, [*leaves, log_scale]), 1e-12)


def test_siglip_is_open_clips_and_its_loop() -> None:
    image, text, row = make_pairs()
    out, grads = one_rank(SigLIPLoss(), image, text, row, None, scale=10.0, bias=-3.0)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    log_scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    value = open_clip.loss.SigLipLoss()(*leaves, log_scale.exp(), bias)
    assert out.loss.item() == pytest.approx(value.item(), abs=1e-10)
    assert_same(grads, torch.autograd.grad(value, [*leaves, log_scale, bias]), 1e-10)
    loop = torch.zeros((), dtype=torch.float64)
    row[7] = row[2]
    for i in range(G):
        loop = loop + F.softplus(-(log_scale.exp() * leaves[0][i] @ leaves[1][i] + bias)) / G
        for j in range(G):
            if row[j] != row[i]:
                loop = loop + F.softplus(log_scale.exp() * leaves[0][i] @ leaves[1][j] + bias) / G
    out, grads = one_rank(SigLIPLoss(), image, text, row, None, scale=10.0, bias=-3.0)
    assert out.loss.item() == pytest.approx(loop.item(), abs=1e-10)
    assert_same(grads, torch.autograd.grad(loop, [*leaves, log_scale, bias]), 1e-10)


def test_siglip_far_from_its_decision_is_the_absolute_form_with_one_normalizer() -> None:
    """a = -b for all rows; the two directions of EM ask each question twice."""
    image, text, row = make_pairs()
    bias = -25.0
    _, siglip = one_rank(SigLIPLoss(), image, text, row, None, bias=bias)
    a = torch.full((G, 2), -bias - math.log(G - 1), dtype=torch.float64)
    ours = em(num_pairs=G, form="absolute", positive=False, order="before", epsilon=0.0)
    _, grads = one_rank(ours, image, text, row, Aux({"residual": a}, torch.ones(G, dtype=torch.long)))
    assert_same([siglip[0]], [grads[0]], 1e-6)


def test_drrho_is_the_family_on_joined_features() -> None:
    """DRRho-CLIP takes a reference model's h_ij off: joined features [v, -r v_ref] . [t, t_ref] do that."""
    image, text, row = make_pairs()
    ref_image, ref_text, _ = make_pairs(seed=9)
    ratio = 0.4
    loss = build_loss("fastclip-v1", num_pairs=N, total_steps=40, steps_per_epoch=10)
    aux = make_aux(row, loss)
    joined = (torch.cat([image, -ratio * ref_image], 1), torch.cat([text, ref_text], 1))
    _, grads = one_rank(loss, *joined, row, aux, step=25)
    image_, text_ = image.clone().requires_grad_(), text.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for k, (x, y, rx, ry) in enumerate([(image_, text_, ref_image, ref_text), (text_, image_, ref_text, ref_image)]):
        for i in range(G):
            h = [7 * (x[i] @ y[j] - x[i] @ y[i] - ratio * (rx[i] @ ry[j] - rx[i] @ ry[i])) for j in range(G) if j != i]
            a_hat, a = math.log(sum(math.exp(v.item()) for v in h) / len(h)), aux.rows["residual"][i, k].item()
            a = a_hat if math.isnan(a) else math.log(0.8 * math.exp(a) + 0.2 * math.exp(a_hat))
            total = total + sum(math.exp(v.item() - a) * v for v in h) / len(h) / (2 * G)
    expected = torch.autograd.grad(total, [image_, text_])
    assert_same([g[:, :D] for g in grads[:2]], expected, 1e-9)


def test_neuclip_steps_its_prototypes_and_uses_what_they_predict() -> None:
    image, text, row = make_pairs()
    settings = {"prototypes": 8, "prototype_steps": 3, "prototype_lr": 0.1, "restart": 4, "epsilon": 1e-6}
    loss = build_loss("neuclip", num_pairs=N, **settings)
    aux = make_aux(row, loss)
    out, grads = one_rank(loss, image, text, row, aux, step=0)
    # By hand: filled from the batch (the other side's embeddings), then AdaGrad on the conjugate bound.
    w, square, a_of = torch.stack([text[:8], image[:8]]), torch.zeros(2, 8, D, dtype=torch.float64), {}

    def predict(w_: Tensor) -> Tensor:
        rows = []
        for k, (x, y) in enumerate([(image, text), (text, image)]):
            cos = x @ F.normalize(w_[k], dim=1).T
            rows.append(torch.log(1e-6 + torch.exp(7 * (cos - (x * y).sum(1, keepdim=True))).mean(1)))
        return torch.stack(rows, dim=1)

    _, _, batch = oracle(Spec(rate=lambda *_: 1.0, epsilon=1e-6), image, text, row, make_aux(row))
    for _ in range(3):
        w = w.requires_grad_()
        a = predict(w)
        bound = (torch.exp(batch["residual"] - a) + a - 1).mean(0).sum()
        (gradient,) = torch.autograd.grad(bound, w)
        square = square + gradient**2
        w = (w - 0.1 * gradient / (square.sqrt() + 1e-10)).detach()
    a = predict(w)
    a_of = {(i, k): a[i, k].item() for i in range(G) for k in range(2)}
    spec = Spec(epsilon=1e-6, temperature="rho", rho=6.5, a_of=a_of)
    value, expected, _ = oracle(spec, image, text, row, None)
    # Shared parts are float32: what a checkpoint holds.
    assert out.loss.item() == pytest.approx(value, abs=1e-5)
    assert_same(grads, expected, 1e-5)
    assert_same([remembered(out).shared["prototypes"]], [w], 1e-5)
    # The next step moves them on; the fourth starts anew.
    later, _ = one_rank(
        loss, image.flip(0), text.flip(0), row.flip(0), Aux({}, aux.visits_G, remembered(out).shared), step=1
    )
    assert (remembered(later).shared["prototypes"] - remembered(out).shared["prototypes"]).abs().max() < 0.5
    fresh, _ = one_rank(
        loss, image.flip(0), text.flip(0), row.flip(0), Aux({}, aux.visits_G, remembered(later).shared), step=4
    )
    first, _ = one_rank(loss, image.flip(0), text.flip(0), row.flip(0), aux, step=0)
    assert torch.equal(remembered(fresh).shared["prototypes"], remembered(first).shared["prototypes"])


def test_a_level_moves_every_row_with_the_model() -> None:
    """Rows written when all log-normalizers were 2 nats higher come back 2 nats lower, seen or not."""
    image, text, row = make_pairs()
    loss = em(prediction="level", order="before", epsilon=0.0)
    aux = make_aux(row, loss)
    out, _ = one_rank(loss, image, text, row, aux)  # nothing known: as without a prediction
    plain, _ = one_rank(
        em(epsilon=0.0),
        image,
        text,
        row,
        Aux({"residual": torch.full((G, 2), torch.nan)}, aux.visits_G),
    )
    level = remembered(out).shared["level"][:2] / remembered(out).shared["level"][2]
    unseen = torch.isnan(aux.rows["residual"])
    assert_same(
        [(remembered(out).rows["residual"] + level)[unseen]], [remembered(plain).rows["residual"][unseen]], 1e-6
    )
    shared = {"level": torch.tensor([-2.0, -2.0, 1.0])}
    residual = Aux({"residual": torch.full((G, 2), 0.5, dtype=torch.float64)}, torch.ones(G, dtype=torch.long), shared)
    _, got = one_rank(loss, image, text, row, residual)
    at = Aux({"residual": torch.full((G, 2), -1.5, dtype=torch.float64)}, torch.ones(G, dtype=torch.long))
    _, expected = one_rank(em(order="before", epsilon=0.0), image, text, row, at)
    assert_same(got, expected)


@pytest.mark.parametrize("form", ["balanced", "absolute", "relative"])
@pytest.mark.parametrize("prediction", ["drift", "similarity"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_row_is_read_with_what_is_known_now(prediction: str, order: str, form: str) -> None:
    """Its own similarity, the scale and the mean level are those of the visit: a row without them, put together by
    hand, is that of a loss which keeps rows in the form of its weights."""
    image, text, row = make_pairs()
    own = 7.0 * (image * text).sum(dim=1, keepdim=True).expand(-1, 2) * (form == "relative")
    loss = em(prediction=prediction, order=order, form=form, epsilon=0.0, gamma=0.4)
    kept = torch.linspace(-1, 2, 2 * G, dtype=torch.float64).view(G, 2)
    shared = {"level": torch.tensor([-0.4, 0.9, 0.5])} if prediction == "drift" else {}
    visits = torch.ones(G, dtype=torch.long)
    out, got = one_rank(loss, image, text, row, Aux({"residual": kept}, visits, shared))
    level = torch.zeros(2)
    if prediction == "drift":
        h = 7.0 * (image @ text.T)
        for k, logits in enumerate((h, h.T)):
            a_hat = [torch.cat([x[:i], x[i + 1 :]]).logsumexp(0) - math.log(G - 1) for i, x in enumerate(logits)]
            level[k] = 0.9 * shared["level"][k] + 0.1 * torch.stack(a_hat).mean()
        level = level / (0.9 * 0.5 + 0.1)
        now = remembered(out).shared["level"]
        assert_same([now[:2] / now[2]], [level], 1e-6)
    before = shared["level"][:2] / 0.5 if order == "before" and shared else level
    plain = em(order=order, form=form, epsilon=0.0, gamma=0.4)
    at, expected = one_rank(plain, image, text, row, Aux({"residual": kept + before - own}, visits))
    assert_same(got, expected, 1e-6)
    if order == "after":
        assert_same([remembered(out).rows["residual"] + level - own], [remembered(at).rows["residual"]], 1e-6)


@pytest.mark.parametrize("form", ["absolute", "relative"])
def test_what_a_wrong_row_does_to_the_positive(form: str) -> None:
    """Rows that are all c nats too high: negatives push by e^{-c} of what they should; the positive pulls by 1 in the
    absolute form, and by e^{-c} in the relative one."""
    image, text, _ = make_pairs()
    row, visits, c = torch.arange(G), torch.ones(G, dtype=torch.long), 0.7
    loss = em(form=form, order="before", positive=False, epsilon=0.0)
    kept = torch.linspace(-1, 2, 2 * G, dtype=torch.float64).view(G, 2)
    right, wrong = (one_rank(loss, image, text, row, Aux({"residual": kept + x}, visits))[1][0] for x in (0.0, c))
    if form == "relative":
        assert_same([wrong], [right * math.exp(-c)])
    else:
        push = (right - wrong) / (1 - math.exp(-c))
        assert_same([right - push], [-7.0 * text / G])  # of -s_ii, both directions halved, in the mean over pairs


@pytest.mark.parametrize("prediction", ["drift", "similarity"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_row_that_was_never_visited_takes_its_batch(prediction: str, order: str) -> None:
    image, text, row = make_pairs()
    unseen, visits = {"residual": torch.full((G, 2), torch.nan)}, torch.zeros(G, dtype=torch.long)
    shared = {"level": torch.zeros(3)} if prediction == "drift" else {}
    loss, plain = (em(prediction=name, order=order, epsilon=0.0) for name in (prediction, None))
    _, got = one_rank(loss, image, text, row, Aux(unseen, visits, shared))
    _, expected = one_rank(plain, image, text, row, Aux(unseen, visits))
    assert_same(got, expected, 1e-6)


def test_exact_normalizers_make_small_batches_unbiased() -> None:
    """With a_i exact over all N pairs, the mean gradient over all batches of two is the full data's."""
    image, text, _ = make_pairs()
    row = torch.arange(G)
    full = em(num_pairs=G, gamma=1.0, epsilon=0.0)
    unseen = Aux({"residual": torch.full((G, 2), torch.nan)}, torch.zeros(G, dtype=torch.long))
    out, expected = one_rank(full, image, text, row, unseen)
    ours = em(num_pairs=G, order="before", epsilon=0.0)
    total, pairs = torch.zeros_like(image), [(i, j) for i in range(G) for j in range(i)]
    for i, j in pairs:
        keep = torch.tensor([i, j])
        aux = Aux({"residual": remembered(out).rows["residual"][keep]}, torch.ones(2, dtype=torch.long))
        total[keep] += one_rank(ours, image[keep], text[keep], row[keep], aux)[1][0]
    assert_same([total * 2 / (G * (G - 1))], [expected[0]])


def test_frozen_weights_run_the_e_step_alone() -> None:
    """TuneCLIP's recovery stage: rows as in training, no gradient, no move of the temperatures."""
    image, text, row = make_pairs()
    for name in ("em", "fastclip-v2"):
        loss = build_loss(name, num_pairs=N)
        aux = make_aux(row, loss)
        trained, _ = one_rank(loss, image, text, row, aux)
        with torch.no_grad():
            out = loss(Features(image, text, torch.tensor(7.0)), Peers(image, text, row), aux)
        assert not out.loss.requires_grad
        assert_same([remembered(out).rows["residual"]], [remembered(trained).rows["residual"]], 1e-6)
        if name == "fastclip-v2":
            assert_same([remembered(out).rows["tau"]], [aux.rows["tau"]])


def test_what_a_loss_remembers_must_be_passed() -> None:
    image, text, row = make_pairs()
    with pytest.raises(ValueError, match="this loss remembers residual: pass aux"):
        one_rank(em(), image, text, row, None)
    with pytest.raises(ValueError, match=r"needs features\.logit_bias"):
        one_rank(SigLIPLoss(), image, text, row, None)


@pytest.mark.parametrize("name", list(PRESETS))
def test_features_that_are_no_numbers_give_a_loss_that_is_none(name: str) -> None:
    """Never a finite loss from broken features: the trainer stops at it."""
    image, text, row = make_pairs()
    image[3, 1] = torch.nan
    loss = build_loss(name, num_pairs=N)
    out, _ = one_rank(loss, image, text, row, make_aux(row, loss), bias=-10.0 if name == "siglip" else None)
    assert not out.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, "siglip", "neuclip"])
def test_scale_100_with_opposed_pairs_stays_finite(case: str, dtype: torch.dtype) -> None:
    """s = 100 against s = -100: e^{200} must never be formed. Rows from -60 to far above, too."""
    name, settings, _ = CASES.get(case, (case, {}, None))
    image, _, row = make_pairs(dtype=torch.float32)
    image = image.to(dtype)
    loss = build_loss(name, num_pairs=N, **settings)
    for stored in (-60.0, 0.0, 90.0):
        aux = make_aux(row, loss)
        rows = {k: torch.full((G, 2), stored) if k == "residual" else x.float() for k, x in aux.rows.items()}
        out, grads = one_rank(
            loss,
            image,
            -image,
            row,
            Aux(rows, aux.visits_G, aux.shared),
            100.0,
            bias=-10.0 if name == "siglip" else None,
        )
        assert out.loss.isfinite()
        assert all(g.isfinite().all() for g in grads)
        if out.aux is not None and "residual" in out.aux.rows:
            assert out.aux.rows["residual"].isfinite().all()


def test_one_pass_gives_the_rows_of_two_even_where_weights_underflow() -> None:
    """order=before reads a_hat off the weights; rows so far off that e^x is 0 or capped are computed anew."""
    image, text, row = make_pairs(dtype=torch.float32)
    for stored in (200.0, -90.0, 0.5):
        aux = Aux({"residual": torch.full((G, 2), stored)}, torch.ones(G, dtype=torch.long))
        rows = [
            remembered(one_rank(em(order=order), image, text, row, aux)[0]).rows["residual"]
            for order in ("before", "after")
        ]
        torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)
    eye = torch.eye(8)  # all negatives alike: 7 of them are effective, whatever the row says
    aux = Aux({"residual": torch.full((8, 2), -57.0)}, torch.ones(8, dtype=torch.long))
    for scale, positive in ((100.0, True), (10.0, False)):
        loss = em(num_pairs=1000, order="before", positive=positive)
        out, _ = one_rank(loss, eye, eye, torch.arange(8), aux, scale=scale)
        assert out.metrics["effective_negatives"].item() == pytest.approx(7, rel=1e-4)


def test_the_cap_holds_the_weights() -> None:
    image, text, row = make_pairs()
    stale = Aux({"residual": torch.full((G, 2), -30.0, dtype=torch.float64)}, torch.ones(G, dtype=torch.long))
    loss = ContrastiveLoss(N, EStep(Rate()), Temperature(), order="before", positive=False)
    _, free = one_rank(loss, image, text, row, stale)
    _, capped = one_rank(em(order="before", positive=False, max_log_weight=0.0), image, text, row, stale)
    assert free[0].norm() > 1e6 > 100 > capped[0].norm()


LOOPS_ALONE = ("em-capped", "em-balanced", "em-balanced-before")


@pytest.mark.parametrize("case", [*(case for case in CASES if case not in LOOPS_ALONE), "siglip", "neuclip"])
def test_gradcheck(case: str) -> None:
    """The M-step at held log-normalizers is a function, u_i Z-hat_i summed: numeric derivatives in float64. The
    value of a capped weight is no integral of its gradient, tau (l + rho) holds its factor tau, and the balanced form
    what positives pull with: these are left to the loops above."""
    name, settings, _ = CASES.get(case, (case, {}, None))
    plain = PLAIN if name == "em" else {}
    loss = build_loss(name, num_pairs=N, total_steps=40, steps_per_epoch=10, **(plain | settings))
    image, text, row = make_pairs(pairs=5, width=3, duplicates=True)
    aux = make_aux(row, loss, width=3)
    if "tau" in aux.rows:
        aux.rows["tau"] = torch.linspace(0.2, 0.4, 10, dtype=torch.float64).reshape(5, 2)
    a_GK = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.1, -1.5))

    def value(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        peers = Peers(image.detach(), text.detach(), row)
        features = Features(image, text, log_scale.exp(), bias)
        if name == "siglip":
            return loss(features, peers).loss
        assert isinstance(loss, ContrastiveLoss)
        step = _Step.of(loss, features, peers, aux, 3)
        step = replace(step, log_negatives_GK=torch.full_like(step.log_n_GK, math.log(N - 1)))
        if loss.temperature.kind == "rho":  # its factor is a constant of the surrogate
            return step.m_step(a_GK).objective * log_scale.detach().exp()
        if not loss.relative:  # the weight of the positive is held, too
            step = replace(step, own_GK=3.0 * torch.ones_like(step.own_GK))
        return step.m_step(a_GK).objective

    leaves = [image.requires_grad_(), text.requires_grad_()]
    if not isinstance(loss, ContrastiveLoss) or loss.temperature.kind == "learned":
        assert torch.autograd.gradcheck(value, (*leaves, log_scale, bias))
    else:
        assert torch.autograd.gradcheck(lambda i, t: value(i, t, log_scale, bias), leaves)


def test_gradcheck_of_infonce_itself() -> None:
    image, text, row = make_pairs(pairs=5, width=3, duplicates=True)
    log_scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def value(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        peers = Peers(image.detach(), text.detach(), row)
        return build_loss("infonce", num_pairs=N)(Features(image, text, log_scale.exp()), peers).loss

    assert torch.autograd.gradcheck(value, (image.requires_grad_(), text.requires_grad_(), log_scale))


@pytest.mark.parametrize("form", ["relative", "absolute", "balanced"])
def test_positives_that_are_all_of_z_pull_with_nothing(form: str) -> None:
    """In float32 their share of Z is 1 (N - 1 = 1 and a scale of 64 leave no rounding), what is left is 0 / 0."""
    image = text = torch.eye(4)
    loss = build_loss("em", num_pairs=2, positive=True, form=form)
    leaf = image.clone().requires_grad_()
    aux = Aux({"residual": torch.full((4, 2), torch.nan)}, torch.zeros(4, dtype=torch.long), loss.initial(4))
    out = loss(Features(leaf, text, torch.tensor(64.0)), Peers(image, text, torch.arange(4)), aux)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert gradient.abs().max() < 1e-20


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_pair_without_negatives_keeps_its_row(order: str) -> None:
    image, text, row = make_pairs(pairs=1)
    aux = Aux({"residual": torch.full((1, 2), 0.3, dtype=torch.float64)}, torch.ones(1, dtype=torch.long))
    out, grads = one_rank(em(order=order), image, text, row, aux)
    assert_same([remembered(out).rows["residual"]], [aux.rows["residual"]])
    assert all(g.isfinite().all() for g in grads)


def test_a_gradient_step_on_a_never_overshoots() -> None:
    rate = Rate("sgd", gamma=0.8)
    old, new = torch.full((1, 2), -2.0), torch.tensor([[8.0, -6.0]])
    got = rate.mix(old, new, rate.of(old, torch.ones(1), 0))
    assert got[0, 0] == 8.0  # e^{10} steps up end at the estimate
    assert got[0, 1].item() == pytest.approx(-2 - 0.8 * (1 - math.exp(-4)), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "gamma", "form"),
    [
        (["train.batch_size=16"], 0.5, "absolute"),
        (["train.batch_size=32"], 0.62, "absolute"),
        (["train.batch_size=64"], 0.73, "balanced"),
        (["train.batch_size=256"], 0.9, "balanced"),
        (["train.batch_size=32768"], 0.9, "balanced"),
        (["train.batch_size=16", "loss.bank=48"], 0.73, "balanced"),
        (["train.batch_size=64", "train.accumulate=4"], 0.73, "balanced"),
        (["train.batch_size=64", "train.accumulate=4", "train.negatives=chunk", "loss.order=before"], 0.5, "relative"),
        (["train.batch_size=16", "loss.prediction=null"], 0.5, "relative"),
        (["train.batch_size=64", "loss.gamma=0.3"], 0.3, "balanced"),
        (["train.batch_size=64", "loss.form=relative"], 0.73, "relative"),
    ],
)
def test_weight_and_form_go_with_what_the_estimates_are_over(settings: list[str], gamma: float, form: str) -> None:
    config = load_config(None, ["data.train=x", *settings])
    assert config.loss_choices == {"gamma": gamma, "form": form}
    loss: Any = make_loss(config, N, 10, 5)
    assert (loss.estep.rate.gamma, loss.form) == (gamma, form)


def test_the_default_gain_is_that_of_a_filter_in_its_steady_state() -> None:
    for pairs in (1, 16, 50, 256):
        gain = 1.0  # and the relative variance of a row, where that of a batch's estimate is 1, of the drift pairs / 32
        for _ in range(1000):
            before = gain + pairs / 32
            gain = before / (before + 1)
        assert gain_of(pairs) == pytest.approx(gain, abs=0.005)
