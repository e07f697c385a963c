"""The walkers of an exploration at the same time against one after the other, by the same program and real i-PIs.

    python tests/benchmarks/walkers.py [--walkers 2 4] [--steps 300] [--beads 1] [--structure examples/eigen_explore/eigen.xyz] [--device cpu]

`ratio`: wall time of the simulations one after the other over that of all at once.  `floor`: s spent in the evaluations of the members
when all move at once; what is above it is i-PI, files and the start of the programs.  `structures`: of one evaluation, on average.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bnn_driver.loops.assembly import foundation_generation, make_ensemble, make_policy
from bnn_driver.loops.explore import gather
from bnn_driver.loops.walks import Walks
from bnn_driver.records import Frames, Prediction

CONFIG = """
[run]
seed = 1
[system]
periodic = false
charge = {charge}
[potential]
model = "embedded"
device = "{device}"
[ensemble]
members = 4
[accuracy]
energy = "1 kcal/mol"
[oracle]
kind = "toy"
[explore]
structure = "{structure}"
temperatures = {temperatures}
steps = {steps}
beads = {beads}
stride = 10
start = 2
batch = 2
"""


@dataclass
class Timed:
    """A potential that notes what it costs."""

    seconds: float = 0.0
    sizes: list[int] = field(default_factory=list)


def main() -> None:
    """Print one row per number of walkers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walkers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--beads", type=int, default=1)
    parser.add_argument("--structure", type=Path, default=Path(__file__).parents[2] / "examples" / "eigen_explore" / "eigen.xyz")
    parser.add_argument("--charge", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("| walkers | one after the other, s | at once, s | ratio | floor, s | structures |\n|---|---|---|---|---|---|")
    for count in given.walkers:
        kelvin = [300 + 20 * i for i in range(count)]
        alone = sum(simulate(given, [one])[0] for one in kelvin)
        together, timed = simulate(given, kelvin)
        mean = sum(timed.sizes) / len(timed.sizes)
        print(
            f"| {count} | {alone:.1f} | {together:.1f} | {alone / together:.2f} | {timed.seconds:.1f} | {mean:.1f} |", flush=True
        )


def simulate(given: argparse.Namespace, kelvin: list[int]) -> tuple[float, Timed]:
    """One round of walkers at these temperatures.  Returns: s, from the start of i-PI to its end; and what the potential cost."""
    with tempfile.TemporaryDirectory(prefix="walkers-") as folder:
        file = Path(folder) / "bnn.toml"
        file.write_text(
            CONFIG.format(
                charge=given.charge, device=given.device, structure=given.structure.absolute(), temperatures=kelvin,
                steps=given.steps, beads=given.beads,
            )
        )  # fmt: skip
        parts, timed = gather(file), Timed()
        ensemble = make_ensemble(parts.model, foundation_generation(parts.model, 4), parts.config)
        ensemble.predict(parts.system.like)

        def predict(frames: Frames) -> Prediction:
            begin = time.perf_counter()
            found = ensemble.predict(frames)
            timed.seconds += time.perf_counter() - begin
            timed.sizes.append(len(frames))
            return found

        policy, calibrations = make_policy(parts.config, parts.system.like.numbers, 0.0)
        walks = Walks(parts.config, parts.base, parts.system, Path(folder) / "rounds", Path(folder) / "log", policy)
        begin = time.perf_counter()
        walks.run(0, predict, calibrations, lambda facts: None, lambda: None)
        return time.perf_counter() - begin, timed


if __name__ == "__main__":
    main()
