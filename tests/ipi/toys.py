"""Analytic potentials as handlers: exact energy, forces and virial, batched, eV and Å."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from bnn_driver.ipi.client import Reply, Request


@dataclass(eq=False)
class Harmonic:
    """E = k/2 Σ r² about the origin; counts its calls and the structures in each."""

    k: float = 0.5  # eV/Å^2
    extras: str = '{"toy": 1.0}'
    sizes: list[int] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)

    def __call__(self, request: Request) -> Reply:
        x = request.positions
        self.sizes.append(len(x))
        self.parameters.add(request.parameters)
        forces = -self.k * x
        virial = np.einsum("bai,baj->bij", forces, x)
        return Reply(0.5 * self.k * (x**2).sum(axis=(1, 2)), forces, virial, [self.extras] * len(x))


@dataclass(eq=False)
class PeriodicLennardJones:
    """4ε Σ_{i<j} (s¹² - s⁶), s = σ/r, over all images within the cutoff, times a smooth switch that ends at the cutoff.

    The switch is ASE's `smooth=True`: (rc² - r²)² (rc² + 2r² - 3ro²) / (rc² - ro²)³ between ro and rc.
    """

    epsilon: float  # eV
    sigma: float  # Å
    onset: float  # Å
    cutoff: float  # Å
    calls: int = 0

    def __call__(self, request: Request) -> Reply:
        self.calls += 1
        results = [self._one(x, h) for x, h in zip(request.positions, request.cell, strict=True)]
        energy, forces, virial = (np.array(part) for part in zip(*results, strict=True))
        return Reply(energy, forces, virial, [json.dumps({"toy": 1.0})] * len(energy))

    def _one(self, x: np.ndarray, cell: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        energy, forces, virial = 0.0, np.zeros_like(x), np.zeros((3, 3))
        for shift in product((-2, -1, 0, 1, 2), repeat=3):
            d = x[None, :, :] + np.array(shift) @ cell - x[:, None, :]  # from i to the image of j
            r2 = (d**2).sum(axis=-1)
            r2[(r2 < 1e-12) | (r2 > self.cutoff**2)] = np.inf
            pair, slope = self._pair(r2)  # u(r) and du/d(r²)
            energy += 0.5 * pair.sum()
            f = 2.0 * slope[..., None] * np.where(np.isfinite(r2)[..., None], d, 0.0)  # on i
            forces += f.sum(axis=1)
            virial += -0.5 * np.einsum("ijk,ijl->kl", f, np.where(np.isfinite(r2)[..., None], d, 0.0))
        return energy, forces, virial

    def _pair(self, r2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        finite = np.isfinite(r2)
        q = np.where(finite, r2, 1.0)
        s6 = (self.sigma**2 / q) ** 3
        u, du = 4 * self.epsilon * (s6**2 - s6), 4 * self.epsilon * (-6 * s6**2 + 3 * s6) / q
        rc2, ro2 = self.cutoff**2, self.onset**2
        norm = (rc2 - ro2) ** 3
        switch = np.where(q < ro2, 1.0, (rc2 - q) ** 2 * (rc2 + 2 * q - 3 * ro2) / norm)
        dswitch = np.where(q < ro2, 0.0, 6 * (rc2 - q) * (ro2 - q) / norm)
        return np.where(finite, u * switch, 0.0), np.where(finite, du * switch + u * dswitch, 0.0)
