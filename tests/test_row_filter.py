"""What docs/losses.md says of a row's average as a filter: the E-step's own mix, on rows whose normalizers wander."""

import math

import pytest
import torch

from vlcl.losses.estep import Rate

NOISE = 0.01  # r, the relative variance of a batch's estimate
ROWS, VISITS = 100_000, 40


def log_normal(variance: float, g: torch.Generator) -> torch.Tensor:
    """Logarithms of factors with mean 1 and that variance."""
    log_variance = math.log1p(variance)
    return torch.randn(ROWS, generator=g, dtype=torch.float64) * log_variance**0.5 - log_variance / 2


def relative_error(rate: Rate, drift: float) -> torch.Tensor:
    """Z~ / Z - 1 of all rows after so many visits, between each two of which Z is multiplied by a random factor."""
    g = torch.Generator().manual_seed(0)
    log_z, a = torch.zeros(ROWS, dtype=torch.float64), torch.full((ROWS,), torch.nan, dtype=torch.float64)
    for _ in range(VISITS):
        log_z = log_z - log_normal(drift, g)  # so that what was remembered is still without bias
        a = rate.mix(a, log_z + log_normal(NOISE, g), torch.full_like(a, rate.gamma))
    return torch.expm1(a - log_z)


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.8])
def test_the_gain_that_goes_with_a_drift_leaves_gamma_times_the_noise(gamma: float) -> None:
    drift = gamma**2 / (1 - gamma) * NOISE
    error = relative_error(Rate(gamma=gamma), drift)
    p = float(error.square().mean())
    assert p == pytest.approx(gamma * NOISE, rel=0.03)
    assert float((1 / (1 + error)).mean()) == pytest.approx(1 + p, abs=0.2 * p)  # the mean of e^-a, by 1 / Z
    assert float((1 / (1 + error)).var()) == pytest.approx(p, rel=0.1)
    for other in (gamma / 2, (1 + gamma) / 2):
        assert float(relative_error(Rate(gamma=other), drift).square().mean()) > p
