"""One update of all chains: labels and last samples in, next samples out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bnn_driver.bayes.likelihood import NoiseModel, Targets, log_likelihood, squared_residuals
from bnn_driver.bayes.minibatch import LabelWeights, own_weights
from bnn_driver.bayes.prior import GaussianPrior, dispersed
from bnn_driver.bayes.update import UpdateReport, UpdateSettings, update_chains
from bnn_driver.loops.dispersion import MARGIN, explaining_sd
from bnn_driver.loops.seeds import derive
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import NOISE_PREFIX
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.params import Layout, layout
from bnn_driver.potential.transfer import to_device
from bnn_driver.records import Frames, Generation, LabelledFrame

#: predictions, labels and noise, in the order of the arguments of `log_likelihood`
Compared = tuple[Tensor, Tensor, Tensor | None, Targets, Tensor, Tensor, float]


class Loss(Protocol):
    """What `update` needs of a loss beside what it is called for, see `bayes.posterior.Forward`."""

    @property
    def components(self) -> int:
        """Numbers in one label."""
        ...

    def __call__(self, theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(M,) weighted sum of -log p over each chain's minibatch.  Args: theta (M, D); index, weight (M, b)."""
        ...


@dataclass(frozen=True)
class Learner:
    """What turns labels into weights; nothing in it changes."""

    potential: Potential
    noise: NoiseModel
    prior: GaussianPrior
    layout: Layout
    settings: UpdateSettings
    seed: int
    dispersion: float | Literal["auto"] = 0.0
    """sd of the chains' own prior centres and starts around θ_0; 0: all chains share them; "auto": see `loops.dispersion`."""
    label_weights: LabelWeights = "equal"

    @classmethod
    def around(cls, potential: Potential, noise: NoiseModel, prior_sd: float, settings: UpdateSettings, seed: int) -> Learner:
        """Prior of one width around the foundation weights and the centre of the noise head."""
        centre = dict(potential.weights) | noise.head.init(potential.dtype, potential.device)
        table = layout(centre)
        flat = table.flat({k: v[None] for k, v in centre.items()})[0]
        return cls(potential, noise, GaussianPrior(flat, torch.full_like(flat, prior_sd)), table, settings, seed)

    def prior_of(self, members: int, dispersion: float) -> GaussianPrior:
        """The chains' prior: common, or each around its own centre; the noise head is not dispersed."""
        if dispersion == 0:
            return self.prior
        kept = torch.cat([torch.full((b.size,), float(not b.name.startswith(NOISE_PREFIX))) for b in self.layout.blocks])
        return dispersed(self.prior, dispersion * kept, [derive(self.seed, "centre", m) for m in range(members)])

    def dispersion_of(self, previous: Generation, labels: Sequence[LabelledFrame]) -> float:
        """The dispersion in force: that of the generation before, or chosen when the first labels are learnt."""
        if previous.number > 0:
            return float(previous.state.get("dispersion", 0.0))
        if self.dispersion != "auto":
            return self.dispersion
        generator = torch.Generator().manual_seed(derive(self.seed, "dispersion"))
        return min(float(self.prior.sd.max()), MARGIN * explaining_sd(self.potential, labels, generator))

    def start(self, previous: Generation, prior: GaussianPrior) -> Tensor:
        """(M, D) where the chains go on: their last samples, or their prior's centres after generation 0."""
        potential = self.potential
        theta = self.layout.flat(
            {k: torch.as_tensor(v).to(potential.device, potential.dtype) for k, v in previous.weights.items()}
        )
        return prior.centre.clone() if previous.number == 0 and prior.centre.ndim == 2 else theta

    def weights_of(self, labels: Sequence[LabelledFrame], members: int) -> Tensor | None:
        """(M, N) weight of every label in every chain, the same in all updates; None: 1."""
        ids = [item.label.frame_id for item in labels]
        return own_weights(self.label_weights, [[derive(self.seed, "label weight", m, i) for i in ids] for m in range(members)])


def update(
    learner: Learner,
    previous: Generation,
    labels: Sequence[LabelledFrame],
    attempt: int,
    progress: Callable[[int, Tensor], None] | None = None,
    loss_of: Callable[[Learner, Sequence[LabelledFrame]], Loss] | None = None,
) -> tuple[Generation, UpdateReport]:
    """Move every chain over all labels, starting from its own previous sample.

    Args: labels: in the order they came; those that `previous` has not learnt count as the newest.
        attempt: 0, or the number of the repetition after a diverged update; it changes the seeds only.
        loss_of: makes the loss of the labels; None: `TrainingLoss.build`, for labels of the same atoms.
    """
    number = previous.number + 1
    members, dispersion = len(previous.weights[learner.layout.blocks[0].name]), learner.dispersion_of(previous, labels)
    prior, label_weights = learner.prior_of(members, dispersion), learner.weights_of(labels, members)
    theta = learner.start(previous, prior)
    seeds = [derive(learner.seed, "chain", m, "generation", number, "attempt", attempt) for m in range(len(theta))]
    learnt = set(previous.label_ids)
    newest = [i for i, item in enumerate(labels) if item.label.frame_id not in learnt]
    loss = (loss_of or TrainingLoss.build)(learner, labels)
    theta, report = update_chains(
        theta, prior, loss, len(labels), newest, loss.components, learner.settings, seeds, progress, label_weights
    )
    weights = {k: v.detach().cpu().numpy() for k, v in learner.layout.views(theta).items()}
    state = {"seeds": seeds, "attempt": attempt, "dispersion": dispersion, "report": asdict(report)}
    return Generation(number, weights, tuple(item.label.frame_id for item in labels), state), report


@dataclass(frozen=True, eq=False)
class Batch:
    """One minibatch per chain."""

    graph: Graph
    """Leading axes (M, b)."""
    targets: Targets
    volume: Tensor | None
    """(M, b) Å^3."""

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        t = self.targets
        rest = [x for x in (t.energy, t.forces, t.stress, t.has_stress, self.volume) if x is not None]
        return [*self.graph.tensors(), *rest]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch with other tensors, in the order of `tensors()`."""
        fixed = len(self.graph.tensors())
        energy, forces, *others = tensors[fixed:]
        rest = iter(others)
        stress, has_stress, volume = (
            None if x is None else next(rest) for x in (self.targets.stress, self.targets.has_stress, self.volume)
        )
        return Batch(self.graph.with_tensors(tensors[:fixed]), Targets(energy, forces, stress, has_stress), volume)


@dataclass(frozen=True, eq=False)
class TrainingLoss:
    """Negative log-likelihood of minibatches of the labels, one minibatch per chain."""

    learner: Learner
    graph: Graph
    targets: Targets
    atoms: tuple[int, ...]
    """Atomic numbers."""
    volume: Tensor | None
    """(N,) Å^3 of periodic frames whose labels have a stress."""

    @classmethod
    def build(cls, learner: Learner, labels: Sequence[LabelledFrame], first: LabelledFrame | None = None) -> TrainingLoss:
        """Graphs and targets of all labels, built once.

        Args: labels: of the same atoms.   first: the label that fixes the constant of the energies; None: the first of these.
        """
        potential = learner.potential
        frames = stack_frames([item.frame for item in labels])
        common = first or labels[0]

        def tensor(values: object, dtype: torch.dtype = potential.dtype) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype, device=potential.device)

        stresses = [item.label.stress for item in labels]
        has_stress = [frames.periodic and s is not None for s in stresses]
        stress = volume = None
        if frames.cell is not None and any(has_stress):
            stress = tensor([np.zeros((3, 3)) if s is None else s for s in stresses])
            volume = tensor(np.abs(np.linalg.det(frames.cell)))
        targets = Targets(
            tensor([item.label.energy + own_offset(item, common) for item in labels], torch.float64),
            tensor([item.label.forces for item in labels]),
            stress,
            None if stress is None else tensor(has_stress, torch.bool),
        )
        graph = build_graph(frames, potential.cutoff, potential.dtype, potential.device, rounded=potential.compiler.active)
        return cls(learner, potential.prepare_frames(graph), targets, tuple(frames.numbers.tolist()), volume)

    @property
    def components(self) -> int:
        """Numbers in one label."""
        return 1 + self.targets.forces[0].numel() + (0 if self.targets.stress is None else 6)

    def __call__(self, theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(M,) weighted sum of -log p over each chain's minibatch.  Args: theta (M, D); index, weight (M, b)."""
        weight = to_device(weight, theta.device)
        return self._loss(self.learner.layout.views(theta), weight, self._batch(index))

    def gradient(self, theta: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (M, D) of the sum over the chains and the loss (M,) of each; one function of tensors, so that it can be compiled."""
        if self.learner.potential.compiler.active:  # one shape from the first label on
            index, weight = _padded(index, weight, self.learner.settings.batch_size)
        weight = to_device(weight, theta.device)
        batch, layout = self._batch(index), self.learner.layout

        def function(theta: Tensor, weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = {name: x.detach().requires_grad_(True) for name, x in layout.views(theta).items()}
            loss = self._loss(leaves, weight, batch.with_tensors(inputs))
            return *torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True), loss.detach()

        key = (self.atoms, batch.volume is None)
        tensors = [theta.detach(), weight, *batch.tensors()]
        *gradient, loss = self.learner.potential.compiler("training step", key, function, tensors)
        return torch.cat([x.reshape(len(theta), -1) for x in gradient], dim=1), loss

    def squared_residuals(self, theta: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums (M, 3) over these labels of squared energy, force and stress residuals in units of the noise, and components (3,) in each."""
        size, weights = self.learner.settings.batch_size, self.learner.layout.views(theta.detach())
        sums, components = torch.zeros(len(theta), 3, dtype=torch.float64, device=theta.device), torch.zeros(3, dtype=torch.int64)
        for start in range(0, len(rows), size):  # no more memory than a step takes
            index = torch.as_tensor(rows[start : start + size], device=theta.device).expand(len(theta), -1)
            more, counted = squared_residuals(*self._compared(weights, self._batch(index), create_graph=False))
            sums, components = sums + more.detach(), components + counted
        return sums, components

    def _batch(self, index: Tensor) -> Batch:
        index = to_device(index, self.targets.energy.device)
        volume = None if self.volume is None else self.volume[index]
        return Batch(self.graph.take(index), self.targets.take(index), volume)

    def _loss(self, weights: dict[str, Tensor], weight: Tensor, batch: Batch) -> Tensor:
        log_p = log_likelihood(*self._compared(weights, batch, create_graph=True))
        return -(weight * log_p).sum(dim=1)

    def _compared(self, weights: dict[str, Tensor], batch: Batch, create_graph: bool) -> Compared:
        """Predictions, labels and noise, in the order of the arguments of `log_likelihood`."""
        result = self.learner.potential.evaluate(weights, batch.graph, create_graph=create_graph)
        energy_sd, force_sd = self.learner.noise(result.features, weights)
        stress = None if batch.volume is None else -result.virial / batch.volume[..., None, None]
        return result.energy, result.forces, stress, batch.targets, energy_sd, force_sd, self.learner.noise.stress_sd


def _padded(index: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Minibatches of at least `size` labels, the first one again with weight 0 where there are fewer.  Args: index, weight: (M, b)."""
    missing = max(0, size - index.shape[1])
    return torch.cat([index, index[:, :1].expand(-1, missing)], dim=1), torch.nn.functional.pad(weight, (0, missing))


def energy_offset(first: LabelledFrame) -> float:
    """eV, E_foundation - E_oracle of the first label: energies are defined up to a constant."""
    return float(first.context["foundation_energy"] - first.label.energy)


def own_offset(item: LabelledFrame, first: LabelledFrame) -> float:
    """eV, added to a label's energy: what it says itself (labels of several compositions do), or `energy_offset`."""
    return float(item.context["energy_offset"]) if "energy_offset" in item.context else energy_offset(first)


def stack_frames(frames: Sequence[Frames]) -> Frames:
    """One batch of frames of the same atoms."""
    head = frames[0]
    cell = None if head.cell is None else np.concatenate([f.cell for f in frames if f.cell is not None])
    return Frames(head.numbers, np.concatenate([f.positions for f in frames]), cell, head.charge, head.multiplicity)
