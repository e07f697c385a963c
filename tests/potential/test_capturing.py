"""Recordings: what is copied when, and that a recorded evaluation or chain step is the plain one.

Where there is no GPU a stand-in records by keeping the function and runs it again on the same buffers at every replay: it knows
addresses and no arguments, as a CUDA graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_models import members, molecules, random_mace
from torch import Tensor

from bnn_driver.potential import compiling
from bnn_driver.potential.capturing import Captured, CudaRecorder, Recording
from bnn_driver.potential.compiling import REPEATS, Compiler
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import build_graph

Outputs = tuple[Tensor, ...]
FIELDS = ("energy", "forces", "virial", "features")


class Rerun:
    """The stand-in."""

    def __init__(self) -> None:
        self.made = self.replays = 0

    def __call__(self, function: Callable[[], Outputs]) -> Recording:
        self.made += 1
        outputs = function()

        def replay() -> None:
            self.replays += 1
            for old, new in zip(outputs, function(), strict=True):
                old.copy_(new)

        return Recording(replay, outputs)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each group of copies had."""
    found: list[int] = []
    original = torch._foreach_copy_

    def copy(into: list[Tensor], out_of: list[Tensor]) -> None:
        found.append(len(into))
        original(into, out_of)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    return found


def affine(x: Tensor, w: Tensor, index: Tensor) -> Outputs:
    return w * x + 1, x.index_select(0, index), (w * w).sum().float()


def captured(*tensors: Tensor) -> Captured:
    return Captured(lambda buffers: affine, tensors, Rerun())


def test_only_what_changed_is_copied(copied: list[int]) -> None:
    x, w, index = torch.arange(3.0), torch.full((3,), 2.0), torch.tensor([2, 0])
    function = captured(x, w, index)

    def agrees(*tensors: Tensor) -> bool:
        return all(torch.equal(a, b) for a, b in zip(function(*tensors), affine(*tensors), strict=True))

    assert agrees(x, w, index)
    assert copied == []
    w.mul_(3)  # in place, which the version counts
    assert agrees(x, w, index)
    assert copied == [1]
    whole = torch.arange(6.0)
    assert agrees(whole[:3], whole[3:], index)
    assert agrees(whole[:3], whole[3:], index)  # other views of the same memory, unchanged
    assert copied == [1, 2]
    whole += 1  # through the base of the views
    assert agrees(whole[:3].detach(), whole[3:], index.flip(0))
    assert copied == [1, 2, 2, 1]


def test_a_new_tensor_where_an_old_one_lay_is_noticed() -> None:
    """The address of a tensor that is gone may come back with other values; the last source is kept, so that it cannot."""
    w, index = torch.ones(1000), torch.tensor([0])
    function = captured(torch.zeros(1000), w, index)
    for value in range(20):
        assert float(function(torch.full((1000,), float(value)), w, index)[1]) == value


def test_tensors_whose_changes_nobody_counts_are_always_copied(copied: list[int]) -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    w, index = torch.ones(3), torch.tensor([0])
    function = captured(x, w, index)
    for value in (1.0, 2.0):
        with torch.inference_mode():
            x.fill_(value)
        assert float(function(x, w, index)[1]) == value
    assert copied == [1, 1]


def test_outputs_stay_what_they_were_and_inputs_are_only_read() -> None:
    x, w, index = torch.arange(3.0), torch.full((3,), 2.0), torch.tensor([2, 0])
    function = captured(x, w, index)
    first = function(x, w, index)
    kept = [y.clone() for y in first]
    function(x + 1, w, index)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert x.tolist() == [0, 1, 2]
    assert [y.dtype for y in first] == [torch.float32] * 3


def test_buffers_are_contiguous_whatever_the_inputs_are() -> None:
    x = torch.arange(12.0).view(3, 4)
    seen: list[tuple[int, ...]] = []

    def make(buffers: Any) -> Any:
        seen.extend(b.stride() for b in buffers)
        return lambda y: (y.sum(dim=0),)

    function = Captured(make, [x.T], Rerun())
    assert seen == [(3, 1)]
    assert function(x.T)[0].tolist() == x.sum(dim=1).tolist()
    assert function(2 * x.T)[0].tolist() == (2 * x.sum(dim=1)).tolist()


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    recorder = Rerun()
    compiler = Compiler("auto", patience=3600.0, recorder=recorder)
    for i in range(REPEATS + 4):
        x = torch.full((3,), float(i))
        (found,) = compiler("square", 0, lambda y: (y * y,), [x])
        assert torch.equal(found, x * x)
        assert recorder.made == (i + 1 >= REPEATS)
    assert compiler.compiled == 1


def test_a_recording_that_is_wrong_or_fails_is_dropped(caplog: Any) -> None:
    def frozen(function: Callable[[], Outputs]) -> Recording:
        return Recording(lambda: None, function())  # always the first outputs

    def broken(function: Callable[[], Outputs]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    for recorder, word in ((frozen, "dropped"), (broken, "cannot be recorded")):
        compiler = Compiler("auto", patience=3600.0, recorder=recorder)
        for i in range(REPEATS + 4):
            x = torch.full((3,), 1.0 + i)
            assert torch.equal(compiler("square", 0, lambda y: (y * y,), [x])[0], x * x)
        assert compiler.compiled == 0
        assert word in caplog.text


def test_recordings_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_RECORDINGS", 2)
    recorder = Rerun()
    compiler = Compiler("auto", patience=3600.0, recorder=recorder)
    for n in (1, 2, 3):
        for _ in range(REPEATS + 3):
            assert compiler("square", 0, lambda y: (y * y,), [torch.full((n,), 2.0)])[0].tolist() == [4.0] * n
    assert (recorder.made, compiler.compiled) == (3, 2)
    for _ in range(REPEATS + 3):  # the one that made room comes again
        compiler("square", 0, lambda y: (y * y,), [torch.full((1,), 2.0)])
    assert (recorder.made, compiler.compiled) == (4, 2)


def test_machine_code_outlives_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def compile_function(function: Any, tensors: Any) -> Any:
        made.append(len(tensors[0]))
        return function

    monkeypatch.setattr(compiling, "MOST_RECORDINGS", 1)
    monkeypatch.setattr(compiling, "compile_function", compile_function)
    recorder = Rerun()
    compiler = Compiler("on", recorder=recorder)
    for _ in range(3):
        for n in (1, 2):
            assert compiler("square", 0, lambda y: (y * y,), [torch.full((n,), 2.0)])[0].tolist() == [4.0] * n
    assert (made, recorder.made, compiler.compiled) == ([1, 2], 6, 1)


def test_from_recorded_to_compiled_and_recorded(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Where the better way is wrong, the one before it is taken again."""
    for wrong in (False, True):
        code: Any = (lambda x: (x * x + x,)) if wrong else (lambda x: (x * x,))
        monkeypatch.setattr(compiling, "compile_function", lambda function, tensors, code=code: code)
        compiler = Compiler("auto", patience=3600.0, recorder=Rerun())
        for i in range(20):
            x = torch.full((3,), 1.0 + i)
            assert torch.equal(compiler("square", 0, lambda y: (y * y,), [x])[0], x * x)
            (shape,) = compiler._shapes.values()
            if i == 9:
                assert shape.way is not None
                assert shape.way.name == "recorded"
                shape.spent = 1e6
        assert shape.way is not None
        assert shape.way.name == ("recorded" if wrong else "compiled and recorded")
    assert "dropped" in caplog.text


def test_a_recorded_evaluation_is_the_plain_one() -> None:
    """As the neighbour list, the positions and the weights change."""
    module = random_mace()
    plain = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked")
    fast = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked")
    recorder = Rerun()
    fast.compiler = Compiler("auto", patience=3600.0, recorder=recorder)
    generations = [members(plain.weights, 2, seed) for seed in range(2)]
    for i in range(16):
        frames = molecules(2, i)
        graph = build_graph(frames, plain.cutoff, torch.float64, torch.device("cpu"), capacity=4)
        weights = generations[i // 8]
        a, b = fast.evaluate(weights, graph), plain.evaluate(weights, graph)
        for name in FIELDS:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert recorder.made == fast.compiler.compiled == 1
    assert recorder.replays >= 12


# ---- on a GPU

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def _gpu(name: str) -> Any:
    return pytest.param(name, marks=needs_gpu)


@pytest.mark.parametrize("device", [_gpu("cuda")])
def test_cuda_graph_replays_with_new_inputs(device: str) -> None:
    x, w = torch.arange(4.0, device=device), torch.full((4,), 2.0, device=device)
    index = torch.tensor([2, 0], device=device)
    function = Captured(lambda buffers: affine, [x, w, index], CudaRecorder(torch.device(device, 0)))
    for i in range(5):
        found, expected = function(x + i, w, index), affine(x + i, w, index)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        w.add_(1)


@pytest.mark.parametrize("device", [_gpu("cuda")])
@pytest.mark.parametrize("patience", [3600.0, 0.0], ids=["recorded", "compiled and recorded"])
def test_evaluation_on_a_gpu_is_that_on_the_host(device: str, patience: float) -> None:
    module = random_mace()
    host = make_potential(module, [1, 6, 8], torch.float64, "cpu", path="stacked")
    fast = make_potential(random_mace(), [1, 6, 8], torch.float64, device, path="stacked")
    fast.compiler = Compiler("auto", patience=patience)
    weights = members(host.weights, 2)
    there = {name: x.to(device) for name, x in weights.items()}
    for i in range(REPEATS + 6):
        graph = build_graph(molecules(2, i), host.cutoff, torch.float64, torch.device("cpu"), capacity=4)
        expected = host.evaluate(weights, graph)
        found = fast.evaluate(there, graph.to(torch.device(device), torch.float64))
        for name in FIELDS:
            a, b = getattr(found, name).cpu(), getattr(expected, name)
            assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max())), name
    assert fast.compiler.compiled >= 1
