"""The members of a run as ordinary model files, and its labels as one extxyz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

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
    Raises: ConfigError for another target, or a run of the toy potential; EnvironmentProblem when the model file has changed.
    """
    if target not in TARGETS:
        raise ConfigError(f"--to {target}: expected one of {', '.join(TARGETS)}")
    run = RunDirectory.existing(run_path)
    facts = read_json(run.settings_file)
    config = read_any_config(run.path / "bnn.toml")
    if isinstance(config, SelectConfig) and config.committee.kind == "scratch":
        raise ConfigError(f"the members of this selection are model files already: {run.generations_dir}/*/member_*.model")
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
    files = export_mace(model.potential, stacked, folder)
    LabelStore(run.labels_dir).export_extxyz(folder / "labels.extxyz")
    written = [*(f.name for f in files), "labels.extxyz"]
    if target == "committee":
        written.append(_write_committee(folder, [f.name for f in files]))
    if target == "ase":
        text = ASE.format(members=len(files), generation=generation.number)
        (folder / "committee.py").write_text(text)
        written.append("committee.py")
    return f"generation {generation.number} in {folder}: {', '.join(written)}"


def _write_committee(folder: Path, names: list[str]) -> str:
    sockets = "\n".join(
        f"  <ffsocket name='m{i}' mode='unix' pbc='false'><address>member_{i}</address></ffsocket>" for i in range(len(names))
    )
    drivers = "\n     ".join(
        f"i-pi-driver-py -u -a member_{i} -m mace -o template=init.xyz,model={name}" for i, name in enumerate(names)
    )
    (folder / "committee.xml").write_text(COMMITTEE.format(drivers=drivers, sockets=sockets))
    return "committee.xml"
