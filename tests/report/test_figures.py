from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import pytest
from synthetic_run import Fact, make_live_run, make_run

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.report.figures import run_figure


def test_a_run_is_drawn_with_all_its_colours_and_no_global_figure(tmp_path: Path) -> None:
    run = make_live_run(tmp_path / "run", steps=2000)
    run_figure(run.path, tmp_path / "run.png")
    image = matplotlib.image.imread(tmp_path / "run.png")
    height, width = image.shape[:2]
    assert (height, width) == (962, 1430)
    corners = [(slice(0, height // 2), slice(0, width // 2)), (slice(0, height // 2), slice(width // 2, None))]
    corners += [(slice(height // 2, None), c) for _, c in corners]
    for rows, columns in corners:
        red = abs(image[rows, columns, :3] - [0.835, 0.369, 0.0]).max(axis=-1) < 0.02
        assert red.sum() > 30, "every panel shows the calls of the oracle"
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    "facts", [[], [Fact(0, "first", 0.0, 0.0, 0.01)], [Fact(0, "first", 0.0, 0.0, 0.01), Fact(3, "energy", 0.0, 0.0, 0.01)]]
)
def test_a_run_that_has_barely_begun_is_drawn(tmp_path: Path, facts: list[Fact]) -> None:
    run = make_run(tmp_path / "run", facts)
    run_figure(run.path, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_a_run_without_settings_is_drawn_without_calibration(tmp_path: Path) -> None:
    run = make_live_run(tmp_path / "run", steps=1000)
    run.settings_file.unlink()
    run_figure(run.path, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_no_run_no_figure(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="is no run directory"):
        run_figure(tmp_path / "absent", tmp_path / "run.png")
    assert list(tmp_path.iterdir()) == []
