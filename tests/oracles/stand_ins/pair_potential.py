"""Energy, forces and stress of any structure, for stand-ins that answer in the words of a real code; plain Python, so that they start fast."""

from __future__ import annotations

import itertools
import math

DEPTH, STEEPNESS, CUTOFF, COULOMB = 1.5, 1.7, 4.5, 0.8  # eV, 1/Å, Å, eV
LENGTHS = {"H": 0.5, "O": 0.8, "He": 0.9, "Na": 1.4, "Cl": 1.1, "C": 0.8, "Ni": 1.2, "Si": 1.1}
"""Å; two atoms are at rest at the sum."""

Vector = list[float]


def evaluate(
    symbols: list[str], positions: list[Vector], cell: list[Vector] | None, charge: float, unpaired: float
) -> tuple[float, list[Vector], list[Vector]]:
    """E = Σ_pairs f(r) {D [(1 - exp(-a (r - r0)))² - 1] + C (charge² + unpaired²)/A² exp(-r)}, with f = (1 - r²/cutoff²)³.

    Args: positions: Å.   cell: Å, rows, or None.   Returns: eV; eV/Å; Σ r ⊗ dE/dr over pairs, eV (the stress times the volume).
    """
    n = len(symbols)
    energy, forces, strain = 0.0, [[0.0] * 3 for _ in range(n)], [[0.0] * 3 for _ in range(3)]
    strength = COULOMB * (charge**2 + unpaired**2) / n**2
    for i, j, shift in itertools.product(range(n), range(n), images(cell)):
        d = [positions[j][x] - positions[i][x] + shift[x] for x in range(3)]
        r = math.sqrt(sum(x * x for x in d))
        if r < 1e-9 or r >= CUTOFF:
            continue
        value, slope = pair(r, LENGTHS[symbols[i]] + LENGTHS[symbols[j]], strength)
        energy += value / 2
        for x in range(3):
            # each pair comes twice, as (i, j) and as (j, i)
            forces[i][x] += slope * d[x] / r
            for y in range(3):
                strain[x][y] += slope * d[x] * d[y] / r / 2
    return energy, forces, strain


def pair(r: float, length: float, strength: float) -> tuple[float, float]:
    """Energy and its slope."""
    decay = math.exp(-STEEPNESS * (r - length))
    bare = DEPTH * ((1 - decay) ** 2 - 1) + strength * math.exp(-r)
    bare_slope = 2 * DEPTH * STEEPNESS * (1 - decay) * decay - strength * math.exp(-r)
    inside = 1 - (r / CUTOFF) ** 2
    fade, fade_slope = inside**3, -6 * r / CUTOFF**2 * inside**2
    return bare * fade, bare_slope * fade + bare * fade_slope


def images(cell: list[Vector] | None) -> list[Vector]:
    """Lattice vectors; the cells of the tests are wider than half the cutoff, and atoms may have left theirs by two."""
    if cell is None:
        return [[0.0] * 3]
    steps = itertools.product(range(-4, 5), repeat=3)
    return [[sum(k[v] * cell[v][x] for v in range(3)) for x in range(3)] for k in steps]


def volume(cell: list[Vector]) -> float:
    """Å^3."""
    (a, b, c) = cell
    cross = [b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]
    return abs(sum(a[x] * cross[x] for x in range(3)))
