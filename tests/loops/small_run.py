"""A small run: toy potential, toy oracle, real i-PI."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

WATER = """3
# CELL(abcABC): 20.0 20.0 20.0 90.0 90.0 90.0 cell{angstrom} positions{angstrom}
O  10.000  10.000  10.000
H  10.757  10.586  10.000
H   9.243  10.586  10.000
"""

INPUT = """<simulation verbosity='low' threading='false' safe_stride='1' floatformat='%24.16e'>
  <output prefix='simulation'>
    <properties stride='1' filename='out'> [step, conserved{{electronvolt}}, potential{{electronvolt}}] </properties>
    <checkpoint stride='5'/>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>{seed}</seed></prng>
  <ffsocket name='bnn' mode='unix' pbc='false'><address>{address}</address>{batch}</ffsocket>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='xyz' units='angstrom'> init.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces><force forcefield='bnn'/></forces>
    <ensemble><temperature units='kelvin'> 300 </temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.5 </timestep>
        <thermostat mode='{thermostat}'><tau units='femtosecond'> 50 </tau></thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""

CONFIG = """
[run]
seed = 7
[ipi]
connect_timeout = "60 s"
{ipi}
[system]
periodic = false
[potential]
model = "toy"
dtype = "float64"
[ensemble]
members = 4
steps_per_update = 60
step_size = 3e-3
prior_sd = 0.2
force_noise = "0.1 eV/A"
[accuracy]
energy = "400 meV"
[audit]
probability = 0.1
[trainer]
max_lag = {max_lag}
[oracle]
kind = "toy"
timeout = "20 s"
ask = "{ask}"
workers = {workers}
[oracle.toy]
delay = "{delay}"
[output]
stride = 1
extras = "forces"
"""


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    beads: int = 1,
    batch: int = 1,
    max_lag: int = 0,
    delay: str = "0 s",
    walkers: int = 0,
    ask: str = "all",
    workers: int = 1,
) -> Path:
    """Write config and i-PI inputs of a small run; returns the config's path.

    Args: walkers: simulations that share labels and weights, named w0, w1, ...; 0: one simulation, input.xml.
    """
    (folder / "init.xyz").write_text(WATER)
    names = [f"w{n}" for n in range(walkers)]
    for number, name in enumerate(names or ["input"]):
        text = INPUT.format(
            steps=steps,
            beads=beads,
            seed=11 + number,
            address=f"test-{uuid.uuid4().hex[:12]}",
            batch=f"<batch_size>{batch}</batch_size>" if batch > 1 else "",
            thermostat="langevin" if beads == 1 else "pile_l",
        )
        (folder / f"{name}.xml").write_text(text)
    config = folder / "bnn.toml"
    table = "\n".join(["[ipi.walkers]", *(f'{name} = "{name}.xml"' for name in names)])
    ipi = table if names else 'input = "input.xml"'
    config.write_text(CONFIG.format(ipi=ipi, max_lag=max_lag, delay=delay, ask=ask, workers=workers))
    return config


def command(*arguments: object) -> list[str]:
    """The program as a user starts it."""
    return [sys.executable, "-m", "bnn_driver.cli", *map(str, arguments)]


def program(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment)
