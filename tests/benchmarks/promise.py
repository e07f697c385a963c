"""The promise, measured: P(|error| >= accuracy) <= 5 % for what i-PI is served, judged on every frame of whole runs.

    python tests/benchmarks/promise.py [--data ../shared/data] [--frames 4000] [--seeds 1 2 3]

Foundation: the embedded model (GFN2-xTB); oracle: a MACE trained on coupled-cluster energies (`ani500k_small_CC` of the data
folder); ethanol at 300 K, 1 kcal/mol, real i-PI.  Every frame that i-PI was served is evaluated by the teacher afterwards: `beyond` and
its share are exact for the run, the interval (95 % Clopper-Pearson) takes frames as independent, which those of one trajectory are
not.  `audits`: what the run itself measured, and showed in `status`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from ase.build import molecule
from rehearsal import Rehearsal, judge, table

TEACHER = Path("models/ani_cc/ani500k_small_CC_mace0316.model")
VARIANTS = {
    "classical, blocking": {"max_lag": 0},
    "classical, 3 labels behind": {"max_lag": 3},
    "ring polymer, blocking": {"max_lag": 0, "beads": 8},
    "ring polymer, 8 labels behind": {"max_lag": 8, "beads": 8},
}
HEADER = ("run", "seed", "labels", "served by the model", "beyond", "share %", "worst", "rmse", "audits beyond", "minutes")


def main() -> None:
    """Print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--frames", type=int, default=4000, help="steps times beads of every run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for seed in arguments.seeds:
        for name, settings in VARIANTS.items():
            with tempfile.TemporaryDirectory(prefix="promise-") as folder:
                steps = arguments.frames // settings.get("beads", 1)
                teacher = (arguments.data / TEACHER).absolute()
                run = Rehearsal(Path(folder) / "run", molecule("CH3CH2OH"), teacher, steps=steps, seed=seed, **settings)
                minutes = run.run() / 60
                v = judge(run)
            low, high = (100 * x for x in v.interval)
            rows.append(
                [name, str(seed), str(v.labels), str(v.frames), str(v.beyond),
                 f"{100 * v.beyond / max(v.frames, 1):.2f} ({low:.2f}-{high:.2f})",
                 f"{v.worst:.2f}", f"{v.rmse:.3f}", f"{v.audits_beyond} of {v.audits}", f"{minutes:.1f}"]
            )  # fmt: skip
            print(table(HEADER, rows[-1:]).splitlines()[-1] if len(rows) > 1 else table(HEADER, rows), flush=True)


if __name__ == "__main__":
    main()
