"""Time per MD step of the protocol alone: our client against i-PI's own Python driver, both with zero forces.

    python tests/benchmarks/protocol.py [STEPS]

Nine atoms, NVE, threading='false' safe_stride='100'; microseconds per step by i-PI's own clock, the best 100 steps of two runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from pathlib import Path

import numpy as np

from bnn_driver.ipi.client import Client, Reply, Request
from bnn_driver.ipi.simulation import IpiInput, IpiProcess, read_input

XML = """<simulation threading='false' safe_stride='100' verbosity='medium'>
  <output prefix='sim'><properties stride='100' filename='out'> [step, potential] </properties></output>
  <total_steps> {steps} </total_steps>
  <prng><seed> 1 </seed></prng>
  <ffsocket name='ff' mode='{mode}' pbc='false'><address> bench{name} </address><batch_size> {batch} </batch_size></ffsocket>
  <system>
    <initialize nbeads='{beads}'><file mode='xyz'> init.xyz </file><velocities mode='thermal' units='kelvin'> 300 </velocities></initialize>
    <forces><force forcefield='ff'/></forces>
    <ensemble><temperature units='kelvin'> 300 </temperature></ensemble>
    <motion mode='dynamics'><dynamics mode='nve'><timestep units='femtosecond'> 0.25 </timestep></dynamics></motion>
  </system>
</simulation>
"""
XYZ = "9\n# CELL(abcABC): 10 10 10 90 90 90 positions{angstrom} cell{angstrom}\n" + "".join(
    f"C {i} {i % 3} 0.5\n" for i in range(9)
)


def zero(request: Request) -> Reply:
    """Nothing, at once."""
    count = len(request.positions)
    return Reply(np.zeros(count), np.zeros_like(request.positions), np.zeros((count, 3, 3)), ['{"bnn_sd": 0.0}'] * count)


def driver_command(which: str, effective: IpiInput) -> list[str]:
    """Our client or i-PI's driver, as a process of its own."""
    if which == "ours":
        return [sys.executable, __file__, "--serve", str(effective.path)]
    script = Path(sysconfig.get_path("scripts")) / "i-pi-driver-py"
    flags = ["--shm"] if effective.shared_memory else ["-u"]
    return [sys.executable, str(script), *flags, "-a", effective.endpoints[0].address, "-m", "dummy"]


def microseconds(which: str, mode: str, beads: int, batch: int, steps: int) -> float:
    """Best microseconds per step of one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "init.xyz").write_text(XYZ)
        xml = XML.format(steps=steps, mode=mode, batch=batch, beads=beads, name=uuid.uuid4().hex[:8])
        (folder / "user.xml").write_text(xml)
        ipi = IpiProcess(folder / "user.xml", folder / "run", folder / "ipi.log")
        effective = ipi.start()
        try:
            ipi.wait_until_listening(effective, 30.0)
            with subprocess.Popen(driver_command(which, effective), stdout=subprocess.DEVNULL) as driver:
                if not ipi.wait(300.0):
                    driver.kill()
                driver.wait(30.0)
        finally:
            ipi.stop(0.0, 5.0)
        return 1e6 * min(float(t) for t in re.findall(r"t/step:\s*(\S+)", (folder / "ipi.log").read_text()))


def main(steps: int) -> None:
    """One table."""
    print(f"{'mode':8s}{'beads':>6s}{'batch':>6s}{'ours':>9s}{'i-PI':>9s}   us/step")
    for mode, beads, batch in (("unix", 1, 1), ("shm", 1, 1), ("unix", 32, 1), ("unix", 32, 32), ("shm", 32, 32)):
        count = steps if batch == beads else steps // 5 + 101
        turns = ("ours", "i-PI", "i-PI", "ours")  # each twice, so that a busy moment of the machine hits neither alone
        times = [microseconds(which, mode, beads, batch, count) for which in turns]
        ours, theirs = min(times[0], times[3]), min(times[1], times[2])
        print(f"{mode:8s}{beads:6d}{batch:6d}{ours:9.0f}{theirs:9.0f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        settings = read_input(Path(sys.argv[2]))
        shared = settings.shared_memory
        Client(settings.endpoints, zero, shared_memory=shared, connect_timeout=30.0, reconnects=0, gather_seconds=0.0).serve()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
