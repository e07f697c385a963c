"""Schedules pass through their published corners."""

from __future__ import annotations

import itertools

import pytest

from bnn_driver.bayes.schedule import Course, LongRun, cosine, temperature


def test_the_cosine_falls_from_its_start_and_stays_positive() -> None:
    values = [cosine(k, 2000, 1e-3) for k in range(2000)]
    assert values[0] == 1e-3
    assert values[1000] == pytest.approx(5e-4)
    assert all(a > b > 0 for a, b in itertools.pairwise(values))


def test_cycles_are_the_same_cosine_again_and_again() -> None:
    assert [cosine(k, 2000, 1e-3, 4) for k in range(2000)] == [cosine(k % 500, 500, 1e-3) for k in range(2000)]


def test_noise_is_off_for_400_of_2000_steps_and_full_after_500() -> None:
    heat = [temperature(k, 2000, 0.2, 0.05) for k in range(2000)]
    assert set(heat[:401]) == {0.0}
    assert heat[450] ** 0.5 == pytest.approx(0.5)  # the amplitude is half way up
    assert set(heat[500:]) == {1.0}


def test_without_ramp_the_noise_starts_at_once() -> None:
    assert [temperature(k, 10, 0.2, 0.0) for k in (1, 2)] == [0.0, 1.0]


def test_a_long_run_takes_one_sample_after_burn_in_and_one_per_cycle() -> None:
    run = LongRun(burn_in=100, burn_in_start=3e-3, burn_in_end=1e-5, mass_fraction=0.9, cycle=40, cycle_start=1e-3)
    assert [k for k in range(200) if run.takes_sample(k)] == [99, 139, 179]
    assert (run.step_size(0), run.step_size(100), run.step_size(140)) == (3e-3, 1e-3, 1e-3)
    assert run.step_size(50) == pytest.approx((3e-3 * 1e-5) ** 0.5)
    assert (run.adapts_mass(89), run.adapts_mass(90)) == (True, False)


def test_a_short_way_passes_through_the_rest_of_the_schedule() -> None:
    whole = Course(2000)
    short = whole.settle(600, 350)
    assert (whole.length, short.length) == (2000, 950)
    assert [short.place(k) for k in (0, 599, 600, 601, 949)] == [0, 599, 600, 604, 1996]
    values = [cosine(short.place(k), 2000, 1e-3) for k in range(short.length)]
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
