"""Held-out errors after fine-tuning on 1, 10 and 50 labels: SGHMC ensemble against plain Adam against the foundation model.

    python tests/benchmarks/fine_tuning.py ethanol --data ../shared/data
    python tests/benchmarks/fine_tuning.py zundel  --data ../shared/data

Ethanol: the SPICE-trained MACE -> rMD17 (PBE/def2-SVP), tested on test_MD[:200].  Zundel: the same model fine-tuned to DFTB3 on
800 frames (this is the foundation) -> rPBE+D3 on the same geometries, tested on the other 200.  Units: kcal/mol and kcal/mol/Å;
energies as the standard deviation of the error, free of the constant between two codes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from known import SPICE, Known, read, stacked

from bnn_driver.bayes.laplace import energy_sd
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.bayes.minibatch import draw_chains
from bnn_driver.bayes.scores import auroc, rank_correlation, rms_ratio
from bnn_driver.bayes.sghmc import SghmcSettings
from bnn_driver.bayes.update import UpdateSettings
from bnn_driver.loops.chain_update import Learner, TrainingLoss, update
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Frames, Generation, LabelledFrame, Prediction
from bnn_driver.units import KCAL_PER_MOL

ACCURACY = 0.5 * KCAL_PER_MOL
FORCE_NOISE = 0.1 * KCAL_PER_MOL
CHUNK = 50
"""Frames per evaluation."""


def make_learner(
    potential: Potential, steps: int, prior_sd: float, seed: int, step_size: float = 1e-3, accuracy: float = ACCURACY
) -> Learner:
    """Published settings but for what is given.  Args: accuracy: eV, of which a tenth is the noise of a label's energy."""
    head = NoiseHead(potential.n_features, (64, 16))
    noise = NoiseModel(0.1 * accuracy, FORCE_NOISE, 1.0, head)
    settings = UpdateSettings(steps, 5, step_size, SghmcSettings(0.1, 0.999, 1e-4), 1.0, 0.2, 0.05, 1e9, (0.0, 1e9))
    return Learner.around(potential, noise, prior_sd, settings, seed)


def start(learner: Learner, members: int) -> Generation:
    """θ_0 for every member."""
    centre = learner.layout.views(learner.prior.centre[None].expand(members, -1))
    return Generation(0, {k: v.numpy().copy() for k, v in centre.items()}, ())


def predict(learner: Learner, generation: Generation, frames: Frames) -> Prediction:
    """Prediction of many frames, a part at a time."""
    ensemble = Ensemble(learner.potential, generation.weights, generation.number, learner.noise, 1, 0.0, energy_sd)
    parts = [ensemble.predict(frames[slice(i, i + CHUNK)]) for i in range(0, len(frames), CHUNK)]
    names = ("energy", "forces", "virial", "energy_noise_sd", "force_noise_sd")
    return Prediction(*(np.concatenate([getattr(p, n) for p in parts], axis=1) for n in names))


def errors(energy: np.ndarray, forces: np.ndarray, test: Known) -> tuple[float, float]:
    """Standard deviation of the energy error and rms of the force components, kcal/mol and kcal/mol/Å."""
    return np.std(energy - test.energy) / KCAL_PER_MOL, np.sqrt(np.mean((forces - test.forces) ** 2)) / KCAL_PER_MOL


def adam(learner: Learner, labels: Sequence[LabelledFrame], steps: int, step_size: float = 1e-3) -> Generation:
    """Plain Adam on the same loss without noise head, prior and noise: energies and forces at their starting noise."""
    loss = TrainingLoss.build(learner, labels)
    fixed = {k: v for k, v in learner.layout.views(learner.prior.centre[None]).items() if k.startswith("noise.")}
    weights = {k: v[None].clone().requires_grad_(True) for k, v in learner.potential.weights.items()}
    optimiser = torch.optim.Adam(list(weights.values()), lr=step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generators = [torch.Generator().manual_seed(0)]
    for _ in range(steps):
        index, weight = draw_chains(len(labels), 5, [], generators)
        optimiser.zero_grad()
        value = loss(learner.layout.flat(weights | fixed), index, weight.to(learner.potential.dtype)).sum()
        value.backward()
        optimiser.step()
        schedule.step()
    return Generation(1, {k: v.detach().numpy() for k, v in (weights | fixed).items()}, ())


def ethanol(data: Path) -> tuple[StackedPotential, Known, Known]:
    """Foundation potential, labels and test set."""
    folder = data / "ethanol_rmd17"
    train, test = read(folder / "train.xyz"), read(folder / "test_MD.xyz", ":200")
    return stacked(data / SPICE, train.frames.numbers), train, test


def zundel(data: Path) -> tuple[StackedPotential, Known, Known]:
    """The same with a foundation that is made here: SPICE fine-tuned by Adam to DFTB3 on 800 frames."""
    folder = data / "zundel_eigen_qbc"
    low = read(folder / "zundel_1000_dftb3.extxyz", ":", "REF_energy", "REF_forces", 1)
    high = read(folder / "zundel_1000_rpbe-d3_aims.extxyz", ":", "REF_energy", "REF_forces", 1)
    order = np.random.default_rng(0).permutation(len(high.energy))
    potential = stacked(data / SPICE, high.frames.numbers)
    learner = make_learner(potential, 1, 0.5, 0)
    train = low[order[:800]]
    labels = train.labels(float(predict(learner, start(learner, 1), train.frames[0]).mean_energy[0]))
    tuned = adam(learner, labels, 4000)
    potential.weights = {k: torch.as_tensor(tuned.weights[k][0]) for k in potential.weights}
    rest = low[order[800:]]
    found = predict(learner, tuned, rest.frames)
    print(
        "foundation (SPICE -> DFTB3) on 200 DFTB3 frames: E {:.2f}, F {:.2f}".format(
            *errors(found.mean_energy, found.mean_forces, rest)
        )
    )
    return potential, high[order[:800]], high[order[800:]]


def row(name: str, prediction: Prediction, test: Known, seconds: float) -> str:
    """One line of the table."""
    energy, forces = errors(prediction.mean_energy, prediction.mean_forces, test)
    text = f"{name:<26}{energy:8.3f}{forces:8.3f}"
    text += "".join(f"{x:8.2f}" for x in trust(prediction, test).values()) if prediction.members > 1 else " " * 64
    return text + f"{seconds:9.0f}"


def trust(prediction: Prediction, test: Known) -> dict[str, float]:
    """How well the predictive sds tell the errors: rms of error over sd, rank correlation, AUROC, share within 1.96 sd."""
    error = prediction.mean_energy - test.energy
    error, sd = (error - error.mean()) / KCAL_PER_MOL, prediction.energy_predictive_sd / KCAL_PER_MOL
    f_error = (prediction.mean_forces - test.forces).ravel() / KCAL_PER_MOL
    f_sd = prediction.force_predictive_sd.ravel() / KCAL_PER_MOL
    return {
        "z E": rms_ratio(error, sd),
        "z F": rms_ratio(f_error, f_sd),
        "rank E": rank_correlation(error, sd),
        "rank F": rank_correlation(f_error, f_sd),
        "auc E": auroc(error, sd, 0.5),
        "auc F": auroc(f_error, f_sd, 1.0),
        "cov E": float(np.mean(np.abs(error) < 1.96 * sd)),
        "cov F": float(np.mean(np.abs(f_error) < 1.96 * f_sd)),
    }


def main() -> None:
    """Print the table of one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["ethanol", "zundel"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=1, help="of the chains, one after the other; Adam gets as many steps")
    parser.add_argument("--step-size", type=float, default=1e-3, help="of the chains at the start of an update")
    parser.add_argument("--prior-sd", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    potential, train, test = {"ethanol": ethanol, "zundel": zundel}[options.system](options.data)
    learner = make_learner(potential, options.steps, options.prior_sd, options.seed, options.step_size)
    heads = ("E std", "F rmse", "z E", "z F", "rank E", "rank F", "auc E", "auc F", "cov E", "cov F", "s")
    effort = f"{options.updates} x {options.steps} steps of {options.step_size:g}"
    print(f"{options.system}: {options.members} members, {effort}, prior sd {options.prior_sd}")
    print(f"{'':<26}" + "".join(f"{h:>8}" for h in heads[:-1]) + f"{heads[-1]:>9}")
    before = predict(learner, start(learner, 1), test.frames)
    print(row("foundation", before, test, 0.0), flush=True)
    for n in options.labels:
        first = float(predict(learner, start(learner, 1), train.frames[0]).mean_energy[0])
        labels = train[slice(0, n)].labels(first)
        begin = time.perf_counter()
        tuned = adam(learner, labels, options.steps * options.updates)
        print(row(f"{n:>3} labels, Adam", predict(learner, tuned, test.frames), test, time.perf_counter() - begin), flush=True)
        begin = time.perf_counter()
        sampled = start(learner, options.members)
        for _ in range(options.updates):
            sampled, _ = update(learner, replace(sampled, label_ids=()), labels, 0)
        seconds = time.perf_counter() - begin
        prediction = predict(learner, sampled, test.frames)
        one = replace(
            prediction,
            **{k: getattr(prediction, k)[:1] for k in ("energy", "forces", "virial", "energy_noise_sd", "force_noise_sd")},
        )
        print(row(f"{n:>3} labels, one chain", one, test, seconds / options.members), flush=True)
        print(row(f"{n:>3} labels, SGHMC mean", prediction, test, seconds), flush=True)


if __name__ == "__main__":
    main()
