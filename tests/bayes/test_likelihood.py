"""The likelihood is the plain sum of Gaussian log densities, and the noise head starts where it is said to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel, Targets, hidden_widths, log_likelihood
from bnn_driver.errors import ConfigError

M, B, A, F = 2, 3, 4, 5
HEAD = NoiseHead(F, (4, 3))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _case() -> tuple[torch.Tensor, ...]:
    energy, forces, stress = _random(M, B), _random(M, B, A, 3), _random(M, B, 3, 3)
    return energy, forces, 0.5 * (stress + stress.mT), _random(M, B).exp(), _random(M, B, A).exp()


def _labels(has_stress: list[bool]) -> Targets:
    stress = _random(B, 3, 3, seed=5)
    return Targets(_random(B, seed=5), _random(B, A, 3, seed=5), 0.5 * (stress + stress.mT), torch.tensor(has_stress))


def test_it_is_the_sum_over_energy_forces_and_six_stress_components() -> None:
    energy, forces, stress, energy_sd, force_sd = _case()
    labels = _labels([True, False, True])
    result = log_likelihood(energy, forces, stress, labels, energy_sd, force_sd, 0.3)
    for m in range(M):
        for b in range(B):
            expected = stats.norm.logpdf(labels.energy[b], energy[m, b], energy_sd[m, b])
            for i in range(A):
                expected += stats.norm.logpdf(labels.forces[b, i], forces[m, b, i], force_sd[m, b, i]).sum()
            if labels.has_stress[b]:
                rows, columns = np.triu_indices(3)
                expected += stats.norm.logpdf(
                    labels.stress[b].numpy()[rows, columns], stress[m, b].numpy()[rows, columns], 0.3
                ).sum()
            assert float(result[m, b]) == pytest.approx(float(expected), rel=1e-12)


def test_a_minibatch_per_member_equals_the_frames_one_by_one() -> None:
    energy, forces, stress, energy_sd, force_sd = _case()
    labels, index = _labels([True, True, False]), torch.tensor([[2, 0], [1, 1]])
    rows = torch.arange(M).unsqueeze(1)
    full = log_likelihood(energy, forces, stress, labels, energy_sd, force_sd, 0.3)
    part = log_likelihood(
        energy[rows, index],
        forces[rows, index],
        stress[rows, index],
        labels.take(index),
        energy_sd[rows, index],
        force_sd[rows, index],
        0.3,
    )
    assert torch.allclose(part, full[rows, index], rtol=1e-13)


def test_a_stress_label_needs_a_predicted_stress() -> None:
    energy, forces, _, energy_sd, force_sd = _case()
    with pytest.raises(ConfigError, match="the prediction has none"):
        log_likelihood(energy, forces, None, _labels([True] * 3), energy_sd, force_sd, 0.3)


def test_the_noise_head_starts_at_the_base_noise() -> None:
    model = NoiseModel(0.002, 0.004, 0.001, HEAD)
    weights = {name: w.expand(M, *w.shape) for name, w in HEAD.init().items()}
    energy_sd, force_sd = model(_random(M, B, A, F), weights)
    assert torch.equal(energy_sd, torch.full((M, B), 0.002, dtype=torch.float64))
    assert torch.equal(force_sd, torch.full((M, B, A), 0.004, dtype=torch.float64))


def test_the_noise_head_is_the_perceptron_of_each_member() -> None:
    weights = {name: _random(M, *shape, seed=k) for k, (name, shape) in enumerate(HEAD.shapes.items())}
    features = _random(M, B, A, F)
    _, result = NoiseModel(0.002, 0.01, 0.001, HEAD)(features, weights)
    for m in range(M):
        x = features[m]
        for k in range(3):
            x = x @ weights[f"noise.w{k}"][m] + weights[f"noise.b{k}"][m]
            x = torch.nn.functional.silu(x) if k < 2 else x
        assert torch.allclose(result[m], 0.01 * x[..., 0].exp(), rtol=1e-12)


def test_energy_noise_is_predicted_from_the_mean_over_atoms() -> None:
    head = NoiseHead(F, (4, 3), ("energy", "forces"))
    weights = {name: _random(M, *shape, seed=k) for k, (name, shape) in enumerate(head.shapes.items())}
    features = _random(M, B, A, F)
    energy_sd, force_sd = NoiseModel(0.002, 0.01, 0.001, head)(features, weights)
    raw = head.log_factors(weights, features)
    assert torch.allclose(energy_sd, 0.002 * raw[..., 0].mean(-1).exp(), rtol=1e-12)
    assert torch.allclose(force_sd, 0.01 * raw[..., 1].exp(), rtol=1e-12)


def test_without_predicted_noise_there_is_no_head_and_the_noise_is_fixed() -> None:
    head = NoiseHead(F, (4, 3), ())
    assert head.shapes == head.init() == {}
    energy_sd, force_sd = NoiseModel(0.002, 0.01, 0.001, head)(_random(M, B, A, F), {})
    assert energy_sd.unique().tolist() == [0.002]
    assert force_sd.unique().tolist() == [0.01]


def test_widths_are_the_published_ones() -> None:
    assert (hidden_widths(256), hidden_widths(64)) == ((64, 16), (32, 16))
    assert NoiseHead(256, (64, 16)).shapes["noise.w2"] == (16, 1)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="expects 5 features per atom, but the potential gave 6"):
        HEAD.log_factors(HEAD.init(), _random(M, B, A, 6))
