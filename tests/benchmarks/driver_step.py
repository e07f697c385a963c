"""Milliseconds of one driver step, by part: socket, neighbour list, ensemble, decision and reply.

    python tests/benchmarks/driver_step.py [--model embedded] [--members 4] [--beads 1 8]

The socket's part is measured with i-PI's own wire bytes over a local socket pair and a handler that does nothing; the floor of a whole
step is the ensemble alone.  The alternative beside it is a loop over mace's own modules, one member and one bead after the other.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase.build import molecule

from bnn_driver.active.criteria import EnergyCriterion
from bnn_driver.active.policy import Policy
from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.bayes.likelihood import NoiseHead, NoiseModel
from bnn_driver.ipi import wire
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.graph import Graph, build_graph
from bnn_driver.potential.mace import load_mace
from bnn_driver.potential.params import repeat_weights
from bnn_driver.records import Frames, Prediction


def milliseconds(function: Callable[[], object], seconds: float = 1.5) -> float:
    """Median wall time of one call."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


def socket_milliseconds(frames: Frames) -> float:
    """One exchange of positions and forces over a socket pair, bytes as i-PI's, packed and unpacked on our side."""
    ours, theirs = socket.socketpair()
    beads, atoms = frames.positions.shape[:2]
    cell = np.broadcast_to(30.0 * np.eye(3), (beads, 3, 3))
    request = wire.pack_posdata(frames.positions, cell, beads > 1)
    reply = wire.pack_forces(np.zeros(beads), np.zeros((beads, atoms, 3)), np.zeros((beads, 3, 3)), ["{}"] * beads)

    def exactly(channel: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := channel.recv(size - len(data))):
            data += part
        return data

    def serve() -> None:
        while message := exactly(ours, len(request)):
            body = message[16:]  # without POSDATA and the number of atoms
            if beads > 1:
                h, x = wire.split_batched_posdata(body, atoms, beads)
                wire.decode_frames(h, x, atoms)
            ours.sendall(wire.pack_forces(np.zeros(beads), np.zeros((beads, atoms, 3)), np.zeros((beads, 3, 3)), ["{}"] * beads))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def exchange() -> None:
        theirs.sendall(request)
        exactly(theirs, len(reply))

    result = milliseconds(exchange)
    theirs.close()
    thread.join()
    ours.close()
    return result


def decision(prediction: Prediction, frames: Frames) -> Callable[[], object]:
    """Judging all frames of a step."""
    policy = Policy((EnergyCriterion(0.04),), 0.95, 0.01)
    calibrations = {"energy": GammaCalibration(1.5, 10.0)}
    draws = np.ones(len(frames))
    return lambda: policy.judge(replace(prediction), frames, calibrations, draws)  # a copy has computed nothing yet


def one_by_one(potential: Potential, weights: Mapping[str, torch.Tensor], graphs: Sequence[Graph]) -> None:
    """What a loop over members and beads costs."""
    for graph in graphs:
        potential.evaluate(weights, graph)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--beads", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    atoms = molecule("CH3CH2OH")
    name = options.model if options.model == "embedded" else Path(options.model)
    module = load_mace(name).module
    fast = make_potential(module, atoms.numbers.tolist(), torch.float32, "cpu", "auto")
    slow = make_potential(module, atoms.numbers.tolist(), torch.float32, "cpu", "modules")
    head = NoiseHead(fast.n_features, (64, 16))
    noise = NoiseModel(0.004, 0.004, 1.0, head)
    weights = repeat_weights(dict(fast.weights) | head.init(torch.float32), options.members)
    ensemble = Ensemble(fast, weights, 1, noise)
    alternative = repeat_weights(slow.weights, options.members)
    print(f"{name}: {options.members} members, ethanol, float32, {fast.path}")
    print(
        f"{'beads':>6}{'socket':>9}{'list':>9}{'ensemble':>10}{'decision':>10}{'sum':>9}{'mace loop':>11}{'ratio':>7}  ms per step"
    )
    rng = np.random.default_rng(0)
    for beads in options.beads:
        frames = Frames(atoms.numbers, atoms.positions + 0.02 * rng.standard_normal((beads, len(atoms), 3)))
        with_list = milliseconds(partial(ensemble.predict, frames))
        listing = milliseconds(partial(build_graph, frames, fast.cutoff + ensemble.skin, torch.float32, torch.device("cpu")))
        wired, judged = socket_milliseconds(frames), milliseconds(decision(ensemble.predict(frames), frames))
        total = with_list + wired + judged
        graphs = [build_graph(frames[b], slow.cutoff, torch.float32, torch.device("cpu")) for b in range(beads)]
        loop = milliseconds(partial(one_by_one, slow, alternative, graphs))
        print(
            f"{beads:>6}{wired:>9.3f}{listing:>9.3f}{with_list:>10.2f}{judged:>10.3f}{total:>9.2f}{loop:>11.2f}{loop / total:>7.1f}"
        )
    print("the ensemble's column, floor of a step, contains the list")


if __name__ == "__main__":
    main()
