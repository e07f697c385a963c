"""The whole loop with the real parts: a MACE, GFN2-xTB as the oracle, i-PI; then what was learnt is exported and used elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import ase.io
import numpy as np
import pytest
from small_run import program

from bnn_driver.store import weights

pytestmark = [pytest.mark.ipi, pytest.mark.slow]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ethanol"

CONFIG = """
[run]
seed = 3
[ipi]
input = "input.xml"
[system]
periodic = false
[potential]
model = "embedded"
dtype = "float64"
[ensemble]
members = 2
steps_per_update = 100
prior_sd = 0.1
[accuracy]
energy = "1 kcal/mol"
[audit]
expected = 3
[oracle]
kind = "tblite"
timeout = "1 min"
[oracle.tblite]
method = "GFN1-xTB"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ethanol; the config's path."""
    folder = tmp_path_factory.mktemp("ethanol")
    text = (EXAMPLE / "input.xml").read_text()
    text = re.sub(r"<total_steps>\d+<", "<total_steps>12<", text).replace("bnn-ethanol", f"test-{uuid.uuid4().hex[:12]}")
    (folder / "input.xml").write_text(text)
    (folder / "init.xyz").write_text((EXAMPLE / "init.xyz").read_text())
    config = folder / "bnn.toml"
    config.write_text(CONFIG)
    done = program("run", config, timeout=300)
    assert done.returncode == 0, done.stderr
    return config


def test_a_mace_learns_from_a_quantum_chemistry_code(finished: Path) -> None:
    facts = json.loads(program("status", finished, "--json").stdout)
    assert facts["steps"] == 12
    assert facts["labels"] >= 2
    assert facts["generation"] >= 1
    label = ase.io.read(finished.parent / "run" / "labels" / "000001.extxyz")
    assert "tblite" in label.info["code"]
    assert np.abs(label.arrays["REF_forces"].sum(axis=0)).max() < 5e-3


def test_a_picture_of_the_run_is_drawn(finished: Path, tmp_path: Path) -> None:
    done = program("report", finished, "-o", tmp_path / "run.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_exported_members_give_the_same_forces_in_mace_and_in_ipi(finished: Path, tmp_path: Path) -> None:
    """Forces agree to 1e-6 eV/Å: the members are float64, so only rounding and i-PI's constants (1e-7) are between them."""
    out = tmp_path / "exported"
    done = program("export", finished, "--to", "committee", "-o", out)
    assert done.returncode == 0, done.stderr
    assert len(ase.io.read(out / "labels.extxyz", ":")) == json.loads(program("status", finished, "--json").stdout)["labels"]
    ours, positions = _our_members(finished)
    atoms = ase.io.read(finished.parent / "run" / "labels" / "000000.extxyz")
    atoms.info.clear()
    for name in list(atoms.arrays):
        if name not in ("numbers", "positions"):
            del atoms.arrays[name]
    atoms.calc = None
    atoms.positions, atoms.pbc, atoms.cell = positions, True, np.eye(3) * 30
    ase.io.write(tmp_path / "frame.xyz", atoms, format="extxyz")
    script = (
        "import sys, numpy, ase.io; from mace.calculators import MACECalculator\n"
        "a = ase.io.read(sys.argv[1])\n"
        "r = []\n"
        "for f in sys.argv[3:]:\n"
        "    a.calc = MACECalculator(model_paths=f, device='cpu', default_dtype='float64'); r.append(a.get_forces())\n"
        "numpy.save(sys.argv[2], r)\n"
    )
    files = sorted(str(f) for f in out.glob("member_*.model"))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, tmp_path / "frame.xyz", tmp_path / "f.npy", *files], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), ours, atol=1e-6)
    np.testing.assert_allclose(_forces_from_ipi(tmp_path, files[0], atoms), ours[0], atol=1e-6)


def _our_members(config_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Forces (M, A, 3) of the newest generation at the structure of the first label, and its positions."""
    from bnn_driver.config import read_config
    from bnn_driver.loops.assembly import load_model, make_ensemble
    from bnn_driver.store.dataset import LabelStore

    config = read_config(config_file)
    run = config_file.parent / "run"
    frame = LabelStore(run / "labels").read(0).frame
    model = load_model(config, config_file.parent, frame.numbers, "cpu")
    generation = weights.load(run / "generations", weights.latest(run / "generations") or 0)
    return make_ensemble(model, generation, config).predict(frame).forces[:, 0], frame.positions[0]


def _forces_from_ipi(folder: Path, model: str, atoms: ase.Atoms) -> np.ndarray:
    """Forces that i-PI prints when its own MACE driver serves the exported file."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    ase.io.write(folder / "init.xyz", atoms, format="xyz")
    lines = (folder / "init.xyz").read_text().splitlines()
    lines[1] = "# CELL(abcABC): 30 30 30 90 90 90 cell{angstrom} positions{angstrom}"
    lines[2:] = [f"{s} {x:.14f} {y:.14f} {z:.14f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
    (folder / "init.xyz").write_text("\n".join(lines) + "\n")
    (folder / "input.xml").write_text(f"""<simulation verbosity='quiet' floatformat='%24.16e'>
      <output prefix='o'><trajectory filename='for' stride='1' cell_units='angstrom'>forces{{ev/ang}}</trajectory></output>
      <total_steps>1</total_steps><ffsocket name='m' mode='unix' pbc='false'><address>{name}</address></ffsocket>
      <system><initialize nbeads='1'><file mode='xyz' units='angstrom'> init.xyz </file>
      <velocities mode='thermal' units='kelvin'> 1 </velocities></initialize>
      <forces><force forcefield='m'/></forces><ensemble><temperature units='kelvin'> 1 </temperature></ensemble>
      <motion mode='dynamics'><dynamics mode='nve'><timestep units='femtosecond'> 0.1 </timestep></dynamics></motion></system></simulation>""")
    scripts = Path(sysconfig.get_path("scripts"))
    with (folder / "ipi.log").open("w") as log:
        ipi = subprocess.Popen([scripts / "i-pi", "input.xml"], cwd=folder, stdout=log, stderr=log)
        driver = [sys.executable, "-W", "ignore", scripts / "i-pi-driver-py", "-u", "-a", name, "-m", "mace"]
        _wait_for_socket(Path(f"/tmp/ipi_{name}"))
        client = subprocess.Popen([*driver, "-o", f"template=frame.xyz,model={model}"], cwd=folder, stdout=log, stderr=log)
        assert ipi.wait(timeout=120) == 0
        client.kill()
        client.wait()
    printed = (folder / "o.for_0.xyz").read_text().splitlines()[2 : 2 + len(atoms)]
    return np.array([[float(x) for x in line.split()[1:]] for line in printed])


def _wait_for_socket(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
