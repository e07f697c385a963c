"""From the config to the parts of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch

from bnn_driver.active.criteria import ForceCriterion, promised
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.bayes.laplace import energy_sd
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings
from bnn_driver.config import Config, EnsembleSettings
from bnn_driver.errors import ConfigError
from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.simulation import IpiInput, read_input
from bnn_driver.ipi.transport import Endpoint
from bnn_driver.loops.chain_update import Learner
from bnn_driver.loops.distance import Distances
from bnn_driver.loops.seeds import derive
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.mace import load_mace
from bnn_driver.potential.params import repeat_weights
from bnn_driver.potential.planning import keep_freed_memory
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Array, Frames, Generation

TOY = "toy"
"""[potential] model of the analytic pair potential for rehearsals."""
GATHER_SECONDS = 2e-3
"""How long a request of one connection waits for those of the others."""
STOP_SECONDS = 30.0
"""How long i-PI may take to write its RESTART."""


@dataclass(frozen=True, eq=False)
class Model:
    """The foundation potential and the head that predicts its noise."""

    potential: Potential
    noise: NoiseModel
    checksum: str
    """SHA-256 of the model file, or the name of a built-in."""

    def foundation_weights(self) -> dict[str, torch.Tensor]:
        """θ_0 with the noise head at its centre, no member axis."""
        head = self.noise.head.init(self.potential.dtype, self.potential.device)
        return dict(self.potential.weights) | head


def read_system(config: Config, base: Path, walker: str = "") -> tuple[Frames, IpiInput | None]:
    """The atoms of the run, from the i-PI input (of a walker) or from [system] structure.

    Raises: ConfigError when neither is given or the file cannot be used.
    """
    system = config.system
    if xml := config.ipi.input_of(walker):
        found = read_input(base / xml)
        numbers, positions, cell = found.numbers, found.positions, found.cell
    elif system.structure:
        found = None
        try:
            atoms: Any = ase.io.read(base / system.structure)
        except Exception as error:  # ase raises whatever its readers raise
            raise ConfigError(f"[system] structure: {base / system.structure} cannot be read: {error}") from None
        numbers, positions, cell = atoms.numbers, atoms.positions, atoms.cell.array
    else:
        raise ConfigError("neither [ipi] input nor [system] structure is given: the order of the atoms is unknown")
    cells = None
    if system.periodic:
        if cell is None or abs(np.linalg.det(cell)) < 1e-6:
            raise ConfigError("[system] periodic = true, but the structure has no cell; set it to false or give a cell")
        cells = np.asarray(cell, dtype=float)[None]
    return Frames(np.asarray(numbers), np.asarray(positions, dtype=float)[None], cells, system.charge, system.multiplicity), found


def load_model(config: Config, base: Path, numbers: Array, device: str) -> Model:
    """The foundation potential for atoms of these elements, checked against them.

    Raises: ModelError when the file is none or does not know an element; ConfigError for settings that do not fit.
    """
    s = config.potential
    dtype = getattr(torch, s.dtype)
    if s.model == TOY:
        if config.ensemble.sampled != "all":
            raise ConfigError(
                f'[ensemble] sampled = "{config.ensemble.sampled}" needs a MACE, but [potential] model is "{TOY}", which has neither '
                'interactions nor readouts; give a MACE model, or leave sampled at "all"'
            )
        generator = torch.Generator().manual_seed(derive(0, "toy potential"))
        potential: Potential = ToyPotential(np.unique(numbers).tolist(), dtype=dtype, device=device, generator=generator)
        checksum = TOY
    else:
        file = base / s.model
        loaded = load_mace(file if file.is_file() else s.model, s.head, device)
        potential = make_potential(
            loaded.module,
            numbers.tolist(),
            dtype,
            device,
            s.path,
            loaded.head,
            compile=s.compile,
            kernels=s.kernels,
            sampled=config.ensemble.sampled,
        )
        checksum = loaded.sha256
    if config.ensemble.distance == "energy" and not potential.last_layer:
        raise ConfigError(
            '[ensemble] distance = "energy" needs a potential whose last layer can be told from its features, but '
            f'[potential] {s.model} is evaluated by "{potential.path}"; set distance = "off", or leave [potential] path at "auto"'
        )
    return Model(potential, make_noise(config.ensemble, config.accuracy.energy, potential.n_features), checksum)


def foundation_elements(config: Config, base: Path) -> tuple[int, ...]:
    """Atomic numbers that the foundation MACE knows.  Raises: ModelError."""
    file = base / config.potential.model
    return load_mace(file if file.is_file() else config.potential.model, config.potential.head).elements


def make_noise(e: EnsembleSettings, accuracy: float, n_features: int) -> NoiseModel:
    """Noise of the labels.  Args: accuracy: eV, of the total energy.   n_features: of the potential."""
    head = NoiseHead(n_features, e.noise_head, e.predicted_noise)
    return NoiseModel(e.energy_noise * accuracy, e.force_noise, e.stress_noise, head)


def make_ensemble(model: Model, generation: Generation, config: Config) -> Ensemble:
    """The evaluator of one generation."""
    e = config.ensemble
    return Ensemble(model.potential, generation.weights, generation.number, model.noise, e.member_chunk, e.skin, energy_sd)


def foundation_generation(model: Model, members: int) -> Generation:
    """Generation 0: the foundation weights for every member."""
    weights = {k: v.cpu().numpy() for k, v in repeat_weights(model.foundation_weights(), members).items()}
    return Generation(0, weights, ())


def make_learner(potential: Potential, noise: NoiseModel, e: EnsembleSettings, seed: int) -> Learner:
    """What the trainer needs to turn labels into weights."""
    settings = UpdateSettings(
        steps=e.steps_per_update,
        batch_size=e.batch_size,
        step_size=e.step_size,
        sampler=SghmcSettings(e.friction, e.mass_decay, e.mass_floor),
        temperature=e.temperature,
        noiseless_fraction=e.noiseless,
        ramp_fraction=e.ramp,
        loss_margin=e.loss_margin,
        temperature_range=e.temperature_range,
        cycles=e.cycles,
        settling=e.settling if e.stop_when_learnt else None,
    )
    plain = Learner.around(potential, noise, e.prior_sd, settings, seed)
    return replace(plain, dispersion=e.dispersion, label_weights=e.label_weights)


def make_distances(potential: Potential, noise: NoiseModel, e: EnsembleSettings) -> Distances | None:
    """What adds the distance to the labels to generations; None where it is off or cannot be had."""
    return Distances(potential, noise) if e.distance != "off" and potential.last_layer else None


def make_policy(config: Config, numbers: Array, audit_probability: float) -> tuple[Policy, dict[str, GammaCalibration]]:
    """The promise: its criteria, and the calibration with which each one starts.

    Raises: ConfigError when a criterion names an element or an atom that the system does not have.
    """
    a = config.accuracy
    criteria = promised(a.energy, a.forces, a.species, {name: (group.atoms, group.forces) for name, group in a.groups.items()})
    for item in criteria:
        if isinstance(item, ForceCriterion):
            item.members(numbers)
    c = config.calibration
    policy = Policy(criteria, a.confidence, audit_probability)
    return policy, {item.name: GammaCalibration(c.a, c.b, c.forgetting) for item in criteria}


def physics(config: Config, frames: Frames, model: Model, oracle_facts: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What must stay the same for as long as a run directory lives."""
    return {
        "oracle": fingerprint,
        "oracle_settings": oracle_facts,
        "model": model.checksum,
        "head": config.potential.head,
        "members": config.ensemble.members,
        "sampled": config.ensemble.sampled,
        "noise_head": list(config.ensemble.noise_head) if config.ensemble.predicted_noise else [],
        "predicted_noise": list(config.ensemble.predicted_noise),
        "numbers": frames.numbers.tolist(),
        "periodic": frames.periodic,
        "charge": frames.charge,
        "multiplicity": frames.multiplicity,
    }


def settle(threads: int) -> None:
    """Threads and memory of this process: more threads than asked for slow a busy machine down by an order of magnitude."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def make_client(
    config: Config, endpoints: Sequence[Endpoint], shared_memory: bool, respond: Callable[[Request], Reply]
) -> Client:
    """What answers i-PI at these addresses."""
    return Client(
        endpoints,
        respond,
        shared_memory=shared_memory,
        connect_timeout=config.ipi.connect_timeout,
        reconnects=config.ipi.reconnects,
        gather_seconds=GATHER_SECONDS,
        silence_timeout=config.ipi.silence_timeout,
    )


def effective_settings(config: Config, base: Path) -> dict[str, object]:
    """Settings in use, with the versions and thread counts that belong to them."""
    versions = {"torch": torch.__version__, "numpy": np.__version__, "torch_threads": torch.get_num_threads()}
    return config.model_dump(mode="json") | {"base": str(base), "versions": versions}
