"""Compiled functions are used when they agree with the plain ones, and only then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_models import members, molecules, random_mace

from bnn_driver.potential.compiling import Compiler, disagreement
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph, rounded_up
from bnn_driver.records import Frames


def test_waits_until_a_shape_has_cost_as_much_as_compiling() -> None:
    calls: list[int] = []

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(len(x))
        return (x.sin().cumsum(0),)

    compiler = Compiler("auto", patience=3600.0)
    for n in (3, 4, 3):
        compiler("sums", n, function, [torch.ones(n)])
    assert calls == [3, 4, 3]
    assert compiler.compiled == 0
    off = Compiler("off", patience=0.0)
    off("sums", 3, function, [torch.ones(3)])
    assert off.compiled == 0


@pytest.mark.slow
def test_compiled_function_with_a_derivative_inside() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_(True)
        y = (leaf.sin() * leaf).sum()
        return y.detach(), torch.autograd.grad(y, leaf)[0]

    compiler = Compiler("on")
    for seed in range(4):
        x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        value, slope = compiler("x sin x", 7, function, [x])
        torch.testing.assert_close(value, (x.sin() * x).sum())
        torch.testing.assert_close(slope, x.sin() + x * x.cos())
    assert compiler.compiled == 1


def _cube_for_tests() -> Any:
    """An operator written in Python, with its own derivative, as kernels from elsewhere come."""

    @torch.library.custom_op("bnn_driver_tests::cube", mutates_args=())
    def cube(x: torch.Tensor, others: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(x.detach().numpy() ** 3), others[0] + 1

    @torch.library.custom_op("bnn_driver_tests::cube_slope", mutates_args=())
    def slope(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return 3 * x * x * g

    cube.register_fake(lambda x, others: (torch.empty_like(x), torch.empty_like(others[0])))
    slope.register_fake(lambda x, g: torch.empty_like(x))
    cube.register_autograd(
        lambda ctx, g, _: (slope(ctx.saved_tensors[0], g), [None]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    return cube


@pytest.mark.slow
def test_compiled_function_with_an_operator_written_in_python(caplog: Any) -> None:
    cube = _cube_for_tests()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_(True)
        y = (cube(leaf.sin(), [x])[0] * leaf).sum()
        return y.detach(), torch.autograd.grad(y, leaf)[0]

    compiler = Compiler("on")
    for seed in range(4):
        x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        value, slope = compiler("x sin³x", 7, function, [x])
        torch.testing.assert_close(value, (x.sin() ** 3 * x).sum())
        torch.testing.assert_close(slope, x.sin() ** 3 + 3 * x * x.sin() ** 2 * x.cos())
    assert compiler.compiled == 1
    assert "cannot" not in caplog.text


@pytest.mark.slow
def test_function_that_compiles_to_something_else_is_dropped(caplog: Any) -> None:
    """What is not among the tensors becomes a constant of the compiled function: right for the first tensors, wrong for the next."""
    hidden = {}

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * hidden["factor"],)

    compiler = Compiler("on")
    for scale in (1.0, 2.0, 3.0):
        x, hidden["factor"] = torch.arange(3, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
        (found,) = compiler("scaled", 3, function, [x])
        torch.testing.assert_close(found, scale * x)
    assert compiler.compiled == 0
    assert "dropped" in caplog.text


def test_function_that_cannot_be_compiled_goes_on_as_it_was(caplog: Any) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * float(x[1]) * x / float(x[1]),)  # reads a value on the host: cannot be traced

    compiler = Compiler("on")
    for _ in range(2):
        (found,) = compiler("square", 2, function, [torch.tensor([1.0, 2.0])])
        assert found.tolist() == [1.0, 4.0]
    assert compiler.compiled == 0
    assert "cannot be compiled" in caplog.text


def test_disagreement_looks_at_every_output() -> None:
    """Errors are in units of the tolerance, 1e-10 in float64; each output is measured by its own size."""
    large, small = torch.full((2,), 10.0, dtype=torch.float64), torch.full((2,), 1e-3, dtype=torch.float64)
    assert disagreement([large, small], [large, small]) == 0
    assert disagreement([large, small * (1 + 1e-6)], [large, small]) == pytest.approx(1e4, rel=1e-3)
    assert disagreement([large, small * float("nan")], [large, small]) == float("inf")
    assert disagreement([large, torch.full((2,), 1e-17)], [large, torch.zeros(2, dtype=torch.float64)]) < 1


@pytest.mark.slow
def test_compiled_evaluation_equals_the_plain_one() -> None:
    """Energies, forces, virials and features of two members, as the neighbour list changes."""
    module = random_mace(hidden="4x0e", max_ell=1, num_interactions=1, radial_MLP=[8])
    plain = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked")
    fast = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked", compile="on")
    weights = members(plain.weights, 2)
    for seed in range(4):
        graph = build_graph(molecules(2, seed), plain.cutoff, torch.float64, torch.device("cpu"), rounded=True)
        a, b = fast.evaluate(weights, graph), plain.evaluate(weights, graph)
        for field in ("energy", "forces", "virial", "features"):
            x, y = getattr(a, field), getattr(b, field)
            # the order of sums differs: rounding in float64
            assert (x - y).abs().max() <= 1e-12 * max(1.0, float(y.abs().max())), field
    assert fast.compiler.compiled >= 1


def test_padding_to_few_shapes_changes_no_number() -> None:
    module = random_mace()
    potential = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked")
    frames = molecules(3)
    weights = members(potential.weights, 2)
    tight = build_graph(frames, potential.cutoff, torch.float64, torch.device("cpu"))
    padded = build_graph(frames, potential.cutoff, torch.float64, torch.device("cpu"), capacity=7, rounded=True)
    assert padded.half.shape[-1] >= tight.half.shape[-1]
    assert padded.source.shape[-1] == 7
    a, b = potential.evaluate(weights, tight), potential.evaluate(weights, padded)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.virial, b.virial, rtol=0, atol=1e-12)


def test_rounded_sizes_are_few_and_close() -> None:
    sizes = [rounded_up(n) for n in range(1, 3000)]
    assert all(n <= size <= 1.25 * n + 1 for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 50
    assert [rounded_up(n) for n in (1, 8, 9, 33, 40)] == [1, 8, 10, 40, 40]


def test_one_shape_serves_lists_of_nearly_the_same_length() -> None:
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(20):
        frames = Frames(np.full(12, 8), rng.uniform(0, 6.0, (1, 12, 3)))
        shapes.add(tuple(build_graph(frames, 4.5, torch.float64, torch.device("cpu"), rounded=True).half.shape))
    assert len(shapes) <= 4
