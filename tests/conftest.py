"""What several rooms' tests share: where optional real data lies, and in which order files run."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and models beside the checkout; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the data folder beside the checkout")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: begun last, one of them would keep a single process busy at the end."""
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in ("ipi", "slow", "dft"))}
    items.sort(key=lambda item: item.path not in long)
