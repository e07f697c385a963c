"""A real code behind a real client: GFN2-xTB by tblite, driven by ASE's SocketClient; it prints one line per converged frame."""

import json
import sys
from pathlib import Path

from ase.calculators.socketio import SocketClient
from ase.io import read
from tblite.ase import TBLite

settings = json.loads(Path("settings.json").read_text())


class Talkative(TBLite):
    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)  # raises when the charges do not converge
        print("self-consistent charges converged")


atoms = read("start.xyz")
atoms.pbc = settings["periodic"]
atoms.calc = Talkative(
    method="GFN2-xTB",
    charge=settings["charge"],
    multiplicity=settings["multiplicity"],
    accuracy=0.1,
    max_iterations=settings["max_iterations"],
    verbosity=0,
)
SocketClient(unixsocket=sys.argv[1]).run(atoms, use_stress=settings["periodic"])
