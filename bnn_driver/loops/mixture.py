"""The training loss of labels of different atoms: the sum of one loss per kind of frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn_driver.loops.chain_update import Learner, TrainingLoss
from bnn_driver.records import LabelledFrame


@dataclass(frozen=True, eq=False)
class MixedLoss:
    """`TrainingLoss` for labels of which not all have the same atoms in the same order."""

    parts: tuple[TrainingLoss, ...]
    part: Tensor
    """(N,) int64, on the host: which of the parts holds a label."""
    row: Tensor
    """(N,) int64, on the host: and where in it."""

    @property
    def components(self) -> int:
        """Numbers in a label, the mean over all."""
        counts = torch.bincount(self.part, minlength=len(self.parts)).tolist()
        return max(1, round(sum(n * p.components for n, p in zip(counts, self.parts, strict=True)) / sum(counts)))

    def __call__(self, theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(M,) weighted sum of -log p over each chain's minibatch.  Args: theta (M, D); index, weight (M, b)."""
        losses = [self.parts[number](theta, *batch) for number, *batch in self._split(index, weight)]
        return torch.stack(losses).sum(dim=0)

    def gradient(self, theta: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (M, D) of the sum over the chains and the loss (M,) of each."""
        found = [self.parts[number].gradient(theta, *batch) for number, *batch in self._split(index, weight)]
        gradients, losses = zip(*found, strict=True)
        return torch.stack(gradients).sum(dim=0), torch.stack(losses).sum(dim=0)

    def squared_residuals(self, theta: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `TrainingLoss.squared_residuals`."""
        sums, components = torch.zeros(len(theta), 3, dtype=torch.float64, device=theta.device), torch.zeros(3, dtype=torch.int64)
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        for number, part in enumerate(self.parts):
            own = self.row[index[self.part[index] == number]].tolist()
            if own:
                more, counted = part.squared_residuals(theta, own)
                sums, components = sums + more, components + counted
        return sums, components

    def _split(self, index: Tensor, weight: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Each part's share of the minibatches: its number, rows (M, n) and weights (M, n).

        The chains' shares differ in size: the smaller ones are filled up with labels of weight 0.
        """
        kinds = self.part[index]
        shares = []
        for number in torch.unique(kinds).tolist():
            mine = kinds == number
            first = torch.argsort(~mine, dim=1, stable=True)[:, : int(mine.sum(dim=1).max())]
            held = mine.gather(1, first)
            rows = torch.where(held, self.row[index].gather(1, first), torch.zeros_like(first))
            shares.append((number, rows, weight.gather(1, first) * held.to(weight.dtype)))
        return shares


def training_loss(learner: Learner, labels: Sequence[LabelledFrame]) -> TrainingLoss | MixedLoss:
    """The loss of labels of any atoms."""
    members: dict[tuple[object, ...], list[int]] = {}
    for number, item in enumerate(labels):
        members.setdefault((*item.frame.numbers.tolist(), item.frame.periodic), []).append(number)
    if len(members) == 1:
        return TrainingLoss.build(learner, labels)
    part, row = torch.zeros(len(labels), dtype=torch.int64), torch.zeros(len(labels), dtype=torch.int64)
    for number, own in enumerate(members.values()):
        part[own], row[own] = number, torch.arange(len(own))
    parts = tuple(TrainingLoss.build(learner, [labels[i] for i in own], labels[0]) for own in members.values())
    return MixedLoss(parts, part, row)
