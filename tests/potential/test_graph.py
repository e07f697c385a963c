"""Laws of neighbour graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matscipy.neighbours import neighbour_list
from random_models import crystals, molecules

from bnn_driver.errors import GuardStop
from bnn_driver.potential.graph import build_graph
from bnn_driver.records import Frames

CPU = torch.device("cpu")


@pytest.mark.parametrize("frames", [molecules(), crystals()], ids=["molecules", "small triclinic cells"])
def test_edges_are_those_of_an_independent_search(frames: Frames) -> None:
    graph = build_graph(frames, 4.0, torch.float64, CPU)
    for b in range(len(frames)):
        cell = np.eye(3) * 50 if frames.cell is None else frames.cell[b]
        shifted = frames.positions[b] + (20 if frames.cell is None else 0)
        i, j, d = neighbour_list("ijd", positions=shifted, cell=cell, pbc=np.full(3, frames.periodic), cutoff=4.0)
        lengths = graph.vectors()[b].norm(dim=-1)
        mask = graph.mask[b]
        receiver = torch.arange(len(frames.numbers)).view(-1, 1).expand_as(mask)[mask]
        ours = sorted(zip(graph.source[b][mask].tolist(), receiver.tolist(), lengths[mask].tolist(), strict=True))
        theirs = sorted(zip(i.tolist(), j.tolist(), d.tolist(), strict=True))
        assert np.allclose(np.array(ours), np.array(theirs), atol=1e-12)


@pytest.mark.parametrize("frames", [molecules(), crystals()], ids=["molecules", "small triclinic cells"])
def test_every_bond_has_two_directions_of_opposite_vectors(frames: Frames) -> None:
    graph = build_graph(frames, 4.0, torch.float64, CPU)
    for b in range(len(frames)):
        vectors, pair = graph.vectors()[b][graph.mask[b]], graph.pair[b][graph.mask[b]]
        assert torch.equal(pair.bincount(minlength=1)[pair], torch.full_like(pair, 2))
        total = torch.zeros(int(pair.max()) + 1, 3, dtype=torch.float64).index_add(0, pair, vectors)
        assert total.abs().max() < 1e-12
        # the representative of a bond is one of its own directions
        flat_pair = graph.pair[b].reshape(-1)
        for q in pair.unique().tolist():
            assert flat_pair[graph.half[b, q]] == q


def test_unused_slots_lie_beyond_the_cutoff() -> None:
    graph = build_graph(molecules(), 1.6, torch.float64, CPU, capacity=6)
    assert graph.source.shape[-1] == 6
    lengths = graph.vectors().norm(dim=-1)
    assert (lengths[~graph.mask] > 1.6).all()
    assert (lengths[graph.mask] < 1.6).all()


def test_taken_frames_are_the_frames_of_their_own_graph() -> None:
    frames = crystals(4)
    graph = build_graph(frames, 4.0, torch.float64, CPU)
    index = torch.tensor([[0, 2], [3, 3]])
    own = graph.take(index)
    assert own.lead == (2, 2)
    vectors = graph.vectors()
    assert torch.equal(own.vectors()[1, 0], vectors[3])
    assert torch.equal(own.vectors()[0, 1], vectors[2])


def test_a_position_that_is_not_finite_stops_the_run() -> None:
    frames = molecules()
    frames.positions[1, 0, 0] = np.nan
    with pytest.raises(GuardStop, match="frame 1"):
        build_graph(frames, 4.0, torch.float64, CPU)
