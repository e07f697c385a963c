"""The chains of faults run two at a time; the table of all faults is printed at the end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "loops"))

AT_ONCE = int(os.environ.get("BNN_FAULTS_AT_ONCE", max(2, min(6, os.cpu_count() or 2))))
"""Runs side by side; each is a driver, a trainer, a worker and i-PI, which mostly wait for each other."""


@pytest.fixture(scope="session")
def trials(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Name of a trial -> its outcome, of all trials among the selected tests (their parameter `trial`)."""
    chosen = [item.callspec.params["trial"] for item in request.session.items if "trial" in _parameters(item)]
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {trial.name: pool.submit(_attack, trial, tmp_path_factory.mktemp("trial") / "it") for trial in chosen}
    pool.shutdown(cancel_futures=True)


def _attack(trial: Any, folder: Path) -> None:
    """Attack, and leave the reason of a failure at once, for who watches a long campaign."""
    try:
        trial.attack(folder)
    except BaseException:
        (folder.parent / "failure.txt").write_text(f"{trial.name}\n{traceback.format_exc()}")
        raise


def _parameters(item: pytest.Item) -> Callable[..., object] | dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, also into the file that BNN_FAULTS_TABLE names."""
    from campaign import Table

    if not Table.tried:
        return
    terminalreporter.section("faults")
    for row in Table.rows():
        terminalreporter.write_line(row)
    if name := os.environ.get("BNN_FAULTS_TABLE"):
        Path(name).write_text("\n".join(Table.rows()) + "\n")
