"""One gradient on 1, 2 and 3 gloo ranks, for every preset: towers, logit_scale, bias, rows, temperatures, shared parts;
even and uneven batches. And the state that a loss keeps: read, written, saved and re-sharded by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import D, G, N
from ranks import on_ranks
from torch import Tensor, nn

from vlcl import distributed
from vlcl.batch import Aux, Features
from vlcl.loss_state import LossState
from vlcl.losses import build_loss

CASES = {
    **{name: (name, {}) for name in ("infonce", "dcl", "siglip", "sogclr", "isogclr", "fastclip-v1", "fastclip-v2")},
    **{name: (name, {}) for name in ("fastclip-v3", "scent")},
    "neuclip": ("neuclip", {"prototypes": 6, "prototype_steps": 2}),
    "em-after": ("em", {"gamma": 0.4}),
    "em-before": ("em", {"gamma": 0.4, "order": "before"}),
    "em-sample": ("em", {"gamma": 0.4, "mode": "sample"}),
    "em-bank": ("em", {"bank": 7, "bank_negatives": True, "prediction": "level"}),
    "em-absolute": ("em", {"form": "absolute", "temperature": "rho"}),
    "em-balanced": ("em", {"form": "balanced", "positive": True, "gamma": 0.4}),
    # Every row known beforehand: one pass over the tiles.
    "em-one-pass": ("em", {"order": "before"}),
    "em-one-pass-pair": ("em", {"order": "before", "temperature": "pair", "form": "absolute"}),
    "em-one-pass-bank": ("em", {"order": "before", "bank": 7, "bank_negatives": True, "prediction": "level"}),
    # Pairs of one caption are no negatives, whichever ranks they are on.
    **{f"{name}-captions": (name, {"same_caption": "ignore"}) for name in ("infonce", "siglip", "em", "neuclip")},
    "em-bank-captions": ("em", {"same_caption": "ignore", "bank": 7, "bank_negatives": True}),
}


class Towers(nn.Module):
    """Two linear towers, a scale and a bias: enough to see what DDP averages."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(6, D, dtype=torch.float64) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if bias else None

    def forward(self, x: Tensor, y: Tensor) -> Features:
        image, text = F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1)
        return Features(image, text, self.log_scale.exp(), self.bias)


def batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    result = []
    for _ in range(2):
        x, y = (torch.randn(G, 6, generator=g, dtype=torch.float64) for _ in range(2))
        row = torch.randperm(N, generator=g)[:G]
        row[7] = row[2]  # a duplicate that lives on two ranks
        result.append((x, y, row, torch.arange(G) // 3 % 3 - (1 << 62)))  # captions: each on two ranks at least
    return result


def steps(uneven: bool = False) -> dict[str, dict[str, Tensor]]:
    """Two steps of each loss on G pairs split over the ranks: the second sees what the first left."""
    rank, world = distributed.rank(), distributed.world_size()
    borders = [r * G // world for r in range(world + 1)]
    if uneven:
        borders = [0, *(min(G, 7 + 4 * r) for r in range(world - 1)), G]
    part = slice(borders[rank], borders[rank + 1])
    results = {}
    for name, (preset, settings) in CASES.items():
        loss = build_loss(preset, num_pairs=N, total_steps=4, steps_per_epoch=1, **settings)
        state, result = LossState(loss, N, D), {}
        if "one-pass" in name:
            known = {"residual": torch.linspace(-3, 1, 2 * N).reshape(N, 2)}
            known |= {column: torch.full((N, 2), 0.2) for column in loss.columns if column.startswith("tau")}
            state.write(torch.arange(N), Aux(known, shared={"level": torch.ones(3)} if "bank" in name else {}))
        model = nn.parallel.DistributedDataParallel(Towers(preset == "siglip"))
        for step, (x, y, row, caption) in enumerate(batches()):
            model.zero_grad()
            features = model(x[part], y[part])
            peers = distributed.gather_peers(features, row[part], even=not uneven, caption_B=caption[part])
            out = loss(features, peers, state.read(peers.row_G), step)
            out.loss.backward()
            state.write(peers.row_G, out.aux)
            result |= {f"{step}/{key}": p.grad.clone() for key, p in model.module.named_parameters()}
            result[f"{step}/loss"] = distributed.all_mean(out.loss)
        rows = state.read(torch.arange(N))
        result |= {f"rows/{key}": x for key, x in rows.rows.items()} | {
            f"shared/{k}": x for k, x in rows.shared.items()
        }
        results[name] = result | {"visits": rows.visits_G}
    return results


@pytest.fixture(scope="module")
def one_rank() -> dict[str, dict[str, Tensor]]:
    return on_ranks(1, steps)[0]


@pytest.mark.parametrize(("world", "uneven"), [(2, False), (3, False), (2, True), (3, True)])
def test_ranks_give_the_gradients_of_one(one_rank: dict[str, dict[str, Tensor]], world: int, uneven: bool) -> None:
    for results in on_ranks(world, steps, uneven):
        for name, expected in one_rank.items():
            assert results[name].keys() == expected.keys()
            fixed = CASES[name][0] in ("sogclr", "isogclr", "fastclip-v1", "fastclip-v2") or "pair" in name
            assert (expected["1/log_scale"].abs() > 1e-4) == (not fixed)
            for key, value in expected.items():
                # Rows and shared parts are float32: a sum in another order may round the other way.
                tolerance = 1e-9 if key.startswith("0/") and CASES[name][0] != "neuclip" else 2e-5
                torch.testing.assert_close(
                    results[name][key], value, rtol=tolerance, atol=tolerance, equal_nan=True,
                    msg=lambda text, name=name, key=key: f"{name} {key}: {text}",
                )  # fmt: skip


def fill(folder: str, preset: str, settings: dict) -> Aux:
    loss = build_loss(preset, num_pairs=N, **settings)
    state = LossState(loss, N, D)
    g = torch.Generator().manual_seed(4)
    row = torch.randperm(N, generator=g)[:G]
    shared = {k: torch.rand(x.shape, generator=g).to(x.dtype) for k, x in loss.initial(D).items()}
    state.write(row, Aux({name: torch.randn(G, 2, generator=g) for name in loss.columns}, shared=shared))
    state.save(Path(folder))
    return state.read(torch.arange(N))


def restore(folder: str, preset: str, settings: dict, rows: int = N) -> Aux:
    state = LossState(build_loss(preset, num_pairs=rows, **settings), rows, D)
    state.load(Path(folder))
    return state.read(torch.arange(rows))


BANK = {"bank": 7, "prediction": "prototypes"}


@pytest.mark.parametrize(("preset", "settings"), [("fastclip-v2", {}), ("em", BANK), ("infonce", {})])
def test_a_state_saved_by_two_ranks_loads_on_one_and_three(tmp_path: Path, preset: str, settings: dict) -> None:
    expected = on_ranks(2, fill, str(tmp_path / "s"), preset, settings)[0]
    for got in [
        restore(str(tmp_path / "s"), preset, settings),
        *on_ranks(3, restore, str(tmp_path / "s"), preset, settings),
    ]:
        for part in ("rows", "shared"):
            assert getattr(got, part).keys() == getattr(expected, part).keys()
            for key, x in getattr(expected, part).items():
                torch.testing.assert_close(getattr(got, part)[key], x, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.visits_G, expected.visits_G)


def test_a_state_of_another_n_k_or_size_is_refused(tmp_path: Path) -> None:
    fill(str(tmp_path / "s"), "em", {"bank": 7})
    with pytest.raises(ValueError, match=f"has {N} rows, the table {N + 1}"):
        restore(str(tmp_path / "s"), "em", {"bank": 7}, rows=N + 1)
    with pytest.raises(ValueError, match="has 2 columns, the table 6"):
        restore(str(tmp_path / "s"), "em", {"bank": 7, "temperature": "pair"})
    with pytest.raises(
        ValueError, match=r"the loss remembers .*'bank_image': \(9, 5\).* the checkpoint holds .*\(7, 5\)"
    ):
        restore(str(tmp_path / "s"), "em", {"bank": 9})
    fill(str(tmp_path / "plain"), "em", {"prediction": None})
    with pytest.raises(ValueError, match="cannot be read"):
        restore(str(tmp_path / "plain"), "em", {"bank": 7})


def test_the_documentations_example_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("3_000_000", "300")
    g = torch.Generator().manual_seed(0)
    image, text_ = (F.normalize(torch.randn(4, 512, generator=g), dim=1).requires_grad_() for _ in range(2))
    scope = {
        "image_BD": image,
        "text_BD": text_,
        "row_B": torch.arange(4),
        "step": 0,
        "logit_scale": torch.tensor(14.0),
    }
    exec(code, scope)
    assert image.grad is not None
    assert scope["state"].table.rows_written == 4
