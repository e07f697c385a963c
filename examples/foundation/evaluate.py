"""Measures the embedded model and writes the numbers into its card.

    python evaluate.py --work WORK --model MODEL [--rmd17 test_MD.xyz] [--card embedded.md]

Errors against GFN2-xTB on WORK/test.xyz by group, short dynamics, and, given the file, errors against rMD17 ethanol.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import clusters
import correct
import generate
import numpy as np
import torch
import train
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from fast import ScalarMACE
from mace.calculators import MACECalculator

STRAYED = 1.8  # Å of a hydrogen from its nearest oxygen: it is lost
KCAL = units.kcal / units.mol
BEGIN, END = "<!-- measured: written by examples/foundation/evaluate.py -->", "<!-- end of measured -->"
WHAT = {
    ("molecules", "test_frame"): "molecules, single frames",
    ("molecules", "held_out"): "molecules never seen",
    ("g2", "held_out"): "G2 geometries",
    ("pairs", "test_frame"): "pairs, single frames",
    ("pairs", "held_out"): "pairs of molecules never seen",
    ("water", "test_frame"): "water 1-6, single frames",
    ("water", "held_out"): "water 1-6, other starts",
    ("protonated", "test_frame"): "H+(H2O)1-5, single frames",
    ("protonated", "held_out"): "H+(H2O)1-5, other starts",
}


def differences(frames: list[Atoms], calculator: Calculator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Model minus reference: energy (B,) eV, and forces per frame (A, 3) eV/Å."""
    energy, forces = [], []
    for frame in frames:
        atoms = Atoms(frame.numbers, frame.positions)
        atoms.calc = calculator
        energy.append(atoms.get_potential_energy() - frame.info["REF_energy"])
        forces.append(atoms.get_forces() - frame.arrays["REF_forces"])
    return np.array(energy), forces


def row(name: str, frames: list[Atoms], calculator: Calculator) -> str:
    """One line of the table of errors."""
    energy, forces = differences(frames, calculator)
    per_atom = 1e3 * energy / np.array([len(x) for x in frames])
    f = np.concatenate(forces).ravel()
    size = np.sqrt(np.mean(np.concatenate([x.arrays["REF_forces"] for x in frames]) ** 2))
    mae, rmse = np.abs(f).mean(), np.sqrt(np.mean(f**2))
    return (
        f"| {name} | {len(frames)} | {size:.2f} | {mae:.3f} | {rmse:.3f} | {mae / KCAL:.2f} | {rmse / KCAL:.2f} "
        f"| {np.abs(per_atom).mean():.1f} | {np.sqrt(np.mean(per_atom**2)):.1f} |"
    )


def table(work: Path, calculator: Calculator) -> Iterator[str]:
    """Errors on the held-back frames, by group."""
    frames = read(work / "test.xyz", ":")
    yield "| frames | number | rms force eV/Å | force MAE eV/Å | RMSE | MAE kcal/mol/Å | RMSE | energy MAE meV/atom | RMSE |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (group, split), name in WHAT.items():
        chosen = [x for x in frames if (x.info["group"], x.info["split"]) == (group, split)]
        if chosen:
            yield row(name, chosen, calculator)
    for recipe, name in (
        ("md400", "of all: 400 K dynamics"),
        ("scan", "of all: proton between two oxygens"),
        ("bond", "of all: bonds stretched or compressed"),
    ):
        yield row(name, [x for x in frames if x.info["recipe"] == recipe], calculator)


def counts(work: Path) -> Iterator[str]:
    """How many frames there are, by group."""
    frames = [*train.structures_in(work), *(x for name in ("valid", "test") for x in read(work / f"{name}.xyz", ":"))]
    yield "| group | train | valid | test_frame | held_out |"
    yield "|---|---|---|---|---|"
    for group in ("molecules", "g2", "pairs", "water", "protonated", "correction"):
        splits = [x.info["split"] for x in frames if x.info["group"] == group]
        yield f"| {group} | " + " | ".join(str(splits.count(s)) for s in ("train", "valid", "test_frame", "held_out")) + " |"


def bonds(atoms: Atoms) -> np.ndarray:
    """(n, 2) pairs closer than 1.3 Å (to hydrogen) or 1.8 Å."""
    d = atoms.get_all_distances()
    light = (atoms.numbers == 1)[:, None] | (atoms.numbers == 1)[None]
    return np.argwhere(np.triu(d < np.where(light, 1.3, 1.8), 1))


def stability(name: str, start: Atoms, calculator: Calculator, temperature: float, steps: int) -> str:
    """One line: Langevin dynamics (0.5 fs, friction 0.01/fs), then 0.25 ps at constant energy."""
    rng = np.random.default_rng(1)
    atoms = start.copy()
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    pairs = bonds(atoms)
    heat, longest, largest = [], 0.0, 0.0
    began = time.perf_counter()
    for _ in Langevin(atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.01 / units.fs, rng=rng, fixcm=False).irun(
        steps
    ):
        heat.append(atoms.get_temperature())
        longest = max(longest, max(atoms.get_distance(a, b) for a, b in pairs))
        largest = max(largest, np.linalg.norm(atoms.get_forces(), axis=1).max())
    cost = 1e3 * (time.perf_counter() - began) / steps
    total = [atoms.get_total_energy() for _ in VelocityVerlet(atoms, 0.5 * units.fs).irun(500)]
    drift = 1e3 * (np.mean(total[-100:]) - np.mean(total[:100])) / len(atoms)
    return (
        f"| {name} | {temperature:.0f} | {0.5e-3 * steps:.1f} | {np.mean(heat[steps // 4 :]):.0f} | {longest:.2f} | {largest:.1f} "
        f"| {drift:+.3f} | {cost:.1f} |"
    )


def dynamics(calculator: Calculator) -> Iterator[str]:
    """Short runs from the model's own starting structures."""
    rng = generate.generator("evaluate")
    enol = generate.conformers("CC(=O)C=C(C)O", 1)[0]
    systems = (
        ("ethanol", molecule("CH3CH2OH"), 300.0, 4000),
        ("ethanol", molecule("CH3CH2OH"), 500.0, 1000),
        ("acetylacetone (enol)", generate.relax(enol, 0), 300.0, 1000),
        ("H5O2+", clusters.zundel(2.4, 0.0, rng), 300.0, 1000),
        ("H9O4+", generate.relax(clusters.protonated(rng)["H+(H2O)4"][0], 1, 200), 300.0, 1000),
        ("(H2O)6", generate.relax(clusters.water(rng)["(H2O)6"][0], 0, 200), 300.0, 1000),
    )
    yield "| system | T K | length ps | mean T K | longest bond Å | largest force eV/Å | NVE drift meV/atom | ms/step |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, start, temperature, steps in systems:
        yield stability(name, start, calculator, temperature, steps)


def ensembles(model: Path, number: int = 16, steps: int = 2000) -> Iterator[str]:
    """Langevin dynamics at 300 K of many protonated clusters, packed for this alone: how many broke, and GFN2-xTB's verdict on the ends."""
    rng = generate.generator("ensembles")
    drawn = [(n, clusters.packed(clusters.turned(clusters.HYDRONIUM, rng), n - 1, rng)) for n in (2, 3, 4) for _ in range(number)]
    starts = [correct.Start(f"H+(H2O){n}", 1, 300.0, generate.relax(x, 1)) for n, x in drawn]
    potential = ScalarMACE(train.continued(model, dict.fromkeys(train.ELEMENTS, 0.0)))  # forces need no atoms' energies
    walkers = correct.Walkers(starts, potential, rng)
    broke, farthest, heat = np.zeros(len(starts), dtype=bool), np.zeros(len(starts)), []
    for _ in range(steps):
        walkers.step()
        broke |= walkers.broken()
        farthest = np.maximum(farthest, [stray(walkers.present(k)[0]) for k in range(len(starts))])
        heat.append((walkers.masses * walkers.velocities**2).sum(1) / (3 * units.kB))
    mean = np.add.reduceat(np.mean(heat[steps // 4 :], axis=0), walkers.edges[:-1]) / np.diff(walkers.edges)
    errors = np.array([correct.compared(*walkers.present(k), 1)[1] for k in range(len(starts))])
    yield "| cluster, 300 K | runs x ps | lost | mean T K of the others | farthest H from an O Å: median | largest | final force error eV/Å |"
    yield "|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(s.name for s in starts):
        of = np.array([s.name == name for s in starts])
        good = of & ~broke & (farthest < STRAYED)
        yield (
            f"| {name} | {number} x {0.5e-3 * steps:.1f} | {of.sum() - good.sum()} | {mean[good].mean():.0f} "
            f"| {np.median(farthest[of]):.2f} | {farthest[of].max():.2f} | {np.median(errors[of]):.2f} |"
        )


def stray(atoms: Atoms) -> float:
    """The largest distance (Å) of a hydrogen from its nearest oxygen."""
    oxygen, hydrogen = atoms.positions[atoms.numbers == 8], atoms.positions[atoms.numbers == 1]
    return np.linalg.norm(hydrogen[:, None] - oxygen[None], axis=-1).min(axis=1).max()


def against_rmd17(path: Path, calculator: Calculator) -> Iterator[str]:
    """Errors of the model and of GFN2-xTB itself against PBE on the first 200 frames of rMD17 ethanol."""
    frames = read(path, ":200")
    for frame in frames:
        frame.info["REF_energy"] = frame.get_potential_energy()
        frame.arrays["REF_forces"] = frame.get_forces()
    energy, forces = differences(frames, calculator)
    labels = [generate.label(Atoms(x.numbers, x.positions), 0) for x in frames]
    own = np.array([label.info["REF_energy"] - x.info["REF_energy"] for label, x in zip(labels, frames, strict=True)])
    own_forces = [label.arrays["REF_forces"] - x.arrays["REF_forces"] for label, x in zip(labels, frames, strict=True)]
    fit, fit_forces = differences(labels, calculator)
    spread = np.std([x.info["REF_energy"] for x in frames])
    yield f"rMD17 ethanol, 200 frames at 500 K (sd of the energy {1e3 * spread:.0f} meV):"
    yield ""
    yield "| compared | force RMSE eV/Å | force MAE eV/Å | sd of the energy difference meV |"
    yield "|---|---|---|---|"
    for name, e, f in (
        ("model - PBE", energy, forces),
        ("GFN2-xTB - PBE", own, own_forces),
        ("model - GFN2-xTB", fit, fit_forces),
    ):
        f = np.concatenate(f)
        yield f"| {name} | {np.sqrt(np.mean(f**2)):.3f} | {np.abs(f).mean():.3f} | {1e3 * e.std():.0f} |"


def into_card(card: Path, text: str) -> None:
    """Replaces what stands between the two marks of the card."""
    whole = card.read_text(encoding="utf-8")
    head, tail = whole.split(BEGIN)[0], whole.split(END)[1]
    card.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Prints the numbers and, if asked, writes them into the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rmd17", type=Path)
    parser.add_argument("--card", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    calculator = MACECalculator(model_paths=str(args.model), device="cpu", default_dtype="float64")
    lines = [*counts(args.work), "", *table(args.work, calculator), "", *dynamics(calculator), "", *ensembles(args.model)]
    if args.rmd17:
        lines += ["", *against_rmd17(args.rmd17, calculator)]
    print("\n".join(lines))
    if args.card:
        into_card(args.card, "\n".join(lines))


if __name__ == "__main__":
    main()
