"""MACE's code with cuEquivariance's operators is MACE, or is not used."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from random_models import VARIANTS, crystals, members, molecules, random_mace

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph
from bnn_driver.potential.stacked import StackedPotential

pytestmark = pytest.mark.filterwarnings("ignore")
MISSING = importlib.util.find_spec("cuequivariance_torch") is None


@pytest.mark.skipif(not MISSING, reason="cuequivariance-torch is installed")
def test_without_the_package_the_fast_path_is_taken(caplog: Any) -> None:
    potential = make_potential(random_mace(), [1, 6, 8], torch.float64, "cpu", path="cueq")
    assert isinstance(potential, StackedPotential)
    assert "bnn-driver[cueq]" in caplog.text


@pytest.mark.skipif(MISSING, reason="needs cuequivariance-torch")
@pytest.mark.parametrize("variant", ["residual", "one layer"])
def test_all_quantities_equal_those_of_the_plain_modules(variant: str) -> None:
    module = random_mace(**VARIANTS[variant])
    plain = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="modules")
    fast = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="cueq")
    assert "cuEquivariance" in fast.path
    weights = members(plain.weights, 2)
    for frames in (molecules(2), crystals(2)):
        graph = build_graph(frames, plain.cutoff, torch.float64, torch.device("cpu"))
        a, b = fast.evaluate(weights, graph), plain.evaluate(weights, graph)
        for name in ("energy", "forces", "virial", "features"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x - y).abs().max() <= 1e-6 * max(1.0, float(y.abs().max())), name
