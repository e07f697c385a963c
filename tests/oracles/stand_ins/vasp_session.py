"""VASP in its interactive mode: OUTCAR grows frame by frame in the layout of RECORDED/OUTCAR_example_1, and standard output asks for more.

The layout of standard output is that of the runs of VASP 5.4.4 recorded in tests/broken_output of
https://github.com/ulissigroup/vasp-interactive.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from faults import die, expect

Rows = list[list[float]]
REACHED = "aborting loop because EDIFF is reached"
NOT_REACHED = "aborting loop EDIFF was not reached (unconverged) "
Numbers = tuple[float, Rows, Rows]


def check(tags: dict[str, str]) -> None:
    """What the real code would stumble over or, worse, take otherwise."""
    expect(int(tags.get("NSW", "0")) > 1, "NSW ends the run with the first frame")
    expect(tags.get("ISIF") == "2", "with another ISIF it would read a lattice, or compute no stress")
    expect(tags.get("ISYM") in ("0", "-1"), "symmetry of the first frame is kept")
    expect(tags.get("IBRION") in ("-1", "11") and float(tags.get("POTIM", "1")) == 0, "something else moves the atoms")


class Run:
    """The text of OUTCAR and of standard output."""

    def __init__(
        self, options: argparse.Namespace, tags: dict[str, str], symbols: list[str], positions: Rows, cell: Rows, electrons: float
    ) -> None:
        recorded = (options.recorded / "OUTCAR_example_1").read_text()
        first = recorded.index("----------------------------------------- Iteration    1(   1)")
        self.options, self.symbols, self.positions, self.cell = options, symbols, positions, cell
        self.limit = int(tags.get("NELM", "60"))
        # the last iteration and all that follows it, but for the end of the run
        whole = recorded[: recorded.index("    4ORBIT")]
        self.frame = whole[whole.rindex(" Iteration ") :].partition("\n")[2]
        types = list(dict.fromkeys(symbols))
        if options.fault == "order":
            types.reverse()
        head = re.sub(
            r"^ vasp\.\S+ .*", f" vasp.{options.version} 20Jan22 (build Feb 16 2022 17:18:48) complex", recorded[:first]
        )
        names = "".join(f"   VRHFIN ={name}: test\n" for name in types)
        head = head.replace(" executed on", names + " executed on", 1)
        counts = "".join(f"{symbols.count(name):4d}" for name in dict.fromkeys(symbols))
        head = re.sub(r"(ions per type =).*", rf"\1 {counts}", head)
        head = re.sub(r"(   NELM   =)\s*\d+", rf"\1 {self.limit:6d}", head)
        head = re.sub(r"(   NSW    =)\s*\d+", rf"\1 {int(tags['NSW']):6d}", head)
        head = re.sub(r"(   NELECT =)\s*\S+", rf"\1 {1.0 if options.fault == 'electrons' else electrons:12.4f}", head)
        Path("OUTCAR").write_text(head)

    def answer(self, number: int, numbers: Numbers, retold: Callable[..., str]) -> None:
        """Write one frame, with what goes wrong from frame --from on."""
        energy, forces, pressure = numbers
        fault = self.options.fault if number >= getattr(self.options, "from") else ""
        steps = self.limit if fault == "all-steps" else 13 if number == 1 else 5
        loop = "".join(
            f"--------------------------------------- Iteration {number:6d}({step:4d})  ---------------------------------------\n\n"
            for step in range(1, steps + 1)
        )
        vectors = "".join("    " + "".join(f"{x:13.9f}" for x in [*row, 0.0, 0.0, 0.0]) + "\n" for row in self.cell)
        frame = re.sub(r"(direct lattice vectors.*\n)(?:.*\n){3}", lambda m: m[1] + vectors, self.frame)
        frame = loop + retold(frame, energy, "0.0.0", self.positions, forces, pressure)
        free = fortran(energy)
        rows = "".join("".join(f"{x:14.7f}" for x in row) + "\n" for row in forces)
        printed = f"FORCES:\n{rows}   {number} F= {free} E0= {free}  d E ={free}\n"
        if fault in ("exit", "signal", "hang"):
            self._write(frame[: len(frame) // 2])
            die(fault)
        if fault == "broken-minimiser":
            self._write(loop)
            say(" Error EDDDAV: Call to ZHEGV failed. Returncode =   7 2   8\n")
            sys.exit(1)
        self._write(_spoilt_outcar(frame, fault))
        say(_spoilt_print(printed, fault))
        if fault == "leave":
            threading.Thread(target=_leave, daemon=True).start()

    def _write(self, text: str) -> None:
        with Path("OUTCAR").open("a") as file:
            file.write(text)

    def next_positions(self) -> bool:
        """Read fractional coordinates; False at the end of standard input, as VASP does."""
        rows = []
        while len(rows) < len(self.symbols):
            line = sys.stdin.readline()
            if not line:
                return False
            if line.strip():
                rows.append([float(x) for x in line.split()])
        if Path("STOPCAR").exists():
            return False
        say("".join("".join(f"{x:14.7f}" for x in row) + "\n" for row in rows) + "POSITIONS: read from stdin\n")
        self.positions = [[sum(row[v] * self.cell[v][x] for v in range(3)) for x in range(3)] for row in rows]
        return True


def _spoilt_outcar(frame: str, fault: str) -> str:
    changes: dict[str, Callable[[], str]] = {
        "unconverged": lambda: frame.replace(REACHED, NOT_REACHED),
        "no-reason": lambda: re.sub(r"-* aborting loop .*\n", "", frame),
        "unwritten": lambda: frame[: frame.index("FREE ENERGIE")],
        "moved": lambda: re.sub(r"( POSITION  .*\n -+\n +\S+\.\d{2})\d", r"\g<1>9", frame),
        "twice": lambda: frame.replace("Iteration", "Iteration 9(9) Iteration", 1),
        "other-energy": lambda: re.sub(r"(free  energy   TOTEN  =\s+-?\d+\.)\d\d", r"\g<1>77", frame),
        "stars": lambda: re.sub(r"( POSITION  .*\n -+\n(?: +\S+){3}) +\S+", r"\g<1> **************", frame),
    }
    return changes[fault]() if fault in changes else frame


def _spoilt_print(printed: str, fault: str) -> str:
    if fault == "other-forces":
        printed = re.sub(r"(FORCES:\n +\S+\.\d{3})\d", r"\g<1>9", printed)
    if fault == "nan":
        printed = re.sub(r"(FORCES:\n) +\S+", r"\g<1>           NaN", printed)
    return printed + ("POSITIONS AND LATTICE" if fault == "lattice" else "POSITIONS") + ": reading from stdin\n"


def fortran(value: float) -> str:
    """-.12345678E+01"""
    digits, exponent = f"{abs(value):.7e}".split("e")
    return f"{'-' if value < 0 else ' '}.{digits.replace('.', '')}E{int(exponent) + 1:+03d}"


def _leave() -> None:
    """After the frame was answered."""
    time.sleep(0.3)
    os._exit(0)


def serve(run: Run, compute: Callable[[Rows], Numbers], retold: Callable[..., str], frames: int) -> None:
    """Answer until standard input ends, STOPCAR is there or NSW is reached."""
    say(" POSCAR, INCAR and KPOINTS ok, starting setup\n entering main loop\n")
    for number in range(1, frames + 1):
        run.answer(number, compute(run.positions), retold)
        if not run.next_positions():
            return


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
