"""Oracles of the scripted code, ended with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_code import Make, left, scripted

from bnn_driver.oracle import Oracle, load_oracle


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Oracles that run below tmp_path and are ended with the test."""
    monkeypatch.chdir(tmp_path)
    made: list[Any] = []

    def one(behaviour: str = "ok", **changes: Any) -> Oracle:
        made.append(load_oracle("socket", scripted(behaviour, **changes)))
        return made[-1]

    yield one
    for oracle in made:
        oracle.close()
    assert not left(tmp_path), "processes were left behind"
