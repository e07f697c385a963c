"""The simulations of an exploration: which there are, where each starts in every round, and what it has kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase.data import chemical_symbols

from bnn_driver.active.criteria import Calibration
from bnn_driver.active.policy import Policy
from bnn_driver.errors import ConfigError
from bnn_driver.explore_config import ExploreConfig
from bnn_driver.ipi.addresses import check_one_each
from bnn_driver.ipi.inputs import IpiInput, read_input
from bnn_driver.ipi.preparing import START, Start, own_input, standing, template_input
from bnn_driver.ipi.simulation import copy_named_files
from bnn_driver.loops.dynamics import INPUT, Dynamics, Watch, last_good
from bnn_driver.loops.progress import CommonProgress
from bnn_driver.loops.seeds import derive
from bnn_driver.loops.together import Together
from bnn_driver.records import Array, Frames, Prediction
from bnn_driver.sections import Section
from bnn_driver.store.files import read_json, write_atomic
from bnn_driver.store.trajectory import Trajectories, read_trajectories

BOX = 100.0
"""Å; i-PI wants a cell for molecules too, and nobody reads it."""


@dataclass(frozen=True, eq=False)
class System:
    """What all walkers have in common, and how each starts."""

    like: Frames
    """The structure of the first walker (B = 1)."""
    starts: dict[str, Start]
    """By walker."""
    inputs: dict[str, IpiInput]
    """By walker; empty where the program writes them."""


def read_explored(config: ExploreConfig, base: Path) -> System:
    """Raises: ConfigError for a structure or an i-PI input that cannot be used, or walkers of different atoms."""
    return _from_inputs(config, base) if not config.explore.structure else _from_structure(config, base)


def _from_structure(config: ExploreConfig, base: Path) -> System:
    file, system = base / config.explore.structure, config.system
    try:
        found: Any = ase.io.read(file, index=":")
    except Exception as error:  # ase raises whatever its readers raise
        raise ConfigError(f"[explore] structure: {file} cannot be read: {error}") from None
    if len(found) != 1:
        raise ConfigError(f"[explore] structure: {file} has {len(found)} structures, expected one; take out that to start from")
    (atoms,) = found
    if bool(atoms.pbc.any()) != system.periodic:
        told = "T T T" if system.periodic else "F F F"
        raise ConfigError(
            f'[system] periodic = {str(system.periodic).lower()}, but in {file} pbc is {atoms.pbc.tolist()}; correct one of them (pbc="{told}" '
            "in extended XYZ)"
        )
    charge, multiplicity = (_said(atoms, name, system, file) for name in ("charge", "multiplicity"))
    cell, positions = np.eye(3) * BOX, np.asarray(atoms.positions, dtype=float)
    if system.periodic:
        cell, positions = standing(np.asarray(atoms.cell.array, dtype=float), positions)
    labels = [chemical_symbols[z] for z in atoms.numbers]
    start = Start(labels, positions[None], cell)
    like = replace(_frames(config, atoms.numbers, positions, cell), charge=charge, multiplicity=multiplicity)
    return System(like, dict.fromkeys(config.walkers(), start), {})


def _said(atoms: Any, name: str, system: Section, file: Path) -> int:
    """Charge or multiplicity: what the structure says, or [system]; where both do, they must say the same."""
    given: int = getattr(system, name)
    value = atoms.info.get(name, given)
    if not isinstance(value, (int, float, np.number)) or not float(value).is_integer():
        raise ConfigError(f"{file} says {name} = {value}, expected an integer")
    if name in system.model_fields_set and int(value) != given:
        raise ConfigError(f"{file} says {name} = {value}, but [system] {name} is {given}; correct one of them")
    return int(value)


def _from_inputs(config: ExploreConfig, base: Path) -> System:
    starts: dict[str, Start] = {}
    inputs: dict[str, IpiInput] = {}
    first: IpiInput | None = None
    for name, xml in (config.ipi.walkers or {config.walkers()[0]: config.ipi.input}).items():
        found = inputs[name] = read_input(base / xml)
        first = first or found
        own_input((base / xml).read_text(), base / xml, 0, found.n_beads, restart=True)
        if not np.array_equal(found.numbers, first.numbers):
            raise ConfigError(f"{found.path} has other atoms than {first.path}, or in another order; give them runs of their own")
        if found.pbc and not config.system.periodic:
            raise ConfigError(
                f"{found.path}: <ffsocket pbc='true'> folds every atom by itself into the cell, and molecules come torn apart, "
                "but [system] periodic = false; write pbc='false'"
            )
        starts[name] = Start(found.labels, found.positions[None], found.cell)
    if first is None:
        raise ConfigError("[ipi.walkers] names no i-PI input")
    check_one_each({name: found.endpoints for name, found in inputs.items()})
    return System(_frames(config, first.numbers, first.positions, first.cell), starts, inputs)


def _frames(config: ExploreConfig, numbers: Array, positions: Array, cell: Array) -> Frames:
    system = config.system
    if system.periodic and abs(np.linalg.det(cell)) < 1e-6:
        raise ConfigError("[system] periodic = true, but the structure has no cell; set it to false or give a cell")
    return Frames(
        np.asarray(numbers), positions[None], cell[None] if system.periodic else None, system.charge, system.multiplicity
    )


@dataclass(frozen=True, eq=False)
class Walks:
    """The walkers of every round, in folders of their own."""

    config: ExploreConfig
    base: Path
    """Folder of the config file."""
    system: System
    folder: Path
    """Of all rounds."""
    logs: Path
    policy: Policy

    def done(self, number: int, name: str) -> dict[str, Any] | None:
        """What a walker wrote at its end in a round; None when it has not come to it."""
        file = self._home(number) / f"{name}.json"
        return read_json(file) if file.exists() else None

    def run(
        self,
        number: int,
        predict: Callable[[Frames], Prediction],
        calibrations: Mapping[str, Calibration],
        ended: Callable[[dict[str, Any]], None],
        ending: Callable[[], None],
    ) -> None:
        """Run all walkers to the end of a round, at the same time; those that have come to it are left alone.

        Args: ended: hears what each wrote at its end.   ending: called before all are stopped, for an error or on request.
        Raises: ConfigError when two would listen at one address; as `Dynamics.run`, when all have been stopped.
        """
        together: Together[dict[str, Any]] = Together(predict)
        walkers = []
        for name in self.config.walkers():
            if self.done(number, name) is None:
                ask = partial(together.ask, name)
                watch = partial(Watch, self.config, self.system.like, ask, self.policy, calibrations)
                walkers.append(self._walker(number, name, watch))
        check_one_each({w.name: w.input.endpoints for w in walkers})
        progress = CommonProgress({w.name: w.input.total_steps for w in walkers}, {w.name: w.reached for w in walkers})
        for walker in walkers:
            walker.show = progress.show

        def halt() -> None:
            ending()
            for walker in walkers:
                walker.halt()

        try:
            together.run({w.name: partial(w.run, self.config) for w in walkers}, halt, ended)
        finally:
            progress.finish()

    def _walker(self, number: int, name: str, watch: Callable[..., Watch]) -> Dynamics:
        home = self._home(number)
        self._prepare(number, name)
        log_file = self.logs / f"ipi_{number:03d}_{name}.log"
        return Dynamics(name, home / name, home / f"{name}.extxyz", home / f"{name}.json", log_file, number == 0, watch)

    def kept(self, number: int) -> Trajectories:
        """The frames of all walkers of a round."""
        names = self.config.walkers()
        return read_trajectories({name: self._home(number) / f"{name}.extxyz" for name in names}, self.system.like)

    def _home(self, number: int) -> Path:
        return self.folder / f"round_{number:03d}"

    def _prepare(self, number: int, name: str) -> None:
        """i-PI's folder with its input, unless it is there."""
        folder = self._home(number) / name
        if (folder / INPUT).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        seed = derive(self.config.run.seed, "dynamics", name, number)
        place = self._good_place(number, name)
        start = place or self.system.starts[name]
        if self.config.explore.structure:
            e = self.config.explore
            kelvin = e.temperatures[self.config.walkers().index(name)]
            text = template_input(kelvin, e.beads, e.timestep, e.steps, self._address(name), seed)
        else:
            found = self.system.inputs[name]
            text = own_input(found.path.read_text(), found.path, seed, found.n_beads, restart=place is not None)
            text = copy_named_files(text, found.path.parent, folder, overwrite=True)
        if self.config.explore.structure or place is not None:
            write_atomic(folder / START, start.text().encode())
        write_atomic(folder / INPUT, text.encode())

    def _good_place(self, number: int, name: str) -> Start | None:
        """Beads of the last good frame of the round before; None: the user's structure."""
        if number == 0:
            return None
        before = self.done(number - 1, name)
        all_kept = self.kept(number - 1)
        rows = all_kept.of(name)
        step = last_good(all_kept.step[rows], all_kept.disagreement[rows], bool(before and before["stopped"]))
        if step is None:
            return None
        beads = rows[all_kept.step[rows] == step]
        first = self.system.starts[name]
        cell = first.cell if all_kept.frames.cell is None else all_kept.frames.cell[beads[0]]
        return Start(first.labels, all_kept.frames.positions[beads[np.argsort(all_kept.bead[beads])]], cell)

    def _address(self, name: str) -> str:
        """Of a walker's Unix socket; the same as long as the run lies where it does."""
        return f"bnn-{hashlib.sha256(f'{self.folder.absolute()} {name}'.encode()).hexdigest()[:12]}"
