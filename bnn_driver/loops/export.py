"""The members of a run as ordinary model files, and its labels as one extxyz."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.explore_config import read_any_config
from bnn_driver.loops.assembly import load_model
from bnn_driver.pool_config import SelectConfig
from bnn_driver.potential.export import export_mace
from bnn_driver.potential.factory import MacePotential
from bnn_driver.store import weights
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import RunDirectory, read_json

TARGETS = ("mace", "committee", "ase")

COMMITTEE = """<!-- i-PI: one ffsocket per member, started with
     {drivers}
     and combined so that every output knows the committee's spread -->
<ffcommittee name='committee'>
{sockets}
</ffcommittee>
"""

ASE = '''"""The mean of the members as an ASE calculator; `results` also holds the energies and forces of each."""

from pathlib import Path

from mace.calculators import MACECalculator

HERE = Path(__file__).resolve().parent


def calculator(device: str = "cpu") -> MACECalculator:
    """Committee of {members} members, generation {generation}."""
    return MACECalculator(model_paths=sorted(str(p) for p in HERE.glob("member_*.model")), device=device, default_dtype="float64")
'''


def export_run(run_path: Path, target: str, folder: Path) -> str:
    """Write the newest generation to `folder` and say what was written.

    Args: target: "mace" (model files), "committee" (and an i-PI committee), "ase" (and a calculator).
    Raises: ConfigError for another target, or a run of the toy potential; EnvironmentProblem when the model file has changed, or no
        generation of models from scratch is whole.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: expected one of {', '.join(TARGETS)}")
    run = RunDirectory.existing(run_path)
    facts = read_json(run.settings_file)
    config = read_any_config(run.path / "bnn.toml")
    if isinstance(config, SelectConfig) and config.committee.kind == "scratch":
        number, files = _copied(run.generations_dir, config.ensemble.members, folder)
    else:
        number, files = _written(run, config, facts, folder)
    LabelStore(run.labels_dir).export_extxyz(folder / "labels.extxyz")
    written = [*(f.name for f in files), "labels.extxyz"]
    if target == "committee":
        written.append(_write_committee(folder, [f.name for f in files]))
    if target == "ase":
        text = ASE.format(members=len(files), generation=number)
        (folder / "committee.py").write_text(text)
        written.append("committee.py")
    return f"generation {number} in {folder}: {', '.join(written)}"


def _copied(generations: Path, members: int, folder: Path) -> tuple[int, list[Path]]:
    """Models that mace trained from scratch, of the newest whole generation."""
    for place in sorted(generations.glob("[0-9]*"), reverse=True):
        found = sorted(place.glob("member_*.model"))
        if len(found) == members:
            folder.mkdir(parents=True, exist_ok=True)
            return int(place.name), [Path(shutil.copyfile(file, folder / file.name)) for file in found]
    raise EnvironmentProblem(f"no generation in {generations} has all its {members} models yet; let `select` go on first")


def _written(run: RunDirectory, config: Config, facts: dict[str, Any], folder: Path) -> tuple[int, list[Path]]:
    """Samples of the newest generation as model files.  Raises: as `export_run`."""
    base = Path(facts["effective"]["base"])
    known = facts["physics"]
    model = load_model(config, base, np.array(known.get("elements", known["numbers"])), "cpu")
    if not isinstance(model.potential, MacePotential):
        raise ConfigError("this run has the toy potential, which has no model file to export")
    if model.checksum != known["model"]:
        raise EnvironmentProblem(
            f"{config.potential.model} is not the file that the run was begun with (its SHA-256 differs); restore it"
        )
    number = weights.latest(run.generations_dir)
    generation = weights.load(run.generations_dir, 0 if number is None else number)
    folder.mkdir(parents=True, exist_ok=True)
    stacked = {k: torch.as_tensor(v) for k, v in generation.weights.items() if not k.startswith(("noise.", "distance."))}
    return generation.number, export_mace(model.potential, stacked, folder)


def _write_committee(folder: Path, names: list[str]) -> str:
    sockets = "\n".join(
        f"  <ffsocket name='m{i}' mode='unix' pbc='false'><address>member_{i}</address></ffsocket>" for i in range(len(names))
    )
    drivers = "\n     ".join(
        f"i-pi-driver-py -u -a member_{i} -m mace -o template=init.xyz,model={name}" for i, name in enumerate(names)
    )
    (folder / "committee.xml").write_text(COMMITTEE.format(drivers=drivers, sockets=sockets))
    return "committee.xml"
