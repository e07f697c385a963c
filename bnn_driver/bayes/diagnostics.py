"""Do the chains agree, and how many independent samples are they worth?

Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, DOI 10.1214/20-BA1221.  (The kinetic temperature is in `sghmc`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnn_driver.errors import BnnError


def _halves(samples: Tensor) -> Tensor:
    """Each chain cut in two.  Args: (M, n, ...).  Returns: (2M, n // 2, ...), an odd middle sample dropped."""
    n = samples.shape[1]
    if n < 4:
        raise BnnError(f"diagnostics need at least 4 samples per chain, but got {n}")
    return torch.cat([samples[:, : n // 2], samples[:, n - n // 2 :]])


def _variances(chains: Tensor) -> tuple[Tensor, Tensor]:
    """Within-chain variance and pooled estimate of the variance.  Args: (m, n, ...).  Returns: (...), (...)."""
    n = chains.shape[1]
    within = chains.var(1).mean(0)
    between = chains.mean(1).var(0)
    return within, (n - 1) / n * within + between


def split_r_hat(samples: Tensor) -> Tensor:
    """Potential scale reduction of chains cut in halves; 1 for chains of one law, above 1.01 is suspect.

    Args: samples: (M, n, ...), M chains of n samples.   Returns: (...).   Raises: BnnError for n < 4.
    """
    within, pooled = _variances(_halves(samples))
    return torch.sqrt(pooled / within)


def effective_sample_size(samples: Tensor) -> Tensor:
    """Number of independent samples with the same error of the mean.

    M n / (1 + 2 Σ ρ_t), the sum of autocorrelations cut where a pair of neighbours turns negative and made non-increasing
    (Geyer's initial monotone sequence), over all chains cut in halves.

    Args: samples: (M, n, ...).   Returns: (...), at most M n log10(M n).   Raises: BnnError for n < 4.
    """
    chains = _halves(samples)
    m, n = chains.shape[:2]
    within, pooled = _variances(chains)
    centred = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=1)
    autocovariance = torch.fft.irfft(spectrum * spectrum.conj(), n=2 * n, dim=1)[:, :n].mean(0) / (n - 1)
    rho = 1.0 - (within - autocovariance) / pooled  # (n, ...)
    pairs = rho[: n - n % 2].unflatten(0, (n // 2, 2)).sum(1)
    positive = torch.cumprod((pairs > 0).to(pairs.dtype), 0)
    monotone = torch.cummin(pairs, 0).values.clamp(min=0)
    time = 2.0 * (positive * monotone).sum(0) - 1.0
    count = torch.tensor(float(m * n), dtype=time.dtype)
    return torch.minimum(count / time.clamp(min=1e-12), count * count.log10())
