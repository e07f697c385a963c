"""Water clusters, protonated ones, and scans of a proton between two oxygens or nitrogens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

WATER_STARTS = {1: 3, 2: 8, 3: 7, 4: 6, 5: 5, 6: 5}  # size: independent starting structures
PROTONATED_STARTS = {1: 4, 2: 12, 3: 8, 4: 10, 5: 3}

HYDRONIUM = Atoms("OH3", [[0, 0, 0], [0.93, 0, -0.29], [-0.465, 0.805, -0.29], [-0.465, -0.805, -0.29]])


def turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """The structure about its centre, in a random orientation."""
    positions = atoms.positions - atoms.positions.mean(axis=0)
    return Atoms(atoms.numbers, positions @ Rotation.random(rng=rng).as_matrix().T)


def packed(core: Atoms, n_water: int, rng: np.random.Generator) -> Atoms:
    """The core with water molecules added one by one, each oxygen 2.5 to 3.1 Å from the nearest one and no contact below 1.6 Å."""
    cluster = core.copy()
    while n_water:
        oxygen = cluster.positions[cluster.numbers == 8]
        one = turned(molecule("H2O"), rng)
        direction = rng.standard_normal(3)
        one.positions += (
            oxygen[rng.integers(len(oxygen))] + rng.uniform(2.5, 3.1) * direction / np.linalg.norm(direction) - one.positions[0]
        )
        apart = np.linalg.norm(cluster.positions[:, None] - one.positions[None], axis=-1)
        if apart.min() > 1.6 and apart[cluster.numbers == 8, 0].min() > 2.45:
            cluster += one
            n_water -= 1
    return cluster


def water(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """Starting structures of (H2O)n by name."""
    return {
        f"(H2O){n}": [packed(turned(molecule("H2O"), rng), n - 1, rng) for _ in range(count)] for n, count in WATER_STARTS.items()
    }


def protonated(rng: np.random.Generator) -> dict[str, list[Atoms]]:
    """Starting structures of H+(H2O)n by name, charge +1."""
    return {
        f"H+(H2O){n}": [packed(turned(HYDRONIUM, rng), n - 1, rng) for _ in range(count)]
        for n, count in PROTONATED_STARTS.items()
    }


def zundel(separation: float, offset: float, rng: np.random.Generator) -> Atoms:
    """H5O2+ with two waters `separation` Å apart and the proton `offset` Å from the middle, plus small noise."""
    water_one = np.array([[0.0, 0.0, 0.0], [-0.35, 0.78, 0.43], [-0.35, -0.78, 0.43]])
    turn = Rotation.from_rotvec([rng.uniform(0, 2 * np.pi), 0, 0]).as_matrix()
    water_two = (water_one * [-1, 1, 1]) @ turn.T + [separation, 0, 0]
    side = 0.15 * rng.standard_normal(2)
    proton = [[0.5 * separation + offset, *side]]
    positions = np.concatenate([water_one, water_two, proton])
    return Atoms("OH2OH2H", positions + 0.03 * rng.standard_normal(positions.shape))


def proton_scans(rng: np.random.Generator) -> Iterator[tuple[str, int, list[Atoms]]]:
    """(name, charge, structures): the proton along O-O in H5O2+, and in H5O2+ with one or two waters around it."""
    grid = [(r, x) for r in np.linspace(2.25, 3.35, 16) for x in np.linspace(-0.7, 0.7, 15) if 0.5 * r - abs(x) > 0.85]
    yield "H+(H2O)2", 1, [zundel(r, x, rng) for r, x in grid * 2]
    for n in (1, 2):
        starts = [zundel(rng.uniform(2.3, 3.1), rng.uniform(-0.35, 0.35), rng) for _ in range(90)]
        yield f"H+(H2O){2 + n}", 1, [packed(x, n, rng) for x in starts]
    grid = [(r, x) for r in np.linspace(2.3, 3.3, 11) for x in np.linspace(0.0, 1.2, 13) if r - 0.96 - x > 0.85]
    yield "H-bond", 0, [water_pair(r, x, rng) for r, x in grid * 2]


def water_pair(separation: float, offset: float, rng: np.random.Generator) -> Atoms:
    """Two waters with one hydrogen moved by `offset` Å from its oxygen towards the other, `separation` Å away."""
    donor = np.array([[0.0, 0.0, 0.0], [0.96 + offset, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    acceptor = np.array([[separation, 0.0, 0.0], [separation + 0.45, -0.3, 0.78], [separation + 0.45, -0.3, -0.78]])
    positions = np.concatenate([donor, acceptor])
    return Atoms("OH2OH2", positions + 0.03 * rng.standard_normal(positions.shape))
