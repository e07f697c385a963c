"""Steps and beads are right however i-PI cuts a ring into requests."""

from __future__ import annotations

import pytest

from bnn_driver.loops.counting import StepCounter

Requests = list[tuple[int, int, int]]


def cut(beads: int, batch: int, sizes: list[int], equal: bool) -> Requests:
    """(distinct, rows, padding) of the requests of one step, filled up to the batch as i-PI does."""
    if batch == 1:
        return [(1, 1, 0)] * beads
    return [(1 if equal else size, batch, batch - 1 if equal else batch - size) for size in sizes]


@pytest.mark.parametrize(
    ("beads", "batch", "start", "later"),
    [
        (8, 8, [8], [8]),
        (8, 8, [8], [1, 7]),
        (8, 8, [8], [4, 4]),
        (8, 4, [4, 4], [4, 4]),
        (7, 3, [3, 3, 1], [3, 3, 1]),
        (4, 1, [], []),
        (1, 1, [], []),
    ],
)
def test_each_step_has_its_beads(beads: int, batch: int, start: list[int], later: list[int]) -> None:
    counter = StepCounter(beads, 0, batch > 1)
    for request in cut(beads, batch, start, equal=True):
        counter.advance(*request)
    for step in range(1, 5):
        assert counter.at_ring_start
        assert counter.moment() == (step, 0)
        for request in cut(beads, batch, later, equal=False):
            counter.advance(*request)
        assert counter.step == step


def test_a_restarted_ring_counts_from_its_step() -> None:
    counter = StepCounter(8, 300, True)
    for request in cut(8, 8, [1, 7], equal=False):
        counter.advance(*request)
    assert counter.moment() == (301, 0)


def test_a_whole_ring_mends_a_count_that_went_wrong() -> None:
    counter = StepCounter(8, 0, True, frames_seen=9)
    counter.advance(8, 8, 0)
    assert counter.moment() == (2, 0)


def test_equal_beads_of_several_connections_count_each() -> None:
    counter = StepCounter(4, 0, False)
    counter.advance(1, 4, 3)
    assert counter.moment() == (1, 0)
