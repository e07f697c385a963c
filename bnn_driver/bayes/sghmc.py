"""Stochastic-gradient Hamiltonian Monte Carlo with the AMSGrad mass, on flat weights of M independent chains.

With g the estimate of ∇U/N, friction α, step size γ, N labels, temperature T and ξ ~ N(0, 1):

    v ← β v + (1-β) g²        s ← max(s, v)        A = 1 / (sqrt(s / (1-β^t)) + ε)
    p ← (1-α) p - α g + α sqrt(2T / (γ A N)) ξ
    θ ← θ + γ A p

Chen, Fox, Guestrin 2014 (arXiv:1402.4102) eq. 15 with learning rate η = αγA/N on U; mass as in Rensmeyer et al.,
DOI 10.1039/d5dd00392j.  For U = hθ²/2 and a fixed A the stationary law is known in closed form (κ = ηh):
Var θ = (T/h) / (1 - κ/(4-2α)) and (1-α/2) γAN/α · Var p = T / (1 - κ/(4-2α)): the weights have the right variance at any
friction as κ → 0, the momenta are hotter than a leading-order reading by 1/(1-α/2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnn_driver.errors import BnnError


@dataclass(frozen=True)
class SghmcSettings:
    """Constants of the sampler."""

    friction: float
    """α, 0 < α < 1."""
    beta: float
    """β, memory of the squared gradient."""
    eps: float
    """ε, floor of the root of the squared gradient."""


@dataclass(frozen=True, eq=False)
class SghmcState:
    """M chains of D weights; `step_` writes into the tensors and returns the state with the new counts."""

    theta: Tensor
    """(M, D) weights."""
    momentum: Tensor
    """(M, D) p."""
    second: Tensor
    """(M, D) v, running mean of g²."""
    second_max: Tensor
    """(M, D) s, its largest value so far."""
    count: int = 0
    """Steps made."""
    mass_count: int = 0
    """t: steps in which the mass was adapted."""


def init(theta: Tensor) -> SghmcState:
    """Chains at rest with a mass that knows nothing yet.  Args: theta: (M, D), copied."""
    if theta.ndim != 2:
        raise BnnError(f"the sampler expects flat weights of shape (M, D), but got {tuple(theta.shape)}")
    start = theta.detach().clone(memory_format=torch.contiguous_format)
    return SghmcState(start, torch.zeros_like(start), torch.zeros_like(start), torch.zeros_like(start))


def mass(state: SghmcState, settings: SghmcSettings) -> Tensor:
    """1/A = sqrt(s / (1-β^t)) + ε.  Returns: (M, D)."""
    if state.mass_count == 0:
        return torch.full_like(state.second_max, settings.eps)
    return state.second_max.div(1.0 - settings.beta**state.mass_count).sqrt_().add_(settings.eps)


def step_(
    state: SghmcState,
    gradient: Tensor,
    *,
    step_size: float,
    temperature: float,
    n_labels: int,
    settings: SghmcSettings,
    generators: Sequence[torch.Generator],
    adapt_mass: bool = True,
) -> SghmcState:
    """One step of all chains, in place: the tensors of `state` are overwritten.

    Args:
        state: the chains.   gradient: (M, D) estimate of ∇U/N.   step_size: γ > 0.   temperature: T >= 0; 0 draws no noise.
        n_labels: N.   generators: M, one per chain on its device; a chain depends on its own generator alone.
        adapt_mass: False keeps v, s and t as they are.
    Returns: the state with the counts moved on (same tensors).    Raises: BnnError when γ is not positive or M differs.
    """
    if step_size <= 0:
        raise BnnError(f"the step size of the sampler must be positive, but got {step_size}")
    if len(generators) != len(state.theta):
        raise BnnError(f"expected one generator per chain ({len(state.theta)}), but got {len(generators)}")
    if adapt_mass:
        state.second.mul_(settings.beta).addcmul_(gradient, gradient, value=1.0 - settings.beta)
        torch.maximum(state.second_max, state.second, out=state.second_max)
        state = replace(state, mass_count=state.mass_count + 1)
    weight_mass = mass(state, settings)
    state.momentum.mul_(1.0 - settings.friction).add_(gradient, alpha=-settings.friction)
    if temperature > 0:
        amplitude = settings.friction * math.sqrt(2.0 * temperature / (step_size * n_labels))
        state.momentum.addcmul_(noise_like(state.theta, generators), weight_mass.sqrt(), value=amplitude)
    state.theta.addcdiv_(state.momentum, weight_mass, value=step_size)
    return replace(state, count=state.count + 1)


def step(
    state: SghmcState,
    gradient: Tensor,
    *,
    step_size: float,
    temperature: float,
    n_labels: int,
    settings: SghmcSettings,
    generators: Sequence[torch.Generator],
    adapt_mass: bool = True,
) -> SghmcState:
    """The same step on copies: the tensors of `state` stay as they are (the generators move on).  Arguments as in `step_`."""
    tensors = {name: getattr(state, name).clone() for name in ("theta", "momentum", "second", "second_max")}
    return step_(
        replace(state, **tensors),
        gradient,
        step_size=step_size,
        temperature=temperature,
        n_labels=n_labels,
        settings=settings,
        generators=generators,
        adapt_mass=adapt_mass,
    )


def noise_like(theta: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers, row m from generator m alone.  Args: theta: (M, D), gives shape, dtype, device."""
    noise = torch.empty_like(theta)
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise


def kinetic_temperature(state: SghmcState, *, step_size: float, n_labels: int, settings: SghmcSettings) -> Tensor:
    """T_kin = mean_d (1-α/2) p² γ A N / α, which is T for the stationary law of a slow weight (κ → 0).

    Gradient noise of the minibatch heats it, a systematic drift too.

    Args: state: after a step with `step_size`.   n_labels: N.   Returns: (M,).
    """
    alpha = settings.friction
    factor = (1.0 - alpha / 2.0) * step_size * n_labels / alpha
    return factor * (state.momentum**2 / mass(state, settings)).mean(-1)
