"""FHI-aims behind an i-PI socket: the log is that of RECORDED/socket.out (six authentic frames), as it is or with other numbers."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable

from faults import die, expect
from ipi_client import Connection

Rows = list[list[float]]
Text = Callable[[str, Rows], tuple[str, float, Rows]]
RECEIVED = "  @ DRIVER MODE: Received positions"
CONNECTING = "  @ DRIVER MODE: Connecting"
STRUCTURE = re.compile(r"(preceding time step of the wrapper\n.*\n)((?: +atom .*\n)+)")


def recorded_frames(log: str) -> list[str]:
    """What was written for each frame, from after its positions were received."""
    return [piece.partition("  @ DRIVER MODE: Message from server: STATUS")[0] for piece in log.split(RECEIVED)[1:]]


def replayed(frame: str, positions: Rows) -> tuple[str, float, Rows]:
    """A recorded frame as it is, if the positions are those that were recorded."""
    rows = [line.split()[1:4] for line in STRUCTURE.search(frame)[2].splitlines()]
    for mine, row in zip(positions, rows, strict=True):
        expect(max(abs(x - float(y)) for x, y in zip(mine, row, strict=True)) < 2e-8, f"position {mine}, recorded {row}")
    energy = float(re.findall(r"\| Electronic free energy        :\s+(\S+) eV", frame)[-1])
    table = frame[frame.index("Total atomic forces") :].splitlines()[1 : 1 + len(positions)]
    return frame, energy, [[float(x) for x in line.split()[2:]] for line in table]


def with_structure(frame: str, species: list[str], positions: Rows) -> str:
    """The frame with other atoms in the table at its end."""
    rows = "".join(
        "            atom " + "".join(f"{x:17.8f}"[:17] + " " for x in row) + f" {name}\n"
        for row, name in zip(positions, species, strict=True)
    )
    return STRUCTURE.sub(lambda m: m[1] + rows, frame)


def serve(where: list[str], head: str, frames: list[str], text: Text, options: argparse.Namespace) -> None:
    """Answer frame by frame; the fault of the options begins with frame --from."""
    say(head)
    connection, number = Connection(where), 0

    def compute(positions: Rows, cell: Rows) -> tuple[float, Rows]:
        nonlocal number
        frame, energy, forces = text(frames[min(number, len(frames) - 1)], positions)
        number += 1
        say(RECEIVED)
        fault = options.fault if number >= getattr(options, "from") else ""
        if fault in FORCES:
            forces = FORCES[fault](forces)
        write(frame, fault)
        return energy, forces

    connection.serve(compute)
    say("\n          Have a nice day.\n")


#: what is wrong with the forces in the socket, while the log is right
FORCES: dict[str, Callable[[Rows], Rows]] = {
    "other-forces": lambda rows: [[x + 1e-3 for x in rows[0]], *rows[1:]],
    "sent-nan": lambda rows: [[float("nan")] * 3, *rows[1:]],
}


def write(frame: str, fault: str) -> None:
    """The log of a frame, with what goes wrong."""
    converged = "  Self-consistency cycle converged.\n"
    half = frame[: frame.index(converged)]
    if fault == "unconverged":
        say(half + "  *** scf_solver: SCF cycle not converged.\n")
        sys.exit(1)
    if fault in ("exit", "signal", "hang"):
        say(half)
        die(fault)
    if fault == "late":
        threading.Timer(0.5, say, [frame]).start()
        return
    if fault == "leave":
        threading.Thread(target=_leave, daemon=True).start()
    changes: dict[str, Callable[[], str]] = {
        "silent": lambda: frame.replace(converged, ""),
        "twice": lambda: frame.replace(converged, converged * 2),
        "unwritten": lambda: half,
        "order": lambda: STRUCTURE.sub(lambda m: m[1] + "".join(reversed(m[2].splitlines(keepends=True))), frame),
        "moved": lambda: re.sub(r"(\n +atom +\S+\.\d{3})\d", r"\g<1>7", frame, count=1),
        "nan": lambda: re.sub(r"(\| {4}2 +)-?0\.[1-9]\S+", r"\g<1>NaN", frame),
        "stars": lambda: re.sub(r"(\| {4}2 +)-?0\.[1-9]\S+", r"\g<1>*********************", frame),
    }
    say(changes[fault]() if fault in changes else frame)


def _leave() -> None:
    """After the frame was answered."""
    time.sleep(0.3)
    os._exit(0)


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
