"""Whole runs with the truth known: the program, real i-PI and a teacher model as the oracle; every frame is judged afterwards.

What was served is read from i-PI's own output (positions and extras of every bead at every step), not from the program's books.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from bnn_driver.bayes.calibration import clopper_pearson
from bnn_driver.loops.chain_update import energy_offset
from bnn_driver.records import Frames
from bnn_driver.store.dataset import LabelStore
from bnn_driver.units import HARTREE, KCAL_PER_MOL
from oracles.model import Teacher

XML = """<simulation verbosity='low' threading='false' safe_stride='20' floatformat='%20.12e'>
  <output prefix='simulation'>
    <properties stride='20' filename='out'> [step, conserved{{electronvolt}}, temperature{{kelvin}}] </properties>
    <trajectory stride='1' filename='pos'> positions{{angstrom}} </trajectory>
    <trajectory stride='1' filename='energy' extra_type='committee_pot'> extras </trajectory>
    <trajectory stride='1' filename='source' extra_type='bnn_source'> extras </trajectory>
    <checkpoint stride='100'/>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>{seed}</seed></prng>
  <ffsocket name='bnn' mode='unix' pbc='false'><address>{address}</address>{batch}<latency>1e-4</latency></ffsocket>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz' units='angstrom'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces><force forcefield='bnn'/></forces>
    <ensemble><temperature units='kelvin'> 300 </temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.5 </timestep>
        <thermostat mode='{thermostat}'><tau units='femtosecond'> 100 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""

TOML = """[run]
seed = {seed}
[ipi]
{ipi}
[system]
periodic = false
[potential]
model = "{foundation}"
[ensemble]
members = {members}
steps_per_update = {updates}
[accuracy]
energy = "{accuracy} kcal/mol"
[audit]
expected = {audits}
[trainer]
max_lag = {max_lag}
[oracle]
kind = "model"
workers = {workers}
timeout = "10 min"
[oracle.model]
model = "{teacher}"
delay = "{delay} s"
[output]
stride = 1
extras = "energy"
"""


@dataclass(frozen=True)
class Rehearsal:
    """One run of the program in a folder of its own."""

    folder: Path
    atoms: Atoms
    teacher: Path
    foundation: str = "embedded"
    steps: int = 1000
    """Of every walker."""
    beads: int = 1
    walkers: int = 1
    max_lag: int = 0
    delay: float = 0.0
    """s that a label takes beside the teacher's own time, without using a core: a code on another machine."""
    members: int = 4
    updates: int = 200
    """Steps of a chain update."""
    accuracy: float = 1.0
    """kcal/mol, of the total energy."""
    audits: float = 20
    workers: int = 1
    seed: int = 1

    def write(self) -> Path:
        """Config and i-PI inputs; returns the config."""
        self.folder.mkdir(parents=True)
        atoms = self.atoms.copy()
        atoms.positions -= atoms.get_center_of_mass()  # i-PI writes six digits
        symbols, positions = atoms.get_chemical_symbols(), atoms.positions
        rows = "\n".join(f"{s} {x:.6f} {y:.6f} {z:.6f}" for s, (x, y, z) in zip(symbols, positions, strict=True))
        (self.folder / "start.xyz").write_text(f"{len(atoms)}\n# CELL(abcABC): 50 50 50 90 90 90\n{rows}\n")
        for number, name in enumerate(self.names):
            text = XML.format(
                steps=self.steps, seed=100 * self.seed + number, beads=self.beads, address=f"rehearsal-{uuid.uuid4().hex[:12]}",
                batch=f"<batch_size>{self.beads}</batch_size>" if self.beads > 1 else "",
                thermostat="langevin" if self.beads == 1 else "pile_l",
            )  # fmt: skip
            (self.folder / f"{name}.xml").write_text(text)
        walkers = "\n".join(["[ipi.walkers]", *(f'{name} = "{name}.xml"' for name in self.names)])
        settings = {key: getattr(self, key) for key in self.__dataclass_fields__}
        config = self.folder / "bnn.toml"
        config.write_text(TOML.format(**settings | {"ipi": walkers if self.walkers > 1 else 'input = "walker-0.xml"'}))
        return config

    @property
    def names(self) -> list[str]:
        """Walkers, or the one input."""
        return [f"walker-{n}" for n in range(self.walkers)]

    def run(self) -> float:
        """Run the program to its end; returns its wall time in s, with all that starts and stops."""
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "bnn_driver.cli", "run", self.write()],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            raise RuntimeError(f"{self.folder}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return time.monotonic() - begin

    @cached_property
    def status(self) -> dict[str, Any]:
        """What `bnn-driver status --json` says."""
        command = [sys.executable, "-m", "bnn_driver.cli", "status", str(self.folder / "bnn.toml"), "--json"]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return found


@dataclass(frozen=True, eq=False)
class Served:
    """Every frame of a run as i-PI got it."""

    positions: np.ndarray
    """(N, A, 3) Å."""
    energy: np.ndarray
    """(N,) eV, as served."""
    from_oracle: np.ndarray
    """(N,) bool."""


def served(rehearsal: Rehearsal) -> Served:
    """All beads of all steps of all walkers."""
    parts = [_of_walker(folder) for folder in _ipi_folders(rehearsal)]
    return Served(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _ipi_folders(rehearsal: Rehearsal) -> list[Path]:
    run = rehearsal.folder / "run"
    return [run / "walkers" / name / "ipi" for name in rehearsal.names] if rehearsal.walkers > 1 else [run / "ipi"]


def _of_walker(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positions, energy, source = [], [], []
    for file in sorted(folder.glob("simulation.pos_*.xyz")):
        bead = file.stem.rpartition("_")[2]
        frames: Any = ase.io.read(file, index=":", format="xyz")
        members = _extras(folder / f"simulation.energy_{bead}")
        positions.append(np.array([atoms.positions for atoms in frames]))
        energy.append(members.mean(axis=1) * HARTREE)
        source.append(_extras(folder / f"simulation.source_{bead}")[:, 0] > 0.5)
        if not len(positions[-1]) == len(energy[-1]) == len(source[-1]):
            raise RuntimeError(f"{file}: {len(frames)} frames, but {len(members)} energies")
    return np.concatenate(positions), np.concatenate(energy), np.concatenate(source)


def _extras(file: Path) -> np.ndarray:
    """(frames, values) of one extra; i-PI writes a comment line before each."""
    blocks = [block for block in re.split(r"^\s*#.*$", file.read_text(), flags=re.MULTILINE) if block.strip()]
    return np.array([[float(word) for word in block.split()] for block in blocks])


@dataclass(frozen=True)
class Verdict:
    """A run judged frame by frame."""

    frames: int
    """Served by the model."""
    beyond: int
    """Of these, further from the teacher than the accuracy."""
    worst: float
    """kcal/mol."""
    rmse: float
    """kcal/mol, over the frames served by the model."""
    labels: int
    audits: int
    audits_beyond: int
    oracle_error: float
    """kcal/mol, largest error of a frame served by the oracle: only the digits that i-PI writes."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval of the share beyond, as if the frames were independent."""
        return clopper_pearson(self.beyond, self.frames, 0.95)


def judge(rehearsal: Rehearsal) -> Verdict:
    """Compare every frame that was served with the teacher."""
    found = served(rehearsal)
    teacher = Teacher(str(rehearsal.teacher))
    numbers = rehearsal.atoms.numbers
    truth = np.array([teacher(Frames(numbers, x[None])).energy for x in found.positions])
    labels = LabelStore(rehearsal.folder / "run" / "labels").all()
    errors = np.abs(found.energy - truth - energy_offset(labels[0])) / KCAL_PER_MOL
    ours = errors[~found.from_oracle]
    audit = rehearsal.status["audit"]
    return Verdict(
        frames=len(ours),
        beyond=int(np.sum(ours >= rehearsal.accuracy)),
        worst=float(ours.max(initial=0.0)),
        rmse=float(np.sqrt(np.mean(ours**2))) if len(ours) else 0.0,
        labels=len(labels),
        audits=int(audit["count"]),
        audits_beyond=int(audit["exceeded"]),
        oracle_error=float(errors[found.from_oracle].max(initial=0.0)),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
