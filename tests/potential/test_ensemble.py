"""Laws of the evaluator, on the toy potential."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from random_models import crystals, members, molecules

from bnn_driver.errors import ModelError
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.toy import ToyPotential
from bnn_driver.records import Frames


@pytest.fixture
def toy() -> ToyPotential:
    return ToyPotential([1, 6, 8], cutoff=3.5)


def ensemble(toy: ToyPotential, chunk: int = 2, skin: float = 0.0, count: int = 5) -> Ensemble:
    return Ensemble(toy, members(toy.weights, count), 3, None, chunk, skin)


def test_chunks_do_not_matter(toy: ToyPotential) -> None:
    a, b = ensemble(toy, chunk=1).predict(molecules()), ensemble(toy, chunk=5).predict(molecules())
    assert a.generation == 3
    assert a.energy.shape == (5, 3)
    assert np.abs(a.forces - b.forces).max() < 1e-13
    assert np.abs(a.energy - b.energy).max() < 1e-13


@pytest.mark.parametrize("frames", [molecules(1), crystals(1)], ids=["molecule", "cell"])
def test_a_kept_list_gives_what_a_new_list_gives(toy: ToyPotential, frames: Frames) -> None:
    kept, fresh = ensemble(toy, skin=0.8), ensemble(toy)
    rng = np.random.default_rng(0)
    positions = frames.positions.copy()
    lists = set()
    for _ in range(12):
        positions = positions + 0.06 * rng.standard_normal(positions.shape)
        now = Frames(frames.numbers, positions, frames.cell)
        a, b = kept.predict(now), fresh.predict(now)
        lists.add(id(kept._listed))
        assert np.abs(a.forces - b.forces).max() < 1e-12
        assert np.abs(a.virial - b.virial).max() < 1e-12
    assert 1 < len(lists) < 12


def test_a_changed_cell_is_noticed(toy: ToyPotential) -> None:
    frames = crystals(1)
    assert frames.cell is not None
    kept = ensemble(toy, skin=0.8)
    kept.predict(frames)
    squeezed = Frames(frames.numbers, frames.positions, frames.cell * 0.97)
    assert np.abs(kept.predict(squeezed).forces - ensemble(toy).predict(squeezed).forces).max() < 1e-12


def test_swap_replaces_all_members(toy: ToyPotential) -> None:
    e = ensemble(toy)
    before = e.predict(molecules())
    e.swap(members(toy.weights, 3, seed=9), 4)
    after = e.predict(molecules())
    assert (after.generation, after.members) == (4, 3)
    assert not np.allclose(before.energy[:3], after.energy)


def test_the_noise_head_sees_features_and_its_own_weights(toy: ToyPotential) -> None:
    def noise(features: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        assert features.shape[-1] == toy.n_features
        assert set(weights) == {"noise.b"}
        m, b, a, _ = features.shape
        return torch.ones(m, b) * weights["noise.b"], weights["noise.b"].view(m, 1, 1).expand(m, b, a)

    weights = {**members(toy.weights, 3), "noise.b": torch.tensor([[1.0], [2.0], [3.0]])}
    p = Ensemble(toy, weights, 0, noise, 2, 0.0).predict(molecules())
    assert p.energy_noise_sd[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert p.force_noise_sd.shape == (3, 3, 5)


def test_weights_of_another_potential_and_unknown_elements_are_refused(toy: ToyPotential) -> None:
    weights = members(toy.weights, 2)
    with pytest.raises(ModelError, match="do not fit"):
        Ensemble(toy, {"other": torch.zeros(2, 1)}, 0, None, 1, 0.0)
    name = next(iter(weights))
    with pytest.raises(ModelError, match="has shape"):
        Ensemble(toy, {**weights, name: weights[name][:, :-1]}, 0, None, 1, 0.0)
    odd = Frames(np.array([1, 79]), np.array([[[0, 0, 0], [0, 0, 1.5]]]))
    with pytest.raises(ModelError, match="79"):
        ensemble(toy).predict(odd)


def test_one_member_is_enough(toy: ToyPotential) -> None:
    assert ensemble(toy, count=1).predict(molecules()).mean_forces.shape == (3, 5, 3)
