"""Stands in for VASP: checks INCAR, KPOINTS, POTCAR and POSCAR, then answers in its words, taken from outputs inside the ase package.

    vasp.py replay-xml|replay-outcar|compute RECORDED [--require "TAG VALUE"]... [--converges-with "TAG VALUE"] [--fault NAME] [--version V]

replay-xml: POSCAR must be the crystal of RECORDED/vasprun_dfpt.xml, which is written as it is; OUTCAR is put together around its energy.
replay-outcar: POSCAR must be the cluster of RECORDED/OUTCAR_example_1, which is written as it is; vasprun.xml is put together around it.
compute: any structure, with the numbers of `pair_potential`.  No recorded run has both files, so what is put together is the layout of one
authentic file with the numbers of another run.  Outputs with a fault are synthetic.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import vasp_session
from faults import die, expect
from pair_potential import evaluate, volume

REACHED = "aborting loop because EDIFF is reached"
NOT_REACHED = "aborting loop EDIFF was not reached (unconverged) "
BAR = 1.602176634e6
"""eV/Å^3 in bar."""
Rows = list[list[float]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("answer", choices=["replay-xml", "replay-outcar", "compute"])
    parser.add_argument("recorded", type=Path)
    parser.add_argument("--require", action="append", default=[])
    parser.add_argument("--converges-with", default="")
    parser.add_argument("--fault", default="")
    parser.add_argument("--version", default="6.3.0")
    parser.add_argument("--from", type=int, default=1, help="in the interactive mode: the frame from which the fault happens")
    options = parser.parse_args()
    tags, potentials = read_incar(), read_potcar()
    symbols, positions, cell = read_poscar()
    check(options, tags, potentials, symbols)
    if tags.get("LWAVE") == ".TRUE.":
        expect(tags["ISTART"] == ("1" if Path("WAVECAR").exists() else "0"), "ISTART does not fit WAVECAR")
        Path("WAVECAR").write_bytes(b"wavefunctions")
    neutral = sum(potentials[symbol] for symbol in symbols)
    electrons = float(tags.get("NELECT", neutral))
    if tags.get("INTERACTIVE") == ".TRUE.":
        converse(options, tags, symbols, positions, cell, neutral, electrons)
        return
    xml = ElementTree.parse(options.recorded / "vasprun_pstress.xml")
    outcar = (options.recorded / "OUTCAR_example_1").read_text()
    if options.answer == "replay-xml":
        raw = (options.recorded / "vasprun_dfpt.xml").read_text()
        xml = ElementTree.ElementTree(ElementTree.fromstring(raw))
        check_same_structure(xml, symbols, positions, cell)
        energy = float(xml.findtext("calculation/energy/i[@name='e_fr_energy']"))
        outcar = retold(outcar, energy, "6.3.2 27Jun22", [], [], [])
    elif options.answer == "replay-outcar":
        forces, pressure, energy, version = told(outcar, positions)
        fill(xml, tags, symbols, positions, cell, electrons, energy, forces, pressure, version)
        raw = written(xml)
    else:
        energy, forces, pressure = computed(tags, symbols, positions, cell, neutral - electrons)
        fill(xml, tags, symbols, positions, cell, electrons, energy, forces, pressure, f"{options.version} 20Jan22")
        raw = written(xml)
        outcar = retold(outcar, energy, f"{options.version} 20Jan22", positions, forces, pressure)
    wanted = options.converges_with.split()
    fault = options.fault or ("unconverged" if wanted and tags.get(wanted[0]) != wanted[1] else "")
    leave(raw, outcar, fault)


def computed(tags: dict[str, str], symbols: list[str], positions: Rows, cell: Rows, charge: float) -> tuple[float, Rows, Rows]:
    """Energy, forces, and what the cell exerts, in kB."""
    unpaired = float(tags.get("NUPDOWN", 0)) if tags.get("ISPIN") == "2" else 0.0
    energy, forces, strain = evaluate(symbols, positions, cell, charge, unpaired)
    return energy, forces, [[-x / volume(cell) * BAR / 1000 for x in row] for row in strain]


def converse(
    options: argparse.Namespace,
    tags: dict[str, str],
    symbols: list[str],
    positions: Rows,
    cell: Rows,
    neutral: float,
    electrons: float,
) -> None:
    wanted = options.converges_with.split()
    if wanted and tags.get(wanted[0]) != wanted[1]:
        options.fault = "unconverged"
    run = vasp_session.Run(options, tags, symbols, positions, cell, electrons)
    vasp_session.serve(run, lambda x: computed(tags, symbols, x, cell, neutral - electrons), retold, int(tags["NSW"]))


def read_incar() -> dict[str, str]:
    tags: dict[str, str] = {}
    for raw in Path("INCAR").read_text(encoding="latin-1").splitlines():
        name, equals, value = re.split("[#!]", raw)[0].partition("=")
        if equals:
            # VASP takes the first of two
            tags.setdefault(name.strip(), " ".join(value.split()))
    return tags


def read_potcar() -> dict[str, float]:
    text = Path("POTCAR").read_text(encoding="latin-1")
    symbols = re.findall(r"VRHFIN =([A-Z][a-z]?):", text)
    return dict(zip(symbols, [float(x) for x in re.findall(r"ZVAL\s+=\s+([\d.]+)", text)], strict=True))


def read_poscar() -> tuple[list[str], Rows, Rows]:
    lines = Path("POSCAR").read_text().splitlines()
    expect(float(lines[1]) == 1.0 and lines[7].strip() == "Cartesian", "POSCAR in other units")
    rows = [[float(x) for x in line.split()] for line in [*lines[2:5], *lines[8:]]]
    symbols = [name for name, n in zip(lines[5].split(), lines[6].split(), strict=True) for _ in range(int(n))]
    expect(len(rows) == 3 + len(symbols), "POSCAR has another number of atoms than it says")
    return symbols, rows[3:], rows[:3]


def check(options: argparse.Namespace, tags: dict[str, str], potentials: dict[str, float], symbols: list[str]) -> None:
    """What the real code would stumble over, or what the recorded run had."""
    if tags.get("INTERACTIVE") == ".TRUE.":
        vasp_session.check(tags)
    else:
        expect(float(tags.get("NSW", 0)) == 0 and tags.get("IBRION") in ("-1", "0"), "not a single point")
    expect(tags.get("ISIF") in ("2", "3"), "no stress")
    expect(
        list(dict.fromkeys(symbols)) == list(potentials), f"POSCAR has {list(dict.fromkeys(symbols))}, POTCAR {list(potentials)}"
    )
    expect(Path("KPOINTS").exists() or "KSPACING" in tags, "no k-points")
    expect("NUPDOWN" not in tags or tags.get("ISPIN") == "2", "NUPDOWN without ISPIN = 2")
    for wish in options.require:
        key, value = wish.split(maxsplit=1)
        expect(tags.get(key) == value, f"expected {key} = {value}, got {tags.get(key)}")


def vectors(element: ElementTree.Element | None) -> Rows:
    return [] if element is None else [[float(x) for x in (v.text or "").split()] for v in element]


def check_same_structure(xml: ElementTree.ElementTree, symbols: list[str], positions: Rows, cell: Rows) -> None:
    basis = vectors(xml.find("structure[@name='initialpos']/crystal/varray[@name='basis']"))
    fractions = vectors(xml.find("structure[@name='initialpos']/varray[@name='positions']"))
    known = [(row[0].text or "").strip() for row in xml.findall("atominfo/array[@name='atoms']/set/rc")]
    expect(symbols == known, f"POSCAR has {symbols}, recorded {known}")
    expect(max(abs(x - y) for a, b in zip(cell, basis, strict=True) for x, y in zip(a, b, strict=True)) < 1e-8, "another cell")
    for mine, fraction in zip(positions, fractions, strict=True):
        theirs = [sum(fraction[v] * basis[v][x] for v in range(3)) for x in range(3)]
        expect(max(abs(x - y) for x, y in zip(mine, theirs, strict=True)) < 1e-7, f"position {mine}, recorded {theirs}")


def told(outcar: str, positions: Rows) -> tuple[Rows, Rows, float, str]:
    """Forces, pressure (kB), free energy and version of an OUTCAR whose positions are these."""
    table = outcar[outcar.index(" POSITION   ") :].splitlines()[2 : 2 + len(positions)]
    rows = [[float(x) for x in line.split()] for line in table]
    for mine, row in zip(positions, rows, strict=True):
        expect(max(abs(x - y) for x, y in zip(mine, row, strict=False)) < 1e-5, f"position {mine}, recorded {row[:3]}")
    xx, yy, zz, xy, yz, zx = (float(x) for x in re.search(r"  in kB (.*)", outcar)[1].split())
    energy = float(re.search(r"free  energy   TOTEN  =\s+(\S+) eV", outcar)[1])
    version = re.search(r"vasp\.(\S+)\s+(\d+\w{3}\d\d)", outcar)
    return [row[3:] for row in rows], [[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]], energy, f"{version[1]} {version[2]}"


def retold(outcar: str, energy: float, version: str, positions: Rows, forces: Rows, pressure: Rows) -> str:
    """The same OUTCAR with other numbers where the run ends."""
    outcar = re.sub(r" vasp\.\S+ \S+", f" vasp.{version} complex", outcar, count=1)
    outcar = re.sub(r"(free  energy   TOTEN  =)\s+\S+ eV", lambda m: f"{m[1]}{energy:20.8f} eV", outcar)
    if pressure:
        (xx, xy, zx), (_, yy, yz), (_, _, zz) = pressure
        line = "  in kB " + "".join(f"{x:12.5f}" for x in (xx, yy, zz, xy, yz, zx))
        outcar = re.sub(r"  in kB .*", lambda _: line, outcar)
    rows = "".join(
        "".join(f"{x:13.5f}" for x in p) + "  " + "".join(f"{x:14.6f}" for x in f) + "\n"
        for p, f in zip(positions, forces, strict=True)
    )
    return re.sub(r"( POSITION  .*\n -+\n)(?:  .*\n)+?( -+\n)", lambda m: m[1] + rows + m[2], outcar)


def fill(
    xml: ElementTree.ElementTree,
    tags: dict[str, str],
    symbols: list[str],
    positions: Rows,
    cell: Rows,
    electrons: float,
    energy: float,
    forces: Rows,
    pressure: Rows,
    version: str,
) -> None:
    """Put this calculation into the layout of a recorded vasprun.xml."""
    root = xml.getroot()
    number, _, date = version.partition(" ")
    root.find("generator/i[@name='version']").text = f"{number}  "
    root.find(
        "generator/i[@name='subversion']"
    ).text = f"{date} (build Feb 16 2022 17:18:48) complex                          parallel "
    given = {"NELECT": electrons, "PSTRESS": 0.0} | {
        k: v for k, v in tags.items() if k in ("NELM", "NSW", "ISIF", "ISPIN", "NUPDOWN")
    }
    for item in root.findall("parameters//i"):
        if item.get("name") in given:
            item.text = (
                f"{float(given[item.get('name')]):16.8f}" if item.get("type") is None else f"{given[item.get('name')]:>6s}"
            )
    atoms = root.find("atominfo/array[@name='atoms']/set")
    for row in list(atoms):
        atoms.remove(row)
    for symbol in symbols:
        row = ElementTree.SubElement(atoms, "rc")
        ElementTree.SubElement(row, "c").text = f"{symbol:<2s}"
        ElementTree.SubElement(row, "c").text = f"{list(dict.fromkeys(symbols)).index(symbol) + 1:4d}"
    fractions = [solve(cell, x) for x in positions]
    for structure in [*root.iter("structure")]:
        put(structure.find("crystal/varray[@name='basis']"), cell)
        put(structure.find("varray[@name='positions']"), fractions)
    calculation = root.find("calculation")
    put(calculation.find("varray[@name='forces']"), forces)
    put(calculation.find("varray[@name='stress']"), pressure)
    # only the free energy belongs to the forces
    for name, value in (("e_fr_energy", energy), ("e_wo_entrp", energy + 0.3), ("e_0_energy", energy + 0.2)):
        calculation.find(f"energy/i[@name='{name}']").text = f"{value:16.8f} "


def solve(cell: Rows, x: list[float]) -> list[float]:
    """Fractional coordinates, folded into the cell as VASP prints them."""
    (a, b, c) = cell
    cross = [
        [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]] for u, v in ((b, c), (c, a), (a, b))
    ]
    size = sum(p * q for p, q in zip(a, cross[0], strict=True))
    return [sum(p * q for p, q in zip(x, row, strict=True)) / size % 1.0 for row in cross]


def put(varray: ElementTree.Element, rows: Rows) -> None:
    for row in list(varray):
        varray.remove(row)
    for row in rows:
        ElementTree.SubElement(varray, "v").text = "".join(f" {x:16.8f}" for x in row) + " "


def written(xml: ElementTree.ElementTree) -> str:
    return '<?xml version="1.0" encoding="ISO-8859-1"?>\n' + ElementTree.tostring(xml.getroot(), encoding="unicode")


def leave(xml: str, outcar: str, fault: str) -> None:
    """Write both files, with what goes wrong."""
    if fault == "unconverged":
        outcar = outcar.replace(REACHED, NOT_REACHED)
    elif fault == "all-steps":
        steps = xml.count("<scstep") if "<structure" in xml else 0
        xml = re.sub(r'(name="NELM">)\s*\d+', rf"\g<1> {steps}", xml)
    elif fault == "no-reason":
        outcar = re.sub(r"-* aborting loop .*\n", "", outcar)
    elif fault == "truncated":
        xml, outcar = xml[: len(xml) // 2], outcar[: outcar.index("General timing")]
    elif fault == "truncated-xml":
        xml = xml[: xml.index("</modeling>") - 40]
    elif fault == "order":
        xml = xml.replace("<c>H ", "<c>X ").replace("<c>O ", "<c>H ").replace("<c>X ", "<c>O ")
    elif fault == "moved":
        xml = re.sub(r"(<calculation>[\s\S]*?name=\"positions\"[^>]*>\s*<v>\s+0\.\d{3})\d", lambda m: m[1] + "7", xml)
    elif fault in ("nan", "stars"):
        xml = re.sub(r"(name=\"forces\"[^>]*>\s*<v>)\s+\S+", rf"\1 {'NaN' if fault == 'nan' else '****************'}", xml)
    elif fault == "twice":
        found = re.search(r"<calculation>[\s\S]*</calculation>", xml)
        xml = xml.replace(found[0], found[0] * 2)
    elif fault == "other-energy":
        outcar = re.sub(r"(free  energy   TOTEN  =\s+-?\d+\.)\d\d", r"\g<1>77", outcar)
    elif fault == "electrons":
        xml = re.sub(r'(name="NELECT">)[^<]*', r"\g<1>      1.00000000", xml)
    elif fault == "broken-minimiser":
        outcar = outcar[: outcar.index("aborting loop")].rstrip("-")
        sys.stdout.write(" Error EDDDAV: Call to ZHEGV failed. Returncode =   7 2   8\n")
    if fault in ("exit", "signal", "hang"):
        Path("OUTCAR").write_text(outcar[: len(outcar) // 2])
        die(fault)
    Path("vasprun.xml").write_text(xml, encoding="latin-1")
    Path("OUTCAR").write_text(outcar)
    sys.stdout.write(
        " POSCAR, INCAR and KPOINTS ok, starting setup\n entering main loop\n   1 F= -.1E+01 E0= -.1E+01  d E =-.1E+01\n"
    )
    if fault == "late":
        sys.stdout.flush()
        sys.exit(3)


if __name__ == "__main__":
    main()
