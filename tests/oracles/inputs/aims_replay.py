"""Replays an authentic FHI-aims run over a socket: the messages of aims in its order, and its own log frame by frame.

Usage: aims_replay.py ENDPOINT LOG; refuses positions other than those of the recorded frame.
"""

import sys
from pathlib import Path

import numpy as np
from ase.io import read

from bnn_driver.ipi import wire
from bnn_driver.ipi.transport import Endpoint, connect
from bnn_driver.units import BOHR

END_OF_FRAME = "Self-consistency cycle converged."
log = Path(sys.argv[2]).read_text()
frames = read(sys.argv[2], ":", format="aims-output")
pieces = log.split(END_OF_FRAME)
channel = connect(Endpoint.parse(sys.argv[1]), 10.0)
state, number = wire.NEEDINIT, 0
while True:
    word = channel.read(12)
    if word == wire.STATUS:
        channel.write(state)
    elif word == wire.INIT:
        channel.read(wire.unpack_int(channel.read(8)[4:]))
        state = wire.READY
    elif word == wire.POSDATA:
        channel.read(18 * 8)
        atoms = frames[number]
        x = np.frombuffer(channel.read(24 * wire.unpack_int(channel.read(4)))).reshape(-1, 3) * BOHR
        if np.abs(x - atoms.positions).max() > 2e-5:
            sys.exit(f"frame {number} was recorded at\n{atoms.positions}\nbut these positions came:\n{x}")
        print(pieces[number], END_OF_FRAME, sep="", end="\n", flush=True)
        state = wire.HAVEDATA
    elif word == wire.GETFORCE:
        energy, forces = np.array([atoms.get_potential_energy()]), atoms.get_forces()[None]
        channel.write(wire.pack_forces(energy, forces, np.zeros((1, 3, 3)), [""]))
        state, number = wire.NEEDINIT, number + 1  # aims asks for INIT before every frame
    else:
        break
