"""Inputs for a real i-PI and what runs it: four atoms, a few steps, an address of its own per test."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.simulation import IpiInput, IpiProcess

XYZ = """4
# CELL(abcABC): 12.0 12.0 12.0 90.0 90.0 90.0 positions{angstrom} cell{angstrom}
O  0.10 0.20 0.30
H  0.90 0.10 -0.20
H -0.50 0.70 0.10
C  0.20 -1.10 0.60
"""

NVE = "<dynamics mode='nve'><timestep units='femtosecond'> 0.5 </timestep></dynamics>"
NVT = (
    "<dynamics mode='nvt'><timestep units='femtosecond'> 0.5 </timestep>"
    "<thermostat mode='langevin'><tau units='femtosecond'> 50 </tau></thermostat></dynamics>"
)


@dataclass(frozen=True)
class Setup:
    """One i-PI input; `forcefield` replaces the socket (i-PI's own reference)."""

    mode: str = "unix"
    batch: int = 1
    beads: int = 1
    steps: int = 5
    consolidate: bool = True
    socket_extra: str = ""
    parameters: str = ""
    dynamics: str = NVE
    ensemble: str = ""
    sockets: int = 1
    output: str = "<properties stride='1' filename='out'> [step, conserved{electronvolt}, potential{electronvolt}] </properties>"
    structure: str = XYZ
    forcefield: str = ""
    seed: int = 7
    port: int = 0

    def write(self, folder: Path) -> Path:
        """Write input.xml and init.xyz; returns the input."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "init.xyz").write_text(self.structure)
        path = folder / "user.xml"
        path.write_text(self.xml())
        return path

    def xml(self) -> str:
        """The text of the input."""
        names = [f"ff{i}" for i in range(self.sockets)]
        fields = self.forcefield or "".join(self._socket(name) for name in names)
        forces = "".join(f"<force forcefield='{name}'/>" for name in (["ff0"] if self.forcefield else names))
        return f"""<simulation threading='false' floatformat='%24.16e' verbosity='medium'>
  <output prefix='sim'>{self.output}</output>
  <total_steps> {self.steps} </total_steps>
  <prng><seed> {self.seed} </seed></prng>
  {fields}
  <system>
    <initialize nbeads='{self.beads}'>
      <file mode='xyz'> init.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces>{forces}</forces>
    <ensemble><temperature units='kelvin'> 300 </temperature>{self.ensemble}</ensemble>
    <motion mode='dynamics'>{self.dynamics}</motion>
  </system>
</simulation>
"""

    def _socket(self, name: str) -> str:
        address = "<address> localhost </address>" if self.mode == "inet" else f"<address> t{uuid.uuid4().hex[:12]} </address>"
        port = f"<port> {self.port} </port>" if self.mode == "inet" else ""
        batch = f"<batch_size> {self.batch} </batch_size>" if self.batch > 1 else ""
        consolidate = "" if self.consolidate else "<consolidate_messages> False </consolidate_messages>"
        parameters = f"<parameters> {self.parameters} </parameters>" if self.parameters else ""
        return (
            f"<ffsocket name='{name}' mode='{self.mode}' pbc='false'>{address}{port}{batch}{consolidate}"
            f"{parameters}{self.socket_extra}</ffsocket>"
        )


@contextmanager
def running(setup: Setup, folder: Path) -> Iterator[tuple[IpiProcess, IpiInput]]:
    """A real i-PI that listens; killed at the end whatever happens."""
    process = IpiProcess(setup.write(folder), folder / "run", folder / "ipi.log")
    effective = process.start()
    try:
        process.wait_until_listening(effective, 20.0)
        yield process, effective
    finally:
        process.stop(0.0, 3.0)


def client_of(effective: IpiInput, handler: Callable[[Request], Reply], clients: int = 1, reconnects: int = 3) -> Client:
    """Our client on every endpoint of the input, `clients` times."""
    return Client(
        effective.endpoints * clients,
        handler,
        shared_memory=effective.shared_memory,
        connect_timeout=30.0,
        reconnects=reconnects,
        gather_seconds=0.01,
    )


class Serving:
    """`client.serve()` in a thread, its outcome kept."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.outcome: str | BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self.client.serve()
        except BaseException as error:
            self.outcome = error

    def join(self, seconds: float = 30.0) -> str | BaseException | None:
        """The outcome; None when it still serves then."""
        self._thread.join(seconds)
        return self.outcome


def columns(folder: Path) -> np.ndarray:
    """Rows of the property output, (steps + 1, columns)."""
    return np.loadtxt(folder / "run" / "sim.out", ndmin=2)
