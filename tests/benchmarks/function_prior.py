"""A prior on functions: at unlabelled frames that the run has seen, every chain is drawn to what the foundation model says there.

The pull is as wide as the foundation's error in the labels: N(E_θ(u) | E_0(u), τ_E²) Π N(F_θ(u) | F_0(u), τ_F²) for each unlabelled
frame u.  Hafner, Tran, Lillicrap, Irpan, Davidson 2018 (arXiv:1807.09289); Sun, Zhang, Shi, Grosse 2019 (arXiv:1903.05779).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import fine_tuning
import numpy as np
import torch
from torch import Tensor

from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.bayes.update import update_chains
from bnn_driver.loops.chain_update import Learner, TrainingLoss, energy_offset, stack_frames
from bnn_driver.loops.seeds import derive
from bnn_driver.records import Frames, Generation, Label, LabelledFrame

AT_ONCE = 2
"""Unlabelled frames in a minibatch."""


@dataclass(frozen=True, eq=False)
class WithPrior:
    """The loss of the labels and of the unlabelled frames."""

    labels: TrainingLoss
    unlabelled: TrainingLoss
    n_labels: int
    n_unlabelled: int
    generator: torch.Generator

    def gradient(self, theta: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sum over the chains; the loss is that of the labels."""
        gradient, loss = self.labels.gradient(theta, index, weight)
        rows = torch.randint(self.n_unlabelled, (len(theta), AT_ONCE), generator=self.generator)
        share = torch.full(rows.shape, self.n_unlabelled / (AT_ONCE * self.n_labels), dtype=theta.dtype)
        pull, _ = self.unlabelled.gradient(theta, rows, share)
        return gradient + pull, loss


def update_with_prior(
    learner: Learner, previous: Generation, labels: Sequence[LabelledFrame], seen: Frames
) -> tuple[Generation, bool]:
    """One update from the foundation weights, and whether it diverged.  Args: seen: frames without labels."""
    one = fine_tuning.start(learner, 1)
    there = fine_tuning.predict(learner, one, stack_frames([x.frame for x in labels]))
    offset = energy_offset(labels[0])
    force_error = np.array([x.label.forces for x in labels]) - there.mean_forces
    energy_error = np.array([x.label.energy + offset for x in labels]) - there.mean_energy
    wide = NoiseModel(
        max(float(np.sqrt(np.mean(energy_error**2))), learner.noise.energy_sd), float(np.sqrt(np.mean(force_error**2))),
        learner.noise.stress_sd, NoiseHead(learner.potential.n_features, (), ()),
    )  # fmt: skip
    found = fine_tuning.predict(learner, one, seen)
    pseudo = []
    for i in range(len(seen)):
        label = Label(float(found.mean_energy[i]), found.mean_forces[i], None, "foundation", "prior", str(i), "none")
        pseudo.append(LabelledFrame(seen[i], label, {"foundation_energy": float(found.mean_energy[i])}))
    seeds = [derive(learner.seed, "chain", m) for m in range(len(next(iter(previous.weights.values()))))]
    loss = WithPrior(
        TrainingLoss.build(learner, labels), TrainingLoss.build(replace(learner, noise=wide), pseudo), len(labels), len(seen),
        torch.Generator().manual_seed(derive(learner.seed, "unlabelled")),
    )  # fmt: skip
    prior = learner.prior_of(len(seeds), learner.dispersion_of(previous, labels))
    theta, report = update_chains(
        learner.start(previous, prior),
        prior,
        loss,
        len(labels),
        list(range(len(labels))),
        loss.labels.components,
        learner.settings,
        seeds,
    )  # type: ignore[arg-type]
    return Generation(1, {k: v.numpy() for k, v in learner.layout.views(theta).items()}, ()), report.diverged
