"""The sampler has the stationary law it claims: exactly, by its linear recursion, and by sampling."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from bnn_driver.bayes import sghmc
from bnn_driver.errors import BnnError

N = 12
GAMMA = 0.3
MASS_SQUARED = torch.tensor([4.0, 0.25, 1.0], dtype=torch.float64)
PRECISION = torch.tensor([[9.0, 3.0, 0.0], [3.0, 5.0, -1.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
SETTINGS = sghmc.SghmcSettings(friction=0.1, beta=0.999, eps=1e-4)


def _state(theta: torch.Tensor, momentum: torch.Tensor) -> sghmc.SghmcState:
    """Chains with a mass frozen at sqrt(MASS_SQUARED) + eps."""
    t = 7
    second_max = (MASS_SQUARED * (1 - SETTINGS.beta**t)).expand_as(theta).clone()
    return sghmc.SghmcState(theta, momentum, torch.zeros_like(theta), second_max, mass_count=t)


def _move(state: sghmc.SghmcState, temperature: float, generators: list[torch.Generator]) -> sghmc.SghmcState:
    return sghmc.step(
        state,
        state.theta @ PRECISION / N,
        step_size=GAMMA,
        temperature=temperature,
        n_labels=N,
        settings=SETTINGS,
        generators=generators,
        adapt_mass=False,
    )


def _recursion() -> tuple[np.ndarray, np.ndarray]:
    """Drift F and noise covariance Q of z' = F z + noise, z = (θ, p), read off from the sampler itself."""
    basis = torch.eye(6, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    moved = _move(_state(basis[:, :3].clone(), basis[:, 3:].clone()), 0.0, generators)
    drift = torch.cat([moved.theta, moved.momentum], 1).T.numpy()
    zero = torch.zeros(1, 3, dtype=torch.float64)
    kick = _move(_state(zero, zero), 1.0, [torch.Generator().manual_seed(0)])
    xi = torch.empty(3, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(0))
    response = torch.cat([kick.theta[0] / xi, kick.momentum[0] / xi]).numpy()  # noise is diagonal
    factor = np.concatenate([np.diag(response[:3]), np.diag(response[3:])])
    return drift, factor @ factor.T


def test_one_frozen_weight_has_the_stationary_law_of_the_docstring() -> None:
    """Closed form of the module's docstring against the Lyapunov equation of the sampler's own recursion."""
    h, alpha = 9.0, SETTINGS.friction
    drift, noise = _recursion()
    pick = np.ix_([0, 3], [0, 3])
    f = drift[pick].copy()
    inverse_mass = 1.0 / (2.0 + SETTINGS.eps)
    kappa = alpha * GAMMA * inverse_mass * h / N
    stationary = scipy.linalg.solve_discrete_lyapunov(f, noise[pick])
    hot = 1.0 / (1.0 - kappa / (4 - 2 * alpha))
    assert stationary[0, 0] == pytest.approx(hot / h, rel=1e-10)
    kinetic = (1 - alpha / 2) * GAMMA * inverse_mass * N / alpha * stationary[1, 1]
    assert kinetic == pytest.approx(hot, rel=1e-10)


def test_the_stationary_covariance_is_the_posterior_as_the_step_vanishes() -> None:
    """At this step size the recursion's exact covariance is off by O(κ): 0.23 % of the largest element."""
    drift, noise = _recursion()
    stationary = scipy.linalg.solve_discrete_lyapunov(drift, noise)[:3, :3]
    exact = np.linalg.inv(PRECISION.numpy())
    assert np.abs(stationary - exact).max() < 0.003 * np.abs(exact).max()


def test_sampling_with_frozen_mass_matches_the_exact_covariance() -> None:
    """6000 chains after 600 steps: all 21 second moments and 6 means within 4.5 of their Monte Carlo error."""
    chains = 6000
    drift, noise = _recursion()
    stationary = scipy.linalg.solve_discrete_lyapunov(drift, noise)
    assert np.abs(np.linalg.eigvals(drift)).max() ** 600 < 1e-3  # the start is forgotten
    generators = [torch.Generator().manual_seed(11)]  # one long row of noise serves all chains of this test
    state = _state(torch.zeros(chains, 3, dtype=torch.float64), torch.zeros(chains, 3, dtype=torch.float64))
    for _ in range(600):
        gradient = (state.theta @ PRECISION / N).reshape(1, -1)
        flat = sghmc.SghmcState(
            *(getattr(state, name).reshape(1, -1) for name in ("theta", "momentum", "second", "second_max")),
            mass_count=state.mass_count,
        )
        sghmc.step_(
            flat,
            gradient,
            step_size=GAMMA,
            temperature=1.0,
            n_labels=N,
            settings=SETTINGS,
            generators=generators,
            adapt_mass=False,
        )
    z = torch.cat([state.theta, state.momentum], 1).numpy()
    sd = np.sqrt(np.diag(stationary))
    mean_error = z.mean(0) / (sd / np.sqrt(chains))
    spread = np.sqrt((np.outer(sd**2, sd**2) + stationary**2) / chains)
    covariance_error = (z.T @ z / chains - stationary) / spread
    kinetic = sghmc.kinetic_temperature(state, step_size=GAMMA, n_labels=N, settings=SETTINGS)
    print(
        f"mean {np.abs(mean_error).max():.2f}, covariance {np.abs(covariance_error).max():.2f} Monte Carlo errors; T {kinetic.mean():.4f}"
    )
    assert np.abs(mean_error).max() < 4.5
    assert np.abs(covariance_error).max() < 4.5
    assert float(kinetic.mean()) == pytest.approx(1.0, abs=0.05)  # 18,000 squares: error 0.011; O(κ) above 1


def test_gradient_noise_shows_as_heat() -> None:
    """A gradient that is pure noise of variance V gives T_kin = T + γAN V/2: 1 + 2 here, 40,000 weights scatter by 0.02."""
    d, gamma, variance = 40_000, 0.1, 4.0
    generator = torch.Generator().manual_seed(3)
    second_max = torch.full((1, d), (0.3 - SETTINGS.eps) ** 2 * (1 - SETTINGS.beta), dtype=torch.float64)  # 1/A = 0.3
    zero = torch.zeros(1, d, dtype=torch.float64)
    state = sghmc.SghmcState(zero.clone(), zero.clone(), zero.clone(), second_max, mass_count=1)
    for _ in range(80):
        gradient = variance**0.5 * torch.randn(1, d, dtype=torch.float64, generator=generator)
        arguments = {"step_size": gamma, "temperature": 1.0, "n_labels": 3, "settings": SETTINGS, "generators": [generator]}
        state = sghmc.step_(state, gradient, adapt_mass=False, **arguments)
    kinetic = sghmc.kinetic_temperature(state, step_size=gamma, n_labels=3, settings=SETTINGS)
    assert float(kinetic) == pytest.approx(1.0 + gamma / 0.3 * 3 * variance / 2, abs=0.1)


def test_the_pure_step_leaves_its_state_alone_and_equals_the_one_in_place() -> None:
    start = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = sghmc.init(start)
    pure = sghmc.step(state, start, **_arguments())
    assert torch.equal(state.theta, start)
    assert torch.count_nonzero(state.second_max) == 0
    in_place = sghmc.step_(state, start.clone(), **_arguments())
    assert in_place.theta is state.theta
    assert torch.equal(pure.theta, in_place.theta)
    assert (pure.count, pure.mass_count) == (in_place.count, in_place.mass_count) == (1, 1)


def _arguments() -> dict:
    generators = [torch.Generator().manual_seed(i) for i in (4, 5)]
    return {"step_size": 1e-3, "temperature": 1.0, "n_labels": 5, "settings": SETTINGS, "generators": generators}


def test_two_steps_follow_the_published_formulas() -> None:
    """Numbers by a plain transcription for one weight, with the noise replayed."""
    alpha, beta, eps, gamma, n = 0.1, 0.999, 1e-4, 1e-3, 5
    theta, p, v, s = 0.7, 0.0, 0.0, 0.0
    noise = torch.Generator().manual_seed(9)
    for t, g in ((1, 2.0), (2, -0.5)):
        v = beta * v + (1 - beta) * g * g
        s = max(s, v)
        a = 1 / (np.sqrt(s / (1 - beta**t)) + eps)
        xi = float(torch.empty(1, dtype=torch.float64).normal_(generator=noise))
        p = (1 - alpha) * p - alpha * g + alpha * xi * np.sqrt(2 / (gamma * a * n))
        theta += gamma * a * p
    state = sghmc.init(torch.tensor([[0.7]], dtype=torch.float64))
    own = [torch.Generator().manual_seed(9)]
    for g in (2.0, -0.5):
        gradient = torch.tensor([[g]], dtype=torch.float64)
        state = sghmc.step_(state, gradient, step_size=gamma, temperature=1.0, n_labels=n, settings=SETTINGS, generators=own)
    assert float(state.theta) == pytest.approx(theta, rel=1e-13)
    assert float(state.momentum) == pytest.approx(p, rel=1e-12)


def test_a_chain_does_not_depend_on_its_neighbours() -> None:
    theta = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    together, alone = sghmc.init(theta), sghmc.init(theta[3:4])
    many, one = [torch.Generator().manual_seed(i) for i in range(5)], [torch.Generator().manual_seed(3)]
    for _ in range(3):
        common = {"step_size": 1e-2, "temperature": 1.0, "n_labels": 3, "settings": SETTINGS}
        together = sghmc.step_(together, together.theta * 0.2, generators=many, **common)
        alone = sghmc.step_(alone, alone.theta * 0.2, generators=one, **common)
    assert torch.equal(together.theta[3], alone.theta[0])


def test_a_step_size_of_zero_and_a_missing_generator_are_refused() -> None:
    state = sghmc.init(torch.zeros(2, 3))
    with pytest.raises(BnnError, match="must be positive"):
        sghmc.step_(state, torch.zeros(2, 3), **{**_arguments(), "step_size": 0.0})
    with pytest.raises(BnnError, match="one generator per chain"):
        sghmc.step_(state, torch.zeros(2, 3), **{**_arguments(), "generators": []})
