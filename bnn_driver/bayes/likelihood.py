"""Likelihood of labelled structures, with a head that may predict the noise of energies and of each atom's force.

Rensmeyer, Kramer, Niggemann, Digital Discovery 2026, DOI 10.1039/d5dd00392j.  Axes: M members, B frames, A atoms, F features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bnn_driver.errors import ConfigError

NoisyQuantity = Literal["energy", "forces"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_UPPER = (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)


def hidden_widths(n_features: int) -> tuple[int, int]:
    """Published widths of the noise head: 64-16 for MACE (256 features), 32-16 for NequIP (64 features or fewer)."""
    return (32, 16) if n_features <= 64 else (64, 16)


@dataclass(frozen=True)
class NoiseHead:
    """Multilayer perceptron from an atom's invariant features to the logs of its noise, SiLU between the layers."""

    n_features: int
    """F."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    predicts: tuple[NoisyQuantity, ...] = ("forces",)
    """What the outputs stand for, in order; published: the forces alone."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight: noise.w0 (F, H0), noise.b0 (H0,), ..., the last layer has an output per quantity.

        A head that predicts nothing has no weights.
        """
        if not self.predicts:
            return {}
        widths = (self.n_features, *self.hidden, len(self.predicts))
        shapes: dict[str, tuple[int, ...]] = {}
        for k, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            shapes[f"noise.w{k}"] = (n_in, n_out)
            shapes[f"noise.b{k}"] = (n_out,)
        return shapes

    def init(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Weights at the start and at the prior's centre: zeros, as published (every atom starts at the base noise)."""
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in self.shapes.items()}

    def log_factors(self, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """The perceptron's outputs per atom.

        Args: weights: noise.* with a leading M.   features: (M, B, A, F).   Returns: (M, B, A, outputs).
        Raises: ConfigError when the number of features is not F.
        """
        if features.shape[-1] != self.n_features:
            raise ConfigError(
                f"the noise head expects {self.n_features} features per atom, but the potential gave {features.shape[-1]}"
            )
        m, b, a, _ = features.shape
        x = features.reshape(m, b * a, self.n_features)
        last = len(self.hidden)
        for k in range(last + 1):
            x = torch.baddbmm(weights[f"noise.b{k}"].unsqueeze(1), x, weights[f"noise.w{k}"])  # (M, B*A, n_out)
            if k < last:
                x = torch.nn.functional.silu(x)
        return x.reshape(m, b, a, len(self.predicts))


@dataclass(frozen=True)
class NoiseModel:
    """Standard deviations of a label around a member's prediction: fixed, or times what the head predicts."""

    energy_sd: float
    """eV, total energy; published: 10 % of the promised accuracy."""
    force_base_sd: float
    """eV/Å; published: 0.1 kcal/mol/Å."""
    stress_sd: float
    """eV/Å^3; published: 0.1/16 kcal/mol/Å^3."""
    head: NoiseHead

    def __call__(self, features: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Noise of energies and forces: σ_i = base · exp(MLP(v_i)) on atom i, σ_E = base · exp(mean over atoms of the MLP).

        Args: features: (M, B, A, F).   weights: noise.* with a leading M (other names are ignored).
        Returns: (M, B) eV and (M, B, A) eV/Å.
        """
        force = features.new_full(features.shape[:-1], self.force_base_sd)
        energy = features.new_full(features.shape[:2], self.energy_sd)
        if not self.head.predicts:
            return energy, force
        factors = dict(zip(self.head.predicts, self.head.log_factors(weights, features).unbind(-1), strict=True))
        if "forces" in factors:
            force = self.force_base_sd * torch.exp(factors["forces"])
        if "energy" in factors:
            energy = self.energy_sd * torch.exp(factors["energy"].mean(dim=-1))
        return energy, force


@dataclass(frozen=True, eq=False)
class Targets:
    """Labels of B frames, shared by the members, or (M, B) when each member has its own minibatch."""

    energy: Tensor
    """([M,] B) eV, offset added."""
    forces: Tensor
    """([M,] B, A, 3) eV/Å."""
    stress: Tensor | None = None
    """([M,] B, 3, 3) eV/Å^3, ASE's sign; rows without a label hold any finite number."""
    has_stress: Tensor | None = None
    """([M,] B) bool; None: every frame has one when `stress` is given."""

    def take(self, index: Tensor) -> Targets:
        """Targets of a minibatch.  Args: index: (b,) or (M, b) int64 into the B frames of shared labels."""
        stress = None if self.stress is None else self.stress[index]
        has_stress = None if self.has_stress is None else self.has_stress[index]
        return Targets(self.energy[index], self.forces[index], stress, has_stress)


def _gaussian(residual: Tensor, sd: Tensor | float) -> Tensor:
    """Log density of N(residual | 0, sd²), elementwise."""
    log_sd = sd.log() if isinstance(sd, Tensor) else math.log(sd)
    return -0.5 * (residual / sd) ** 2 - log_sd - _HALF_LOG_2PI


def log_likelihood(
    energy: Tensor,
    forces: Tensor,
    stress: Tensor | None,
    targets: Targets,
    energy_noise_sd: Tensor,
    force_noise_sd: Tensor,
    stress_noise_sd: float,
) -> Tensor:
    """Log-likelihood of each frame: plain sum of Gaussian log densities over all components, constants included.

    log N(E | E_θ, σ_E²) + Σ_i log N(F_i | F_θ,i, σ_i² I_3) + Σ_6 log N(S | S_θ, σ_S²); the six independent components of the
    symmetric stress count once each, and a frame without a stress label contributes none.

    Args:
        energy: (M, B) eV.   forces: (M, B, A, 3) eV/Å.   stress: (M, B, 3, 3) eV/Å^3 or None.   targets: the labels.
        energy_noise_sd: (M, B) eV.   force_noise_sd: (M, B, A) eV/Å.   stress_noise_sd: eV/Å^3.
    Returns: (M, B).    Raises: ConfigError when the labels have a stress and the prediction has none.
    """
    total = _gaussian(energy - targets.energy, energy_noise_sd)
    total = total + _gaussian(forces - targets.forces, force_noise_sd.unsqueeze(-1)).sum((-2, -1)).to(total.dtype)
    if targets.stress is None:
        return total
    if stress is None:
        raise ConfigError(
            "the labels have a stress but the prediction has none; give the model's stress or drop it from the labels"
        )
    term = _gaussian(_six(stress - targets.stress), stress_noise_sd).sum(-1)
    if targets.has_stress is not None:
        term = torch.where(targets.has_stress, term, torch.zeros_like(term))
    return total + term.to(total.dtype)


def squared_residuals(
    energy: Tensor,
    forces: Tensor,
    stress: Tensor | None,
    targets: Targets,
    energy_noise_sd: Tensor,
    force_noise_sd: Tensor,
    stress_noise_sd: float,
) -> tuple[Tensor, Tensor]:
    """Squared residuals in units of the noise, added up over all frames for energies, forces and stresses apart.

    Args: as in `log_likelihood`.   Returns: sums (M, 3) float64 and the number of components in each, (3,) int64.
    """
    e = ((energy - targets.energy) / energy_noise_sd).square()
    f = ((forces - targets.forces) / force_noise_sd.unsqueeze(-1)).square()
    sums, counts = [e.sum(-1), f.sum((-3, -2, -1))], [e[0].numel(), f[0].numel()]
    if stress is None or targets.stress is None:
        sums, counts = [*sums, torch.zeros_like(sums[0])], [*counts, 0]
    else:
        s = (_six(stress - targets.stress) / stress_noise_sd).square().sum(-1)
        known = torch.ones_like(s, dtype=torch.bool) if targets.has_stress is None else targets.has_stress.expand(s.shape)
        sums, counts = [*sums, torch.where(known, s, torch.zeros_like(s)).sum(-1)], [*counts, 6 * int(known[0].sum())]
    return torch.stack([x.double() for x in sums], dim=-1), torch.tensor(counts)


def _six(tensor: Tensor) -> Tensor:
    """The six independent components of a symmetric tensor: (..., 3, 3) -> (..., 6)."""
    return torch.stack([tensor[..., i, j] for i, j in _UPPER], dim=-1)  # a list as index would be copied to a GPU
