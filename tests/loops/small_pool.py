"""A small pool of labelled frames: water and hydroxyl, shaken, labelled by a pair potential with other weights than the start's."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms

from bnn_driver.loops.seeds import derive
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Frames

WATER = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]])
SHIFT = {1: -13.6, 8: -2040.0}
"""eV per atom, between the labels and the potential."""

CONFIG = """
[run]
seed = 7
[potential]
model = "toy"
dtype = "float64"
[ensemble]
members = 4
steps_per_update = 150
prior_sd = 0.2
force_noise = "0.1 eV/A"
loss_margin = 50.0
temperature_range = [0.0, 1000.0]
[accuracy]
energy = "100 meV"
[pool]
file = "pool.extxyz"
energy_key = "REF_energy"
forces_key = "REF_forces"
test = 12
start = 6
batch = 4
rounds = 3
plateau = false
baseline = 1
"""


def of_scratch(text: str) -> str:
    """A config without the settings of chains and of their foundation."""
    begin, end = text.index("steps_per_update"), text.index("[accuracy]")
    return text[:begin].replace('model = "toy"\n', "") + text[end:]


def labelled(symbols: str, positions: np.ndarray) -> Atoms:
    """One frame with the labels of the other potential."""
    atoms = Atoms(symbols, positions=positions)
    generator = torch.Generator().manual_seed(derive(0, "toy potential"))
    potential = ToyPotential([1, 8], generator=generator)
    weights = {k: (x + 0.1)[None] for k, x in potential.weights.items()}
    frame = Frames(atoms.numbers, positions[None])
    found = potential.evaluate(weights, build_graph(frame, potential.cutoff, potential.dtype, potential.device))
    atoms.info["REF_energy"] = float(found.energy[0, 0]) + sum(SHIFT[z] for z in atoms.numbers)
    atoms.arrays["REF_forces"] = found.forces[0, 0].numpy()
    return atoms


def frames(count: int = 60, seed: int = 0, mixed: bool = True) -> list[Atoms]:
    """Waters, every fourth time a hydroxyl and every fifth time a water with its oxygen last."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        places = WATER + rng.normal(0, 0.03 + 0.05 * (i % 3 == 0), WATER.shape)
        if mixed and i % 4 == 3:
            out.append(labelled("OH", places[:2]))
        elif mixed and i % 5 == 4:
            out.append(labelled("H2O", places[[1, 2, 0]]))
        else:
            out.append(labelled("OH2", places))
    return out


def write_pool(folder: Path, pool: list[Atoms] | None = None, config: str = CONFIG) -> Path:
    """Write pool and config; returns the config's path."""
    ase.io.write(folder / "pool.extxyz", frames() if pool is None else pool, format="extxyz")
    (folder / "bnn.toml").write_text(config)
    return folder / "bnn.toml"
