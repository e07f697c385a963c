"""Wall time to the same simulated time: blocking, asynchronous, and several walkers that share labels, chains and weights.

    python tests/benchmarks/asynchrony.py [--data ../shared/data] [--steps 1200] [--delay 10] [--seeds 1]

Ethanol at 300 K by the whole program with real i-PI and real chain updates (embedded foundation model, 8 chains); the oracle is a MACE
trained on coupled-cluster energies that sleeps `--delay` seconds per label, as a code on another machine would cost.  All rows
simulate the same number of steps in total and promise the same accuracy; each frame is judged afterwards.
`ratio`: wall time of the first row over this one.  `over the floor`: wall time over that of the ensemble's evaluations alone, which
would be left if labels and updates cost nothing and nothing else ran.  `idle`: share of the drivers' time spent waiting for the
oracle and the chains.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from ase.build import molecule
from promise import TEACHER
from rehearsal import Rehearsal, judge, table

VARIANTS = {
    "blocking (published)": {"walkers": 1, "max_lag": 0},
    "up to 4 labels behind": {"walkers": 1, "max_lag": 4},
    "any number behind": {"walkers": 1, "max_lag": 10_000},
    "4 walkers, blocking": {"walkers": 4, "max_lag": 0},
    "4 walkers, up to 4 behind": {"walkers": 4, "max_lag": 4},
}
HEADER = ("run", "seed", "wall min", "ratio", "over the floor", "idle %", "labels (audits)", "beyond", "rmse kcal/mol")


def main() -> None:
    """Print one row per way to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=1200, help="of all walkers together")
    parser.add_argument("--delay", type=float, default=10.0, help="s per label")
    parser.add_argument("--updates", type=int, default=200, help="steps of a chain update")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    teacher = (arguments.data / TEACHER).absolute()
    rows: list[list[str]] = []
    for seed in arguments.seeds:
        first = 0.0
        for name, settings in VARIANTS.items():
            with tempfile.TemporaryDirectory(prefix="asynchrony-") as folder:
                run = Rehearsal(
                    Path(folder) / "run", molecule("CH3CH2OH"), teacher, steps=arguments.steps // settings["walkers"], seed=seed,
                    members=8, updates=arguments.updates, delay=arguments.delay, audits=0, **settings,
                )  # fmt: skip
                wall = run.run()
                verdict, clock = judge(run), run.status["seconds"]
            first = first or wall
            idle = (clock["oracle"] + clock["chains"]) / clock["total"]
            floor = clock["ensemble"] / settings["walkers"]
            rows.append(
                [name, str(seed), f"{wall / 60:.1f}", f"{first / wall:.2f}", f"{wall / floor:.1f}", f"{100 * idle:.0f}",
                 f"{verdict.labels} ({verdict.audits})", f"{verdict.beyond} of {verdict.frames}", f"{verdict.rmse:.3f}"]
            )  # fmt: skip
            print(table(HEADER, rows[-1:]).splitlines()[-1] if len(rows) > 1 else table(HEADER, rows), flush=True)


if __name__ == "__main__":
    main()
