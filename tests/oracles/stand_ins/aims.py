"""Stands in for FHI-aims: checks control.in and geometry.in, then answers in its words, taken from outputs inside the ase package.

    aims.py replay|compute RECORDED [--require "KEYWORD VALUE"]... [--converges-with "KEYWORD VALUE"] [--fault NAME] [--version V]

replay: the geometry must be that of RECORDED/singlepoint.out, which is then printed as it is.   compute: any geometry, with the numbers of
`pair_potential` in the layout of singlepoint.out (start and end of issue_3345_spin_md_light.out, table of the stress of relax.out).
Outputs with a fault are synthetic: edited from these.  With use_pimd_wrapper in control.in it serves a socket (see aims_session.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import aims_session
from faults import die, expect
from pair_potential import evaluate, volume

CONVERGED, FAREWELL = "  Self-consistency cycle converged.\n", "          Have a nice day.\n"
NOT_CONVERGED = (
    "  * WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE\n  * USING YOUR PRESELECTED ACCURACY CRITERIA.\n"
    "  * DO NOT RELY ON ANY FINAL DATA WITHOUT FURTHER CHECKS.\n"
)
ABORTED = "  *** scf_solver: SCF cycle not converged.\n------------------------------------------------------------\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("answer", choices=["replay", "compute"])
    parser.add_argument("recorded", type=Path)
    parser.add_argument("--require", action="append", default=[])
    parser.add_argument("--converges-with", default="")
    parser.add_argument("--fault", default="")
    parser.add_argument("--version", default="221103")
    parser.add_argument("--from", type=int, default=1, help="behind a socket: the frame from which the fault happens")
    options = parser.parse_args()
    keywords, nuclei = read_control()
    species, positions, cell = read_geometry()
    check(options, keywords, nuclei, species, cell)
    if "use_pimd_wrapper" in keywords:
        behind_socket(options, keywords, species, positions, cell)
        return
    if options.answer == "replay":
        text = (options.recorded / "singlepoint.out").read_text()
        check_same_geometry(text, species, positions, cell)
    else:
        text = compute(options, keywords, species, positions, cell)
    wanted = options.converges_with.split()
    fault = options.fault or ("unconverged" if wanted and keywords.get(wanted[0]) != wanted[1:] else "")
    restart_files(keywords)
    say(text, fault)


def read_control() -> tuple[dict[str, list[str]], dict[str, float]]:
    """General keywords, each once, and the nuclear charge of each species."""
    keywords: dict[str, list[str]] = {}
    nuclei: dict[str, float] = {}
    name = ""
    for raw in Path("control.in").read_text(encoding="latin-1").splitlines():
        words = raw.split("#")[0].split()
        if not words:
            continue
        if words[0] == "species":
            name = words[1]
        elif words[0] == "nucleus":
            nuclei[name] = float(words[1])
        elif not name and words[0] != "output":
            expect(words[0] not in keywords, f"control.in repeats {words[0]}")
            keywords[words[0]] = words[1:]
    return keywords, nuclei


def read_geometry() -> tuple[list[str], list[list[float]], list[list[float]] | None]:
    cell, positions, species = [], [], []
    for raw in Path("geometry.in").read_text().splitlines():
        words = raw.split("#")[0].split()
        if words[:1] == ["lattice_vector"]:
            cell.append([float(x) for x in words[1:4]])
        elif words[:1] == ["atom"]:
            positions.append([float(x) for x in words[1:4]])
            species.append(words[4])
        else:
            expect(not words, f"geometry.in: {raw}")
    return species, positions, cell or None


def check(
    options: argparse.Namespace, keywords: dict[str, list[str]], nuclei: dict[str, float], species: list[str], cell: object
) -> None:
    """What the real code would stop at, or what the recorded run had."""
    expect(keywords.get("compute_forces") == [".true."], "compute_forces is not .true.")
    expect("xc" in keywords, "control.in has no xc")
    expect(set(species) <= set(nuclei), f"geometry.in has {set(species)}, control.in {set(nuclei)}")
    expect(("k_grid" in keywords) == (cell is not None), "k_grid and lattice_vector belong together")
    expect("compute_analytical_stress" not in keywords or cell is not None, "no stress of a molecule")
    expect(
        len(species) == 1 or keywords.get("spin") != ["collinear"] or "default_initial_moment" in keywords,
        "spin collinear without an initial moment",
    )
    for wish in options.require:
        key, *value = wish.split()
        expect(keywords.get(key) == value, f"expected {wish}, got {keywords.get(key)}")


def check_same_geometry(text: str, species: list[str], positions: list[list[float]], cell: object) -> None:
    found = re.findall(r"\|\s+\d+: Species (\S+)\s+(\S+)\s+(\S+)\s+(\S+)\n", text)
    expect(cell is None and species == [row[0] for row in found], f"species {species}, recorded {[row[0] for row in found]}")
    for mine, row in zip(positions, found, strict=True):
        off = max(abs(x - float(y)) for x, y in zip(mine, row[1:], strict=True))
        expect(off < 1e-8, f"position {mine}, recorded {row[1:]}")


def restart_files(keywords: dict[str, list[str]]) -> None:
    """As elsi_restart: read what is there, and write."""
    task = keywords.get("elsi_restart", [""])[0]
    files = [Path("D_spin_01_kpt_000001.csc"), Path("S_spin_01_kpt_000001.csc")]
    if task.startswith("read"):
        expect(all(file.exists() for file in files), "elsi_restart read without files")
    if "write" in task:
        for file in files:
            file.write_bytes(b"density")


def compute(
    options: argparse.Namespace,
    keywords: dict[str, list[str]],
    species: list[str],
    positions: list[list[float]],
    cell: list[list[float]] | None,
) -> str:
    charge = float(keywords.get("charge", ["0"])[0])
    unpaired = float(keywords.get("fixed_spin_moment", ["0"])[0])
    energy, forces, strain = evaluate(species, positions, cell, charge, unpaired)
    frame = (options.recorded / "issue_3345_spin_md_light.out").read_text()
    start = frame[: frame.index("  Obtaining array dimensions")].replace("221103", options.version)
    end = frame[frame.index("------------------------------------------------------------------------------\n  Final output") :]
    body = (options.recorded / "singlepoint.out").read_text()
    body = body[: body.index(FAREWELL)]
    body = re.sub(r"(\| Number of atoms  .*:).*", rf"\1 {len(species):8d}", body)
    body = re.sub(r"  Input geometry:\n(?:  \|.*\n)+", lambda _: geometry(species, positions, cell), body)
    preliminary, final = body.split(CONVERGED)
    zero = [[0.0] * 3 for _ in species]
    stress = None
    if "compute_analytical_stress" in keywords and cell is not None:
        stress = [[x / volume(cell) for x in row] for row in strain]
    table = (options.recorded / "relax.out").read_text()
    return (
        start
        + numbers(preliminary, 0.0, zero, None if stress is None else zero[:1] * 3, table)
        + CONVERGED
        + numbers(final, energy, forces, stress, table)
        + end
    )


def behind_socket(
    options: argparse.Namespace,
    keywords: dict[str, list[str]],
    species: list[str],
    positions: list[list[float]],
    cell: list[list[float]] | None,
) -> None:
    log = (options.recorded / "socket.out").read_text()
    head = log[: log.index(aims_session.CONNECTING)]
    where = keywords["use_pimd_wrapper"]
    wanted = options.converges_with.split()
    if wanted and keywords.get(wanted[0]) != wanted[1:]:
        options.fault = "unconverged"
    if options.answer == "replay":
        check_same_geometry(head, species, positions, cell)
        aims_session.serve(where, head, aims_session.recorded_frames(log), aims_session.replayed, options)
        return
    frame = (options.recorded / "issue_3345_spin_md_light.out").read_text()
    start = frame[: frame.index("  Obtaining array dimensions")].replace("221103", options.version)
    head = re.sub(r"(\| Number of atoms  .*:).*", rf"\1 {len(species):8d}", head)
    head = re.sub(r"  Input geometry:\n(?:  \|.*\n)+", lambda _: geometry(species, positions, cell), head)
    table = (options.recorded / "relax.out").read_text()
    charge, unpaired = (float(keywords.get(name, ["0"])[0]) for name in ("charge", "fixed_spin_moment"))

    def told(text: str, moved: list[list[float]]) -> tuple[str, float, list[list[float]]]:
        energy, forces, strain = evaluate(species, moved, cell, charge, unpaired)
        stress = None
        if "compute_analytical_stress" in keywords and cell is not None:
            stress = [[x / volume(cell) for x in row] for row in strain]
        text = numbers(text, energy, forces, stress, table)
        return aims_session.with_structure(text, species, moved), energy, forces

    aims_session.serve(where, start + head, aims_session.recorded_frames(log), told, options)


def geometry(species: list[str], positions: list[list[float]], cell: list[list[float]] | None) -> str:
    rows = ["  Input geometry:"]
    if cell is None:
        rows.append("  | No unit cell requested.")
    else:
        rows += ["  | Unit cell:", *("  |" + "".join(f"{x:18.8f}" for x in vector) for vector in cell)]
    rows += ["  | Atomic structure:", "  |       Atom                x [A]            y [A]            z [A]"]
    for number, (name, x) in enumerate(zip(species, positions, strict=True), 1):
        rows.append(f"  |{number:5d}: Species {name:<8s}{x[0]:16.8f}  {x[1]:16.8f}  {x[2]:16.8f}")
    return "\n".join(rows) + "\n"


def numbers(text: str, energy: float, forces: list[list[float]], stress: list[list[float]] | None, relaxed: str) -> str:
    """The same text with other numbers in its compact form; only the free energy belongs to the forces."""
    for name, value in (
        ("Total energy uncorrected", energy + 0.3),
        ("Total energy corrected", energy + 0.2),
        ("Electronic free energy", energy),
    ):
        text = re.sub(rf"(\| {name}\s+:)\s+\S+ eV", lambda m, v=value: f"{m[1]}{fortran(v):>31s} eV", text)
    rows = "".join(f"  |{n:5d}{fortran(x):>31s}{fortran(y):>31s}{fortran(z):>31s}\n" for n, (x, y, z) in enumerate(forces, 1))
    text = re.sub(r"(Total atomic forces .*\n)(?:  \|.*\n)+", lambda m: m[1] + rows, text)
    if stress is not None:
        box = re.search(
            r"  \+-+\+\n  \|\s+Analytical stress tensor - Symmetrized(?:.*\n)+?  \+-+\+\n(?:.*\n)+?  \+-+\+\n\n", relaxed
        )
        table = "" if box is None else box[0]
        for name, row in zip("xyz", stress, strict=True):
            new = f"  |  {name}  " + "".join(f"{x:17.8f}" for x in row)
            table = re.sub(rf"  \|  {name}\s+[-\d.]+\s+[-\d.]+\s+[-\d.]+", lambda _, new=new: new, table)
        text = text.replace("  Energy and forces in a compact form:", table + "  Energy and forces in a compact form:")
    return text


def fortran(value: float) -> str:
    """0.123456789012345E+01"""
    digits, exponent = f"{abs(value):.14e}".split("e")
    shifted = int(exponent) + 1 if value else 0
    return f"{'-' if value < 0 else ''}0.{digits.replace('.', '')}E{shifted:+03d}"


def say(text: str, fault: str) -> None:
    half = text[: text.index("Self-consistency cycle converged.")]
    if fault == "unconverged":
        text = half.rstrip(" ") + NOT_CONVERGED + ABORTED
    elif fault == "unconverged-farewell":
        text = text.replace(CONVERGED, NOT_CONVERGED)
    elif fault == "silent":
        text = text.replace(CONVERGED, "")
    elif fault == "truncated":
        text = text[: text.index("Have a nice day.") - 200]
    elif fault == "order":
        first, second = re.findall(r"  \|    [12]: Species .*\n", text)
        text = text.replace(first + second, second.replace("2:", "1:") + first.replace("1:", "2:"))
    elif fault == "moved":
        text = re.sub(r"(    2: Species \S+\s+\S+)\d( )", r"\g<1>7\2", text)
    elif fault == "nan":
        text = re.sub(r"(\| {4}2 +)-?0\.[1-9]\S+", r"\g<1>NaN", text)
    elif fault == "stars":
        text = re.sub(r"(\| {4}2 +)-?0\.[1-9]\S+", r"\g<1>*********************", text)
    elif fault == "twice":
        loop = text[text.rindex("          Begin self-consistency loop") : text.index("          Have a nice day.")]
        text = text.replace("          Have a nice day.", loop + "          Have a nice day.")
    elif fault in ("exit", "signal", "hang"):
        sys.stdout.write(half)
        die(fault)
    sys.stdout.write(text)
    if fault == "late":
        sys.stdout.flush()
        sys.exit(3)


if __name__ == "__main__":
    main()
