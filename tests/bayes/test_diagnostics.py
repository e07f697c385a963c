"""Diagnostics find what was put in."""

from __future__ import annotations

import pytest
import torch

from bnn_driver.bayes.diagnostics import effective_sample_size, split_r_hat
from bnn_driver.errors import BnnError


def _autoregressive(chains: int, n: int, phi: float) -> torch.Tensor:
    """AR(1) chains with unit variance, whose integrated autocorrelation time is (1+φ)/(1-φ)."""
    noise = torch.randn(chains, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = [noise[:, 0]]
    for t in range(1, n):
        x.append(phi * x[-1] + (1 - phi**2) ** 0.5 * noise[:, t])
    return torch.stack(x, 1)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregressive_chain(phi: float) -> None:
    chains, n = 8, 4000
    exact = chains * n * (1 - phi) / (1 + phi)
    assert float(effective_sample_size(_autoregressive(chains, n, phi))) == pytest.approx(
        exact, rel=0.12
    )  # error of the estimate


def test_r_hat_is_one_for_one_law_and_sees_a_chain_elsewhere_or_a_drift() -> None:
    same = _autoregressive(4, 2000, 0.3)
    assert float(split_r_hat(same)) == pytest.approx(1.0, abs=0.01)
    apart = same + torch.tensor([0.0, 0.0, 0.0, 2.0])[:, None]
    assert float(split_r_hat(apart)) > 1.2
    drift = same + torch.linspace(0, 3, 2000)
    assert float(split_r_hat(drift)) > 1.2


def test_quantities_are_judged_one_by_one() -> None:
    x = _autoregressive(4, 500, 0.5)
    both = torch.stack([x, -2 * x + 7], -1)
    assert split_r_hat(both).tolist() == pytest.approx([float(split_r_hat(x))] * 2, rel=1e-9)
    assert effective_sample_size(both).tolist() == pytest.approx([float(effective_sample_size(x))] * 2, rel=1e-9)


def test_three_samples_are_too_few() -> None:
    with pytest.raises(BnnError, match="at least 4 samples"):
        split_r_hat(torch.zeros(4, 3))
