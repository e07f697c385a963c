"""One update of the chains as a pure function: (weights, labels, seeds, settings) -> (weights', report).

The published update: v, s, t and p start afresh, the step size falls as a cosine, the noise is off at first and then
rises, each chain has its own minibatches and its own noise, and ends on its own new sample.

With `settling`, an update whose new labels are learnt (`bayes.learnt`) passes through the rest of its schedule in few steps, at
full temperature and down to the smallest step size, so that it too ends on samples.  All chains do so at once, when the slowest
has learnt: a chain then depends on its own seed and on the common number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnn_driver.bayes import learnt, minibatch, schedule, sghmc
from bnn_driver.bayes.posterior import Forward, MinibatchPosterior
from bnn_driver.bayes.prior import GaussianPrior
from bnn_driver.errors import BnnError

#: (step, loss (M,) of that step): called after every step; may raise to end the update
Progress = Callable[[int, Tensor], None]

_CHECK_EVERY = 50
_TEMPERATURE_EVERY = 10


@dataclass(frozen=True)
class UpdateSettings:
    """How the chains move after new labels."""

    steps: int
    batch_size: int
    """B, labels per minibatch."""
    step_size: float
    """γ_0 of the cosine."""
    sampler: sghmc.SghmcSettings
    temperature: float
    """T of the target p(θ | data)^(1/T); 1 is the posterior, 0 an optimiser."""
    noiseless_fraction: float
    """Part of the steps without noise."""
    ramp_fraction: float
    """Part of the steps over which the noise amplitude rises."""
    loss_margin: float
    """Nats per label component (energy, force and stress components) by which the loss may end above its start."""
    temperature_range: tuple[float, float]
    """Range, in units of T, that the kinetic temperature of the last quarter must keep."""
    cycles: int = 1
    """Cosines in an update; only its end is a sample."""
    settling: float | None = None
    """Part of the steps that still follows once the new labels are learnt; None: every update makes all steps."""


@dataclass(frozen=True)
class UpdateReport:
    """What happened; one number per chain where a tuple is."""

    steps: int
    """Steps made; fewer than asked when the new labels were learnt early, or the weights were not finite."""
    loss_first: tuple[float, ...]
    """Mean negative log-likelihood per label over the first twentieth of the steps."""
    loss_last: tuple[float, ...]
    """The same over the last quarter of the steps made."""
    kinetic_temperature: tuple[float, ...]
    """Mean over the last quarter of the schedule; T for a chain in equilibrium, 0 at T = 0."""
    max_change: tuple[float, ...]
    """Largest change of a weight, in its prior sd."""
    rms_change: tuple[float, ...]
    """Root mean square change of the weights, in their prior sd."""
    finite: bool
    diverged: bool
    """True: throw the new weights away."""
    reason: str
    """Why it counts as diverged; empty otherwise."""


def chain_generators(seed: int, device: torch.device | str) -> tuple[torch.Generator, torch.Generator]:
    """Two independent streams of one chain: minibatches (always drawn on the CPU) and noise (on `device`)."""
    batch, noise = (int(s) for s in np.random.SeedSequence(seed).generate_state(2, np.uint64) >> np.uint64(1))
    return torch.Generator("cpu").manual_seed(batch), torch.Generator(device).manual_seed(noise)


def update_chains(
    theta: Tensor,
    prior: GaussianPrior,
    forward: Forward,
    n_labels: int,
    newest: Sequence[int],
    components: int,
    settings: UpdateSettings,
    seeds: Sequence[int],
    progress: Progress | None = None,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, UpdateReport]:
    """New samples of all chains after new labels.

    Args:
        theta: (M, D) current samples, not changed.   prior: of the D weights, common or one centre per chain.
        forward: the likelihood, see `posterior.Forward`.
        n_labels: N.   newest: indices of the labels that are new.   components: numbers in one label (1 + 3A, + 6 with a stress).
        seeds: M non-negative integers, one per chain; a chain depends on its own seed and the number of steps alone.
        progress: called after each step.   label_weights: (M, N) on the host, see `minibatch.own_weights`; None: 1.
    Returns: (M, D) new samples (whatever they are) and the report; a diverged update must be thrown away by the caller.
    Raises: BnnError when theta and seeds differ in M, or an early end is wanted of a `forward` that does not know its residuals.
    """
    if len(seeds) != len(theta):
        raise BnnError(f"expected one seed per chain ({len(theta)}), but got {len(seeds)}")
    posterior = MinibatchPosterior(forward, prior, n_labels)
    streams = [chain_generators(seed, theta.device) for seed in seeds]
    batch_streams, noise_streams = [s[0] for s in streams], [s[1] for s in streams]
    state, course, watch = sghmc.init(theta), schedule.Course(settings.steps), _watch(forward, n_labels, newest, settings)
    losses = torch.full((settings.steps, len(theta)), torch.nan, dtype=torch.float64, device=theta.device)
    temperatures: list[Tensor] = []
    while state.count < course.length:
        k, place = state.count, course.place(state.count)
        index, weight = minibatch.draw_chains(n_labels, settings.batch_size, newest, batch_streams)
        if label_weights is not None:
            weight = weight * torch.gather(label_weights, 1, index)
        gradient, loss = posterior.gradient(state.theta, index, weight.to(theta.dtype))
        losses[k] = loss
        gamma = schedule.cosine(place, settings.steps, settings.step_size, settings.cycles)
        heat = schedule.temperature(place, settings.steps, settings.noiseless_fraction, settings.ramp_fraction)
        state = sghmc.step_(
            state,
            gradient,
            step_size=gamma,
            temperature=heat * settings.temperature,
            n_labels=n_labels,
            settings=settings.sampler,
            generators=noise_streams,
        )
        if 4 * place >= 3 * settings.steps and (k % _TEMPERATURE_EVERY == 0 or course.left_at is not None):
            temperatures.append(sghmc.kinetic_temperature(state, step_size=gamma, n_labels=n_labels, settings=settings.sampler))
        if progress is not None:
            progress(k, loss)
        if (k + 1) % _CHECK_EVERY == 0 and not bool(torch.isfinite(state.theta).all()):
            break
        if watch is not None and course.left_at is None and watch.learnt(state.count, state.theta):
            course = course.settle(state.count, min(_settling(settings), settings.steps - state.count))
    return state.theta, _report(theta, state, losses[: state.count], temperatures, prior, components, settings)


def _settling(settings: UpdateSettings) -> int:
    """Steps that follow once the new labels are learnt."""
    return max(1, round((settings.settling or 0.0) * settings.steps))


def _watch(forward: Forward, n_labels: int, newest: Sequence[int], settings: UpdateSettings) -> learnt.Watch | None:
    """What looks whether the new labels are learnt, or None when every update makes all steps.  Raises: BnnError."""
    if settings.settling is None:
        return None
    if not isinstance(forward, learnt.Residuals):
        raise BnnError(
            f"an update that may end early needs a likelihood with `squared_residuals`, but {type(forward).__name__} has none"
        )
    begin = (settings.noiseless_fraction + settings.ramp_fraction) * settings.steps
    old = learnt.compared(n_labels, newest, settings.batch_size)
    return learnt.Watch(forward, newest, old, begin, max(1, settings.steps // learnt.TESTS))


def _report(
    start: Tensor,
    state: sghmc.SghmcState,
    losses: Tensor,
    temperatures: list[Tensor],
    prior: GaussianPrior,
    components: int,
    settings: UpdateSettings,
) -> UpdateReport:
    """Judgement of an update.  Args: losses: (steps made, M).   temperatures: of the last quarter, each (M,)."""
    change = (state.theta - start) / prior.sd
    first = losses[: max(1, settings.steps // 20)].mean(0)
    last = losses[3 * len(losses) // 4 :].mean(0)
    kinetic = torch.stack(temperatures).mean(0) if temperatures else torch.zeros(len(start))
    finite = bool(torch.isfinite(state.theta).all()) and bool(torch.isfinite(losses).all())
    reason = _reason(finite, (last - first) / components, kinetic, settings)
    return UpdateReport(
        steps=state.count,
        loss_first=tuple(first.tolist()),
        loss_last=tuple(last.tolist()),
        kinetic_temperature=tuple(kinetic.tolist()),
        max_change=tuple(change.abs().amax(-1).tolist()),
        rms_change=tuple(change.square().mean(-1).sqrt().tolist()),
        finite=finite,
        diverged=bool(reason),
        reason=reason,
    )


def _reason(finite: bool, rise: Tensor, kinetic: Tensor, settings: UpdateSettings) -> str:
    """Why the update counts as diverged, naming the worst chain; empty when it does not.  Args: rise, kinetic: (M,)."""
    if not finite:
        return "weights or losses are not finite"
    if float(rise.max()) > settings.loss_margin:
        chain = int(rise.argmax())
        limit = settings.loss_margin
        return f"the loss of chain {chain} ended {float(rise[chain]):.3g} nats per component above its start (limit {limit})"
    if settings.temperature == 0:
        return ""
    low, high = settings.temperature_range
    relative = kinetic / settings.temperature
    for chain, value in enumerate(relative.tolist()):
        if not low <= value <= high:
            return f"the kinetic temperature of chain {chain} was {value:.3g} in the last quarter (allowed {low} to {high})"
    return ""
