"""The picture of a run, living, dead or barely begun."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from synthetic_run import Fact, make_live_run, make_run

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.report.figures import BINS, _largest_per_step, run_figure

FIRST = Fact(0, "first", 0.0, 0.0, 0.01)


def test_every_panel_shows_the_calls_of_the_oracle(tmp_path: Path) -> None:
    run = make_live_run(tmp_path / "run", steps=2000)
    run_figure(run.path, tmp_path / "run.png")
    image = matplotlib.image.imread(tmp_path / "run.png")[60:, :, :3]  # without the legend
    red = abs(image - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=-1) < 0.02
    middle, centre = (n // 2 for n in red.shape)
    for panel in (red[:middle, :centre], red[:middle, centre:], red[middle:, :centre], red[middle:, centre:]):
        assert panel.sum() > 100, "about 40 pixels a marker"


def test_drawing_leaves_no_global_figure(tmp_path: Path) -> None:
    run_figure(make_run(tmp_path / "run", [FIRST]).path, tmp_path / "run.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("facts", [[], [FIRST], [FIRST, Fact(3, "energy", 0.0, 0.0, 0.01)]])
def test_a_run_that_has_barely_begun_is_drawn(tmp_path: Path, facts: list[Fact]) -> None:
    run = make_run(tmp_path / "run", facts)
    run_figure(run.path, tmp_path / "run.png")
    assert matplotlib.image.imread(tmp_path / "run.png").shape[1] == 1430


def test_a_run_without_settings_is_drawn_without_calibration(tmp_path: Path) -> None:
    run = make_live_run(tmp_path / "run", steps=400)
    run.settings_file.unlink()
    run_figure(run.path, tmp_path / "run.png")
    assert matplotlib.image.imread(tmp_path / "run.png").shape[1] == 1430


def test_a_long_line_keeps_its_peaks() -> None:
    steps = np.arange(1_000_000)
    values = np.full(len(steps), 0.1)
    values[[7, 123_456, 999_999]] = 5.0
    x, y = _largest_per_step(steps, values)
    assert len(x) <= BINS + 1
    assert (y == 5.0).sum() == 3
    assert np.all(np.diff(x) > 0)
    peak = x[y == 5.0]
    assert np.abs(peak - [7, 123_456, 999_999]).max() <= 1_000_000 / BINS


def test_beads_of_one_step_become_their_largest() -> None:
    x, y = _largest_per_step(np.array([4.0, 4.0, 2.0, 4.0]), np.array([1.0, 3.0, 7.0, 2.0]))
    assert x.tolist() == [2.0, 4.0]
    assert y.tolist() == [7.0, 3.0]


def test_no_run_no_figure(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="is no run directory"):
        run_figure(tmp_path / "absent", tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []
