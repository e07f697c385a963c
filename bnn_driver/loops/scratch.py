"""A committee of models that mace's own trainer makes from random weights, a seed for each."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.loops.chains import Note, described
from bnn_driver.loops.parent import LAUNCH
from bnn_driver.loops.seeds import derive, generator
from bnn_driver.pool_config import CommitteeSettings
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.mace import load_mace, trainer_arguments
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Array, Frames, LabelledFrame, Prediction
from bnn_driver.store.labelfile import encode

log = logging.getLogger(__name__)

SMALL: dict[str, Any] = {
    "model": "MACE",
    "num_channels": 16,
    "max_L": 1,
    "max_ell": 2,
    "correlation": 2,
    "num_interactions": 2,
    "num_radial_basis": 5,
    "num_cutoff_basis": 3,
    "r_max": 6.0,
    "E0s": "average",
    "batch_size": 4,
    "energy_weight": 1,
    "forces_weight": 10,
    "ema": True,
    "ema_decay": 0.99,
}
"""Options of mace_run_train of the tutorial by Stocco, Sharma, Brezina and Rossi (CNPEM 2025), for a small model that learns fast, and a
moving average of the weights, which costs nothing and takes the noise of the steps out."""
OURS = {
    "name", "seed", "train_file", "valid_file", "valid_fraction", "valid_batch_size", "energy_key", "forces_key", "stress_key",
    "atomic_numbers", "max_num_epochs", "eval_interval", "patience", "work_dir", "model_dir", "checkpoints_dir", "log_dir",
    "results_dir", "downloads_dir", "device", "default_dtype", "restart_latest", "foundation_model", "plot",
}  # fmt: skip
"""Options that follow from the rest of the config."""
VALIDATION = 0.1
"""Share of the labels that a member does not learn, other ones for each: mace keeps the weights that are best for them."""
MADE = ("member_stagetwo.model", "member.model")
"""Files of mace, the better one first: there is a second stage with `swa = true`."""
LOG = "mace.log"
POLL_SECONDS = 0.1
SEEDS = 2**31
"""mace takes seeds below this."""


@dataclass
class FromScratch:
    """Members trained anew in every round, with the same number of gradient steps whatever the number of labels."""

    config: Config
    committee: CommitteeSettings
    elements: tuple[int, ...]
    """Atomic numbers of all frames that will be predicted."""
    folder: Path
    """Generation n in the folder `n`, one model file per member."""
    note: Note
    _members: list[Ensemble] = field(default_factory=list, init=False)
    _potentials: list[Potential] = field(default_factory=list, init=False)
    _generation: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        if ours := sorted(OURS & self.committee.mace.keys()):
            raise ConfigError(
                f"[committee] mace: {', '.join(ours)} cannot be given: the program sets it from the rest of the config"
            )
        try:
            trainer_arguments(SMALL | self.committee.mace)
        except ConfigError as error:
            raise ConfigError(f"[committee] mace: {error}") from None

    def learn(self, rounds: Sequence[Sequence[LabelledFrame]]) -> None:
        """Make sure that the models of these rounds are there, and use them; finished models of a killed run are kept.

        Raises: EnvironmentProblem with the end of mace's own log when a training fails.
        """
        number = len(rounds)
        if number == self._generation:
            return
        labels = [item for some in rounds for item in some]
        missing = [m for m in range(self.config.ensemble.members) if not self._file(number, m).is_file()]
        begin = time.monotonic()
        self._train(number, missing, labels)
        if missing:
            seconds = time.monotonic() - begin
            self.note(
                "update", generation=number, labels=len(labels), seconds=seconds, members=missing, steps=self.committee.steps
            )
        self._use(number)

    def predict(self, frames: Frames) -> Prediction:
        """What every member says; models from scratch know no noise of the labels."""
        each = [member.predict(frames) for member in self._members]
        energy, forces, virial = (np.concatenate([getattr(x, name) for x in each]) for name in ("energy", "forces", "virial"))
        none = np.zeros(forces.shape[:3])
        return Prediction(energy, forces, virial, np.zeros_like(energy), none, self._generation)

    def describe(self, frames: Frames) -> Array:
        """Descriptors of frames in the first member.  Returns: (B, D)."""
        return described(self._potentials[0], frames)

    def foundation_energy(self, frames: Frames) -> None:
        """There is none: mace finds the constants of the elements itself."""

    def _file(self, number: int, member: int) -> Path:
        return self.folder / f"{number:06d}" / f"member_{member:02d}.model"

    def _use(self, number: int) -> None:
        dtype = getattr(torch, self.config.potential.dtype)
        self._potentials, self._members = [], []
        for member in range(self.config.ensemble.members):
            loaded = load_mace(self._file(number, member))
            potential = make_potential(
                loaded.module, self.elements, dtype, self.config.potential.device, kernels=self.config.potential.kernels
            )
            self._potentials.append(potential)
            self._members.append(Ensemble(potential, repeat_weights(potential.weights, 1), number, None))
        self._generation = number

    def _train(self, number: int, members: list[int], labels: list[LabelledFrame]) -> None:
        """Models by mace, each in a process and a folder of its own; a model file appears when it is whole."""
        waiting, running = list(members), dict[int, subprocess.Popen[bytes]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.committee.parallel:
                    running[waiting[0]] = self._start(number, waiting[0], labels)
                    del waiting[0]
                for member in [m for m, process in running.items() if process.poll() is not None]:
                    self._finish(number, member, running.pop(member).returncode)
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.kill()
                process.wait()

    def _work(self, number: int, member: int) -> Path:
        return self.folder / f"{number:06d}" / f"work_{member:02d}"

    def _start(self, number: int, member: int, labels: list[LabelledFrame]) -> subprocess.Popen[bytes]:
        work = self._work(number, member)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        arguments = self._arguments(number, member, labels, work)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.config.trainer.threads), "PYTHONWARNINGS": "ignore"}
        with (work / LOG).open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), sys.executable, "-m", "mace.cli.run_train", *arguments],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _finish(self, number: int, member: int, status: int) -> None:
        """Take the model of a training that has ended.  Raises: EnvironmentProblem when there is none."""
        work = self._work(number, member)
        made = next((path for name in MADE if (path := work / "models" / name).is_file()), None)
        if status != 0 or made is None:
            tail = (work / LOG).read_text(errors="replace")[-1500:]
            raise EnvironmentProblem(f"mace's trainer ended with status {status} and no model; the end of {work / LOG}:\n{tail}")
        os.replace(made, self._file(number, member))
        log.info("member %d of generation %d is trained", member, number)
        shutil.rmtree(work)

    def _arguments(self, number: int, member: int, labels: list[LabelledFrame], work: Path) -> list[str]:
        order = generator(self.config.run.seed, "validation", number, member).permutation(len(labels))
        counts = np.array([[np.sum(item.frame.numbers == z) for z in self.elements] for item in labels])
        valid, train = held_back(counts, order, max(1, round(VALIDATION * len(labels))))
        for name, rows in (("valid", valid), ("train", train)):
            (work / f"{name}.extxyz").write_bytes(b"".join(encode(labels[i]) for i in rows))
        options = SMALL | self.committee.mace
        learnt = len(train)
        options["batch_size"] = min(int(options["batch_size"]), learnt)
        epochs = max(1, round(self.committee.steps / (learnt // options["batch_size"])))
        options |= {
            "name": "member", "seed": derive(self.config.run.seed, "scratch", number, member) % SEEDS,
            "train_file": "train.extxyz", "valid_file": "valid.extxyz", "valid_batch_size": len(valid),
            "energy_key": "REF_energy", "forces_key": "REF_forces", "atomic_numbers": list(self.elements),
            "max_num_epochs": epochs, "eval_interval": max(1, epochs // 20), "patience": epochs + 1,
            "work_dir": ".", "model_dir": "models", "plot": False,
            "device": self.config.trainer.device, "default_dtype": self.config.potential.dtype,
        }  # fmt: skip
        return trainer_arguments(options)


def held_back(counts: Array, order: Array, wanted: int) -> tuple[list[int], list[int]]:
    """Labels that a member only judges itself by, and those that it learns.

    What is learnt fixes a constant for every element as well as all labels do; else the zero of energy of a composition, thousands of eV,
    could hang on a label that a member does not see.  Where no label can be spared, the first one is learnt and judged by.

    Args: counts: (L, elements), atoms of each label.   order: (L,), by lot.   wanted: how many to hold back.
    """
    rank = np.linalg.matrix_rank(counts)
    valid: list[int] = []
    for i in order.tolist():
        rest = np.delete(np.arange(len(counts)), [*valid, i])
        if len(valid) < wanted and len(rest) and np.linalg.matrix_rank(counts[rest]) == rank:
            valid.append(i)
    train = [i for i in order.tolist() if i not in valid]
    return valid or train[:1], train
