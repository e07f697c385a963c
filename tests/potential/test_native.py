"""The compiled kernels: derivatives against finite differences, plain operations and many threads, and what happens without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import VARIANTS, crystals, members, molecules, random_mace

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.native import library
from bnn_driver.potential.native.convolution import Convolution, ConvolutionPath, convolution_tables
from bnn_driver.potential.native.library import NoKernels, load_kernels
from bnn_driver.potential.native.polynomial import PolynomialTables
from bnn_driver.potential.stacked import StackedPotential

CPU = torch.device("cpu")
C = 8  # channels: one vector of float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def convolution() -> Convolution:
    """Two scalar and two vector paths into blocks of l = 0 and 1; three nodes with up to three neighbours, one slot unused."""
    dot = random(1, 9, seed=5)
    cross = random(3, 15, seed=6)
    paths = [
        ConvolutionPath(0, 0, 0, 0, 0, 0, 0, None),
        ConvolutionPath(0, 0, 1, 1, 1, 1, 0, None),
        ConvolutionPath(1, 1, 1, 0, 2, 0, 1, dot),
        ConvolutionPath(1, 1, 2, 1, 3, 1, 1, cross),
    ]
    tables = convolution_tables(paths, [(0, 2), (1, 2)], torch.float64)
    source = torch.tensor([[1, 2, 0, 0, 2, 2, 0, 1, 1]])
    pair = torch.tensor([[0, 1, 4, 0, 2, 3, 1, 2, 3]])
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    return Convolution(tables, source, pair, mask, nodes=3, inner_x=True)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w (2, 5, 4·C), x (2, 3, 4, C), y (2, 9, 9)."""
    return random(2, 5, 4 * C, seed=1), random(2, 3, 4, C, seed=2), random(2, 9, 9, seed=3)


def test_first_derivatives_of_the_convolution(convolution: Convolution) -> None:
    w, x, y = (t.requires_grad_(True) for t in operands())
    assert torch.autograd.gradcheck(lambda w, x, y: tuple(convolution(w, x, y)), (w, x, y), fast_mode=True)


def test_second_derivatives_of_the_convolution(convolution: Convolution) -> None:
    """Of every first derivative, along every operand but the harmonics, which are constants then."""
    w, x, y = operands()
    g = [torch.randn_like(b) for b in convolution(w, x, y)]

    def firsts(w: torch.Tensor, x: torch.Tensor, *g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [w, x, y.clone().requires_grad_(True)]
        return torch.autograd.grad(convolution(*leaves), leaves, grad_outputs=g, create_graph=True)

    inputs = tuple(t.clone().requires_grad_(True) for t in (w, x, *g))
    assert torch.autograd.gradcheck(firsts, inputs, fast_mode=True)


def test_derivative_along_bonds(convolution: Convolution) -> None:
    """∂A/∂r = (∂A/∂w)·dw/dr, bond by bond."""
    w, x, y = operands()
    slope = random(*w.shape, seed=9)
    r = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    w.requires_grad_(True)
    g = [torch.randn_like(b) for b in convolution(w, x, y)]
    (gw,) = torch.autograd.grad(convolution(w, x, y), w, grad_outputs=g)
    found = torch.autograd.grad(convolution.along_bonds(r, w.detach(), slope, x, y.requires_grad_(True)), [r, y], grad_outputs=g)
    assert (found[0] - (gw * slope).sum(-1)).abs().max() <= 1e-12 * float(gw.abs().max())


@pytest.fixture
def polynomial() -> tuple[PolynomialTables, tuple[tuple[int, int, int], ...]]:
    """2 outputs of 3 components: x_0 x_1 (c x_2 + c), x_2² c x_2, and c x_0 as pair of ones; elements 0 and 2 of 3 are there."""
    tables = PolynomialTables(
        single=torch.tensor([2, 3, 2, 0]),
        pair=torch.tensor([[0, 1, 0], [2, 2, 0], [3, 3, 1]]),
        start=torch.tensor([0, 2, 3, 4]),
        table=torch.eye(4, dtype=torch.float64),
        outputs=2,
    )
    return tables, ((0, 0, 3), (2, 3, 5))


def written_out(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The polynomial of the fixture."""
    c = torch.cat([c[:, :1].expand(-1, 3, -1, -1), c[:, 2:].expand(-1, 2, -1, -1)], dim=1)
    first = x[:, :, 0] * x[:, :, 1] * (c[:, :, 0] * x[:, :, 2] + c[:, :, 1]) + x[:, :, 2] ** 3 * c[:, :, 2]
    return torch.stack([first, c[:, :, 3] * x[:, :, 0]], dim=2)


def test_contraction_and_its_derivatives(polynomial: Any) -> None:
    tables, slices = polynomial
    x, c = random(2, 5, 3, C, seed=1).requires_grad_(True), random(2, 3, 4, C, seed=2).requires_grad_(True)
    ours, plain = tables(x, c.unsqueeze(2), slices), written_out(x, c)
    assert (ours - plain).detach().abs().max() <= 1e-13 * float(plain.detach().abs().max())
    g = random(*plain.shape, seed=3)
    for a, b in zip(torch.autograd.grad(ours, [x, c], g), torch.autograd.grad(written_out(x, c), [x, c], g), strict=True):
        assert (a - b).abs().max() <= 1e-13 * float(b.abs().max())


def test_second_derivatives_of_the_contraction(polynomial: Any) -> None:
    tables, slices = polynomial
    x, c, g, v = random(2, 5, 3, C, seed=1), random(2, 3, 4, C, seed=2), random(2, 5, 2, C, seed=3), random(2, 5, 3, C, seed=4)
    seconds = []
    for function in (lambda x, c: tables(x, c.unsqueeze(2), slices), written_out):
        leaves = [t.clone().requires_grad_(True) for t in (x, c, g)]
        (first,) = torch.autograd.grad(function(*leaves[:2]), leaves[0], grad_outputs=leaves[2], create_graph=True)
        seconds.append(torch.autograd.grad(first, leaves, grad_outputs=v))
    for a, b in zip(*seconds, strict=True):
        assert (a - b).abs().max() <= 1e-13 * float(b.abs().max())


def potential(name: str = "lmax 2, correlation 3", dtype: torch.dtype = torch.float64, **settings: Any) -> StackedPotential:
    made = make_potential(random_mace(**{**VARIANTS[name], **settings}), [1, 6, 8], dtype, CPU, path="stacked")
    assert isinstance(made, StackedPotential)
    return made


def gradients(of: StackedPotential, weights: dict[str, torch.Tensor], graph: Graph) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_(True) for x in weights.values()]
    e = of.evaluate(dict(zip(weights, leaves, strict=True)), graph, create_graph=True)
    loss = (e.energy.to(e.forces) / 100).square().sum() + e.forces.square().sum() + e.virial.square().sum()
    values = of.evaluate(weights, graph)
    return [values.energy, values.forces, values.virial, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_threads_change_nothing_but_rounding(count: int, two_threads: None) -> None:
    """One member is shared out by channels, several by members; sums over channels then add up in another order."""
    of = potential(hidden="16x0e+16x1o")
    frames = crystals(2)
    weights, graph = members(of.weights, count), build_graph(frames, of.cutoff, of.dtype, CPU)
    many = gradients(of, weights, graph)
    torch.set_num_threads(1)
    for a, b in zip(many, gradients(of, weights, graph), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1e-3, float(b.abs().max()))


def test_single_precision(two_threads: None) -> None:
    double, single = potential(hidden="16x0e+16x1o"), potential(hidden="16x0e+16x1o", dtype=torch.float32)
    assert single.native
    weights = members(double.weights, 2)
    frames = molecules(2)
    a = gradients(single, {k: x.float() for k, x in weights.items()}, build_graph(frames, single.cutoff, single.dtype, CPU))
    b = gradients(double, weights, build_graph(frames, double.cutoff, double.dtype, CPU))
    scale = max(float(y.abs().max()) for y in b[3:])
    for x, y in zip(a, b, strict=True):
        # 24 bits through two layers and two reverse passes; energies are sums in float64 of single-precision atoms
        assert (x.double() - y).abs().max() <= 1e-5 * max(float(y.abs().max()), scale if x.dim() < 3 else 0.0)


def test_a_blown_up_structure_stays_not_a_number() -> None:
    of = potential()
    frames = molecules(1)
    weights = members(of.weights, 1)
    weights["interactions.0.linear_up.weight"][0, 0] = float("nan")
    assert not of.evaluate(weights, build_graph(frames, of.cutoff, of.dtype, CPU)).energy.isfinite().all()


def test_wrong_kernels_are_dropped_with_a_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A table with one wrong coefficient stands for machine code that is wrong."""
    from bnn_driver.potential import stacked

    right = stacked.layer_tables

    def wrong(layer: Any, dtype: torch.dtype) -> Any:
        tables = right(layer, dtype)
        tables.values[0] *= 1.001
        return tables

    monkeypatch.setattr(stacked, "layer_tables", wrong)
    with caplog.at_level(logging.WARNING):
        made = potential()
    assert not made.native
    assert "not used" in caplog.text
    assert "kernels" not in made.path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; what was loaded before is forgotten for the length of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels.cache_clear()
    yield tmp_path / "bnn-driver"
    load_kernels.cache_clear()


def test_compiled_once_and_the_arithmetic_of_the_process_left_alone(elsewhere: Path) -> None:
    load_kernels()
    (file,) = elsewhere.glob("kernels-*.so")
    made = file.stat().st_mtime_ns
    load_kernels.cache_clear()
    load_kernels()
    assert [f.name for f in elsewhere.iterdir()] == [file.name]
    assert file.stat().st_mtime_ns == made
    assert (
        torch.tensor(5e-324, dtype=torch.float64) * torch.tensor(1.0, dtype=torch.float64) > 0
    )  # denormal numbers are still there


def test_without_a_compiler(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoKernels, match=r"no C\+\+ compiler"):
        load_kernels()


def test_a_compiler_that_fails(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(NoKernels, match="failed with 1"):
        load_kernels()
    assert not list(elsewhere.iterdir())


def test_a_cache_that_others_can_write(elsewhere: Path) -> None:
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    with pytest.raises(NoKernels, match="mode 700"):
        load_kernels()


def test_a_damaged_file_is_named(elsewhere: Path) -> None:
    elsewhere.mkdir(mode=0o700)
    compiler = library.find_compiler()
    (elsewhere / library.file_name(compiler)).write_bytes(b"no library")
    with pytest.raises(NoKernels, match="delete it"):
        load_kernels()
