"""When a simulation goes back around a frame that cannot be labelled, how far, and when it may not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bnn_driver.errors import OracleTimeout, SCFNotConverged, WorkerLost
from bnn_driver.loops.rewinding import NEAR, Rewinding


@dataclass
class Checkpoints:
    """Remembers what it is asked for; has one every 50 steps."""

    asked: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def rewind(self, below: int, seed: int) -> int | None:
        self.asked.append(below)
        self.seeds.append(seed)
        return (below - 1) // 50 * 50 if below > 0 else None


@pytest.fixture
def told() -> list[tuple[int, int, str]]:
    return []


def rewinding(told: list[tuple[int, int, str]], limit: int = 3, times: int = 0) -> Rewinding:
    return Rewinding(limit, 7, "", lambda *facts: told.append(facts), times)


def test_it_goes_further_back_each_time_and_gives_up_in_the_end(told: list[tuple[int, int, str]]) -> None:
    simulation, back = Checkpoints(), rewinding(told)
    went = [back.go_back(simulation, step, SCFNotConverged("no")) for step in (220, 215, 220, 218)]
    assert went == [True, True, True, False]
    assert [(step, target) for step, target, _ in told] == [(220, 200), (215, 150), (220, 100)]
    assert told[0][2] == "SCFNotConverged: no"
    assert len(set(simulation.seeds)) == 3, "the random numbers are others each time"


def test_from_too_near_there_is_no_other_way(told: list[tuple[int, int, str]]) -> None:
    simulation = Checkpoints()
    assert rewinding(told).go_back(simulation, 204, OracleTimeout("no"))
    assert told[0][1] == 150
    assert simulation.asked == [204 - NEAR + 1]


def test_past_the_place_it_may_go_back_as_often_again(told: list[tuple[int, int, str]]) -> None:
    simulation, back = Checkpoints(), rewinding(told, limit=1)
    assert [back.go_back(simulation, step, SCFNotConverged("no")) for step in (220, 330, 331, 331)] == [True, True, True, False]


@pytest.mark.parametrize("step", [1, 5, 9])
def test_soon_after_the_start_it_starts_again(told: list[tuple[int, int, str]], step: int) -> None:
    assert rewinding(told).go_back(Checkpoints(), step, SCFNotConverged("no"))
    assert told[0][1] == 0


def test_the_first_frame_of_all_has_nothing_before_it(told: list[tuple[int, int, str]]) -> None:
    assert not rewinding(told).go_back(Checkpoints(), 0, SCFNotConverged("no"))


def test_a_lost_worker_is_not_the_fault_of_the_frame(told: list[tuple[int, int, str]]) -> None:
    simulation = Checkpoints()
    assert not rewinding(told).go_back(simulation, 220, WorkerLost("node down"))
    assert not rewinding(told, limit=0).go_back(simulation, 220, SCFNotConverged("no"))
    assert not simulation.asked


def test_another_start_draws_other_numbers(told: list[tuple[int, int, str]]) -> None:
    simulation = Checkpoints()
    for times in (0, 1):
        rewinding(told, times=times).go_back(simulation, 220, SCFNotConverged("no"))
    assert simulation.seeds[0] != simulation.seeds[1]
