"""What ending updates early saves and costs: steps, held-out errors and calibration with and without `stop_when_learnt`.

    python tests/benchmarks/early_stop.py ethanol --data ../shared/data
    python tests/benchmarks/early_stop.py zundel  --data ../shared/data --labels 1 10 --sequence 4

Systems, units and columns of `fine_tuning.py`, with the steps made.  "early": updates that end early when their labels are learnt;
"whole": all steps; "short": the honest control, an ordinary update of exactly as many steps as the early one made.  First from the
foundation weights on 1, 10 and 50 labels at once; then, as on the fly, one label after the other, each update from the last samples of
its own kind and all three from the same samples for `--begin` labels.  An early update that was never called learnt is the whole one, step
by step, and is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from fine_tuning import ethanol, make_learner, predict, row, start, zundel
from known import Known

from bnn_driver.loops.chain_update import Learner, update
from bnn_driver.records import Generation, LabelledFrame

HEADS = ("E std", "F rmse", "z E", "z F", "rank E", "rank F", "auc E", "auc F", "cov E", "cov F", "s")


def with_settings(learner: Learner, steps: int, settling: float | None) -> Learner:
    """The same learner with updates of another length or kind."""
    return replace(learner, settings=replace(learner.settings, steps=steps, settling=settling))


class Comparison:
    """Updates of the three kinds on one system, judged on one test set."""

    def __init__(self, learner: Learner, settling: float, test: Known) -> None:
        self.learner, self.settling, self.test = learner, settling, test

    def run(self, previous: dict[str, Generation], labels: Sequence[LabelledFrame]) -> dict[str, Generation]:
        """Next generation of each kind from its own previous one; prints a row for each."""
        steps = self.learner.settings.steps
        early, made = self._update("early", previous["early"], labels, steps, self.settling)
        if made == steps and previous["early"] is previous["whole"]:
            print(f"{len(labels):>3} labels: never learnt, all are whole", flush=True)
            return dict.fromkeys(("early", "whole", "short"), early)
        whole, _ = self._update("whole", previous["whole"], labels, steps, None)
        short, _ = self._update("short", previous["short"], labels, made, None)
        return {"early": early, "whole": whole, "short": short}

    def _update(
        self, kind: str, previous: Generation, labels: Sequence[LabelledFrame], steps: int, settling: float | None
    ) -> tuple[Generation, int]:
        begin = time.perf_counter()
        sampled, report = update(with_settings(self.learner, steps, settling), previous, labels, 0)
        seconds = time.perf_counter() - begin
        prediction = predict(self.learner, sampled, self.test.frames)
        temperature = sum(report.kinetic_temperature) / len(report.kinetic_temperature)
        name = f"{len(labels):>3} labels, {kind:<6}{report.steps:>6}"
        print(row(name, prediction, self.test, seconds) + f"{temperature:8.2f}", flush=True)
        return sampled, report.steps


def main() -> None:
    """Print the table of one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["ethanol", "zundel"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="*", default=[1, 10, 50], help="learnt at once, from the foundation weights")
    parser.add_argument("--begin", type=int, default=10, help="labels before the sequence")
    parser.add_argument("--sequence", type=int, default=3, help="labels that then arrive one by one")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--settling", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    potential, train, test = {"ethanol": ethanol, "zundel": zundel}[options.system](options.data)
    learner = make_learner(potential, options.steps, 0.5, options.seed)
    origin = start(learner, options.members)
    first = float(predict(learner, start(learner, 1), train.frames[0]).mean_energy[0])
    labels = train[slice(0, max([options.begin + options.sequence, *options.labels]))].labels(first)
    comparison = Comparison(learner, options.settling, test)
    print(f"{options.system}: {options.members} members, at most {options.steps} steps, settling {options.settling}")
    print(f"{'':<26}" + "".join(f"{h:>8}" for h in HEADS[:-1]) + f"{HEADS[-1]:>9}{'T':>8}")
    seen: dict[int, Generation] = {}
    for n in options.labels:
        seen[n] = comparison.run(dict.fromkeys(("early", "whole", "short"), origin), labels[:n])["whole"]
    if options.sequence == 0:
        return
    print("one by one")
    base = seen.get(options.begin)
    if base is None:
        base, _ = update(learner, origin, labels[: options.begin], 0)
    kinds = dict.fromkeys(("early", "whole", "short"), base)
    for n in range(options.begin + 1, options.begin + options.sequence + 1):
        kinds = comparison.run(kinds, labels[:n])


if __name__ == "__main__":
    main()
