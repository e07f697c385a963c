"""Transfer-learning prior: independent Gaussians around the foundation model's weights, or around a centre of each chain's own.

Own centres θ_0 + dispersion · ξ_m make the chains an anchored ensemble: for a linear model whose centres are drawn from the prior
and whose labels carry drawn noise, the maxima of the M posteriors are exact samples of the one posterior (Pearce, Leibfried,
Brintrup 2020, arXiv:1810.05546; Osband, Aslanides, Cassirer 2018, arXiv:1806.03335).  Here the centres spread the chains along the
weights that few labels do not fix, which no chain of a few thousand steps reaches from a common start.

The draws ξ_m have their mean over the chains removed.  Where the potential is linear in its weights, the mean of the chains is then
the maximum around θ_0 itself, to rounding and for two chains already, instead of that plus 1/M of the variance of the centres; the
sample covariance (divisor M - 1) does not see a common shift and stays unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.errors import ConfigError


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """p(θ) = Π_d N(θ_d | centre_d, sd_d²) over flat weights."""

    centre: Tensor
    """(D,) foundation weights, 0 for the noise head; or (M, D), one centre per chain."""
    sd: Tensor
    """(D,) > 0, one standard deviation per weight."""

    def __post_init__(self) -> None:
        if self.centre.ndim not in (1, 2) or self.sd.shape != self.centre.shape[-1:]:
            shapes = tuple(self.centre.shape), tuple(self.sd.shape)
            raise ConfigError(f"the prior needs a centre (D,) or (M, D) and sd (D,), but got {shapes[0]} and {shapes[1]}")
        if not bool((self.sd > 0).all()):
            raise ConfigError(f"every sd of the prior must be positive, but the smallest is {float(self.sd.min())}")

    def log_density(self, theta: Tensor) -> Tensor:
        """Log density, constants included.  Args: theta: (M, D).  Returns: (M,)."""
        z = (theta - self.centre) / self.sd
        return -0.5 * (z * z).sum(-1) - self.sd.log().sum() - 0.5 * math.log(2 * math.pi) * self.sd.numel()

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of the log density, -(θ - centre)/sd².  Args: theta: (M, D).  Returns: (M, D)."""
        return (self.centre - theta) / self.sd**2


def dispersed(prior: GaussianPrior, dispersion: Tensor, seeds: Sequence[int]) -> GaussianPrior:
    """The prior with centres centre + dispersion · (ξ_m - mean of ξ over the chains), ξ_m ~ N(0, 1), one per seed.

    Args: prior: with one centre (D,).   dispersion: (D,) >= 0.   seeds: M; the centres depend on them alone, on every device.
    """
    draws = (torch.randn(len(dispersion), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds)
    offsets = torch.stack([(dispersion.double() * draw).to(prior.centre) for draw in draws])
    return GaussianPrior(prior.centre + (offsets - offsets.mean(dim=0)), prior.sd)


def group_sds(sizes: Mapping[str, int], groups: Mapping[str, float], default: float) -> Tensor:
    """One prior sd per weight from one number per group of names.

    Args: sizes: name -> number of weights, in the order of the flat vector.   groups: name prefix -> sd, the longest fitting
    prefix holds.   default: sd of all other names.
    Returns: (D,) float64.    Raises: ConfigError when a prefix fits no name.
    """
    unused = [prefix for prefix in groups if not any(name.startswith(prefix) for name in sizes)]
    if unused:
        known = sorted({name.split(".")[0] for name in sizes})
        raise ConfigError(f"no weight's name starts with {unused[0]!r}; the names start with {known}")
    parts = []
    for name, size in sizes.items():
        fitting = [prefix for prefix in groups if name.startswith(prefix)]
        sd = groups[max(fitting, key=len)] if fitting else default
        parts.append(torch.full((size,), float(sd), dtype=torch.float64))
    return torch.cat(parts)
