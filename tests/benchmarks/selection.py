"""Selecting from a pool against frames drawn by lot, at equal size and effort: several seeds, means and standard errors.

    python tests/benchmarks/selection.py --data ../shared/data --seeds 1 2 3         all ways of choosing on the Zundel frames
    python tests/benchmarks/selection.py --data ../shared/data --ways chains plain   some of them

The published frames of H5O2+ (FHI-aims rPBE+D3): 200 test frames that are never chosen, 20 to start, 8 rounds of 10.  Each way and
seed is a run of `bnn-driver select` in the cache, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
from pathlib import Path

import numpy as np

from bnn_driver.loops.chains import BASELINE
from bnn_driver.loops.division import divide, open_pool
from bnn_driver.loops.pool import Rounds, select
from bnn_driver.loops.scratch import FromScratch
from bnn_driver.pool_config import read_select_config
from bnn_driver.report.selection import Arm, read_selection, selection_summary

CONFIG = """
[run]
seed = {seed}
[system]
charge = 1
[ensemble]
members = {members}
{steps}
[accuracy]
energy = "1 kcal/mol"
[pool]
file = "{file}"
energy_key = "REF_energy"
forces_key = "REF_forces"
test = 200
start = 20
batch = 10
rounds = {rounds}
plateau = false
baseline = {baseline}
{pool}
[committee]
{committee}
"""
SCRATCH = 'kind = "scratch"\nmace = { batch_size = 5, ema = true, ema_decay = 0.99 }'
WAYS = {
    "chains": ("", ""),
    "plain": ("diversity = false", ""),
    "predictive": ('rank = "predictive"', ""),
    "atom": ('rank = "atom"', ""),
    "scratch": ("", SCRATCH),
    "scratch-plain": ("diversity = false", SCRATCH),
}
"""Lines of [pool] and of [committee]; "plain": the most uncertain without diversity."""
LOTS = (20, 20, 60)
"""Frames by lot of models from scratch: 20 to start, then at 40 and 100 labels; what is trained anew each time needs no step between."""
PUBLISHED = {20: 107, 40: 59, 60: 45, 100: 32}
"""meV/Å, by labels, of the tutorial's own test frames."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("benchmark_cache") / "selection")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of the chains per round")
    parser.add_argument("--scratch-steps", type=int, default=2000, help="of every model from scratch per round")
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    found: dict[str, list[Path]] = {}
    for way in given.ways:
        for seed in given.seeds:
            pool, committee = WAYS[way]
            scratch = way.startswith("scratch")
            folder = given.cache / f"{way}_{seed}_{given.members}_{given.scratch_steps if scratch else given.steps}"
            folder.mkdir(parents=True, exist_ok=True)
            file = (given.data / "zundel_eigen_qbc" / "zundel_1000_rpbe-d3_aims.extxyz").absolute()
            text = CONFIG.format(
                seed=seed, members=given.members, steps="" if scratch else f"steps_per_update = {given.steps}",
                rounds=given.rounds, file=file, pool=pool, baseline=1 if way == "chains" else 0,
                committee=f"{committee}\nsteps = {given.scratch_steps}" if scratch else committee,
            )  # fmt: skip
            (folder / "bnn.toml").write_text(text)
            found.setdefault(way, []).append(select(folder / "bnn.toml"))
            if way == "scratch":
                lots(folder / "bnn.toml")
    print(table(found))


def lots(config_file: Path) -> None:
    """Learn `LOTS` frames by lot beside a selection."""
    config, base = read_select_config(config_file), config_file.absolute().parent
    pool, folder, first = open_pool(config, base), base / "run" / BASELINE / "0", Path("generations") / "000001"
    if not (folder / first).exists():  # the start frames are the same, and so are the seeds
        shutil.copytree(base / "run" / first, folder / first)

    def note(kind: str, **facts: object) -> None:
        print(f"by lot: {kind}", facts.get("labels", ""), facts.get("force_error", ""), flush=True)

    members = FromScratch(config, config.committee, pool.elements, folder / "generations", note)
    Rounds(config, pool, divide(pool, config), members, folder, note).draw(list(LOTS), 0)


def table(found: dict[str, list[Path]]) -> str:
    """Mean force error on the test frames, meV/Å, by labels: mean and standard error over the seeds."""
    rows: dict[str, list[Arm]] = {}
    for way, runs in found.items():
        selections = [read_selection(run) for run in runs]
        rows[way] = [item.chosen for item in selections]
        if any(item.baselines for item in selections):
            rows[f"{way}, by lot"] = [item.baselines[0] for item in selections]
    labels = next(iter(rows.values()))[0].labels.tolist()
    lines = ["| labels | " + " | ".join(map(str, labels)) + " | AUROC F | rank F |", "|---|" + "---|" * (len(labels) + 2)]
    for name, arms in rows.items():
        errors = 1e3 * np.array([arm.errors("force_error") for arm in arms])
        spread = errors.std(axis=0, ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else np.zeros(errors.shape[1])
        known = dict(zip(arms[0].labels.tolist(), zip(errors.mean(axis=0), spread, strict=True), strict=True))
        cells = ["{:.1f} ± {:.1f}".format(*known[n]) if n in known else "" for n in labels]
        judged = [selection_summary(run)["rounds"][-1] for run in found.get(name, [])]
        each = [[row[key] for row in judged if row[key] is not None] for key in ("force_auroc", "force_rank")]
        told = [f"{np.mean(values):.2f}" if values else "" for values in each]
        lines.append(f"| {name} | " + " | ".join([*cells, *told]) + " |")
    lines.append("| published | " + " | ".join(str(PUBLISHED.get(n, "")) for n in labels) + " | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
