"""The i-PI protocol as its documentation gives it to authors of codes, with nothing of the driver's own in it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

BOHR, HARTREE = 0.52917721, 27.2113845
"""Å and eV, the values of FHI-aims."""
Rows = list[list[float]]


class Connection:
    """To the server that `use_pimd_wrapper` names."""

    def __init__(self, where: list[str]) -> None:
        """Args: where: ["UNIX:name", "port"] or ["host", "port"]."""
        kind, _, name = where[0].partition(":")
        if kind == "UNIX":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(f"/tmp/ipi_{name}")
        else:
            self._socket = socket.create_connection((where[0], int(where[1])))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise EOFError("the server is gone")
            data += more
        return data

    def _word(self, text: str) -> None:
        self._socket.sendall(text.ljust(12).encode())

    def serve(self, compute: Callable[[Rows, Rows], tuple[float, Rows]]) -> None:
        """Answer until EXIT.  Asks for INIT before every frame, as FHI-aims does.

        Args: compute: positions (A, 3) Å and cell (3, 3) Å -> energy eV and forces (A, 3) eV/Å.
        """
        state, answer = "NEEDINIT", (0.0, [[0.0]])
        while True:
            word = self._read(12).decode().strip()
            if word == "STATUS":
                self._word(state)
            elif word == "INIT":
                _, size = struct.unpack("ii", self._read(8))
                self._read(size)
                state = "READY"
            elif word == "POSDATA":
                matrices = struct.unpack("18d", self._read(144))
                (atoms,) = struct.unpack("i", self._read(4))
                flat = [BOHR * x for x in struct.unpack(f"{3 * atoms}d", self._read(24 * atoms))]
                # vectors of the cell are columns in the protocol
                cell = [[BOHR * matrices[3 * x + v] for x in range(3)] for v in range(3)]
                answer = compute([flat[i : i + 3] for i in range(0, 3 * atoms, 3)], cell)
                state = "HAVEDATA"
            elif word == "GETFORCE":
                energy, forces = answer
                self._word("FORCEREADY")
                values = [x * BOHR / HARTREE for row in forces for x in row]
                self._socket.sendall(struct.pack("d", energy / HARTREE) + struct.pack("i", len(forces)))
                self._socket.sendall(struct.pack(f"{len(values)}d", *values) + struct.pack("9d", *[0.0] * 9))
                self._socket.sendall(struct.pack("i", 0))
                state = "NEEDINIT"
            else:
                return
