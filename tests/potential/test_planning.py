"""Members and frames are split so that they fit, and as is fastest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_models import crystals, members

from bnn_driver.potential import ensemble as evaluator
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.planning import CACHE, COPIES, STREAMED, Plan, free_memory, keep_freed_memory, plan
from bnn_driver.potential.toy import ToyPotential

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MUCH = 2**40


def test_small_work_goes_together_and_large_work_member_by_member() -> None:
    assert plan(8, 1, CACHE // 8, CPU, MUCH) == Plan(8, 1)
    assert plan(8, 1, CACHE // 3, CPU, MUCH) == Plan(3, 1)
    assert plan(8, 32, CACHE // 8, CPU, MUCH) == Plan(1, 32)
    assert plan(8, 1, 10 * CACHE, CPU, MUCH) == Plan(1, 1)
    assert plan(8, 32, CACHE, GPU, MUCH) == Plan(8, 32)
    assert plan(8, 1, STREAMED // 8, CPU, MUCH, STREAMED) == Plan(8, 1)
    assert plan(8, 1, STREAMED // 4, CPU, MUCH, STREAMED) == Plan(4, 1)
    assert plan(8, 1, STREAMED // 7, CPU, MUCH, STREAMED) == Plan(4, 1)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_does_not_fit_is_split_first_by_members_then_by_frames(device: torch.device) -> None:
    size = 100 * CACHE
    assert plan(8, 4, size, device, 8 * COPIES * size).members == 2 if device is GPU else 1
    assert plan(8, 4, size, device, 4 * COPIES * size) == Plan(1, 4)
    assert plan(8, 4, size, device, 3 * COPIES * size) == Plan(1, 2)
    assert plan(8, 4, size, device, 0) == Plan(1, 1)


def test_split_frames_and_members_give_the_same_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ToyPotential([1, 6, 8], cutoff=3.5)
    frames, weights = crystals(5), members(toy.weights, 4)
    whole = Ensemble(toy, weights, 0, None).predict(frames)
    for split in (Plan(1, 1), Plan(3, 2), Plan(4, 4)):
        monkeypatch.setattr(evaluator, "plan", lambda *args, split=split, **_: split)
        parts = Ensemble(toy, weights, 0, None).predict(frames)
        assert parts.energy.shape == whole.energy.shape == (4, 5)
        assert np.abs(parts.energy - whole.energy).max() < 1e-12
        assert np.abs(parts.forces - whole.forces).max() < 1e-12
        assert np.abs(parts.virial - whole.virial).max() < 1e-12


def test_memory_is_kept_where_the_c_library_can() -> None:
    keep_freed_memory()  # False on systems without glibc, never an error
    assert torch.ones(10**6).sum() == 10**6


def test_free_memory_is_what_this_machine_can_give() -> None:
    assert 10 * 2**20 < free_memory(CPU) < 2**45
