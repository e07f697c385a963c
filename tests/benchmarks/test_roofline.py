"""Counts against closed forms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
import roofline
from ensemble_inference import work_of

from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.params import repeat_weights


def test_linear_layer_with_its_derivative() -> None:
    """y = x W, then its sum's derivative with respect to W: two products, and a pass over a few arrays."""
    n, rows, columns = 7, 11, 13
    x, w = torch.rand(n, rows, dtype=torch.float64), torch.rand(rows, columns, dtype=torch.float64, requires_grad=True)

    def job() -> None:
        torch.autograd.grad((x @ w).square().sum(), w)

    work = roofline.counted(job, least=8.0 * (n * rows + 2 * rows * columns))
    assert work.products == 2 * 2 * n * rows * columns
    assert n * columns <= work.rest <= 8 * n * columns  # square, sum, and the derivative of the square
    assert work.most > work.least > 0


def test_views_and_allocations_are_free() -> None:
    x = torch.rand(8, 6)
    work = roofline.counted(lambda: x.T.reshape(2, 3, 8).transpose(0, 1).detach()[0])
    assert (work.products, work.rest, work.most) == (0, 0, 0)
    work = roofline.counted(lambda: x + x)
    assert (work.rest, work.most) == (48, 3 * 48 * 4)


def test_roofline_is_the_slower_of_the_two() -> None:
    peak = roofline.Peak(1e9, 1e9, "made up")
    assert roofline.Work(1e9, 1e9, 0.0, 1e9).seconds(peak) == 2
    work = roofline.Work(1e9, 0.0, 0.0, 4e9)
    assert work.seconds(peak) == 4
    assert work.columns(8000.0, peak)["of_roofline"] == pytest.approx(0.5)
    assert work.columns(8000.0, None)["of_roofline"] is None


def test_peak_of_this_processor_is_plausible() -> None:
    peak = roofline.measured_peak(torch.float32, n=256, megabytes=8)
    assert 1e8 < peak.flops < 1e13
    assert 1e8 < peak.bandwidth < 1e13


def test_an_evaluation_has_at_least_the_products_of_its_radial_networks() -> None:
    """Per member and bond, value and slope: 2 x 2 x (b·64 + 64·64 + 64·64 + 64·paths·C) forward and none backward."""
    atoms = measure.SYSTEMS["ethanol"]()
    potential = measure.our_potential(measure.random_model("small", [1, 6, 8], torch.float64), atoms.numbers)
    ensemble = Ensemble(potential, repeat_weights(potential.weights, 2), 0, None)
    frames = measure.distorted(atoms, 1)
    work = work_of(ensemble, frames)
    bonds = ensemble._graph(frames).half.shape[-1]
    layers = potential.tables.layers
    radial = sum(2 * 2 * bonds * (8 * 64 + 2 * 64 * 64 + 64 * len(layer.paths) * layer.channels) for layer in layers)
    assert 2 * radial < work.products < 10 * 2 * radial
    assert work.least > roofline.nbytes(ensemble._network.values())
    assert work.most > work.least
