"""Imports point downwards only, and one file imports each heavy guest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "records": 0, "units": 0, "errors": 0, "config": 0, "pool_config": 0, "explore_config": 0,
    "recipes": 0, "sections": 0, "executor_config": 0, "threads": 0,
    "potential": 1, "bayes": 1, "active": 1, "thermo": 1,
    "ipi": 2, "store": 2, "oracle": 2, "executors": 2, "oracle_worker": 2,
    "loops": 3,
    "report": 4, "cli": 5,
}  # fmt: skip
#: rooms of one floor that may know each other: the executor runs oracles
NEIGHBOURS = {("executors", "oracle"), ("oracle_worker", "oracle"), ("oracle_worker", "executors")}
#: guest -> the files that may import it
DOORS = {
    "mace": {"potential/mace.py"},
    "e3nn": {"potential/mace.py"},
    "socket": {"ipi/transport.py"},
    "parsl": {"executors/parsl.py"},
    "matplotlib": {"report/figures.py"},
}
TORCH_ROOMS = {"potential", "bayes", "loops"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "bnn_driver").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules("bnn_driver"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "oracles", f"{path} imports {name}: oracles are found by entry point"
        if parts[0] != "bnn_driver" or len(parts) == 1 or parts[1] not in FLOORS:
            continue
        there = parts[1]
        allowed = there == here or FLOORS[there] < FLOORS[here] or FLOORS[here] == 0 or (here, there) in NEIGHBOURS
        assert allowed, f"{path} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"


@pytest.mark.parametrize("path", modules("bnn_driver"), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_guest_has_one_door(path: Path) -> None:
    name = str(path.relative_to(ROOT / "bnn_driver"))
    for guest in {n.split(".")[0] for n in imported(path)}:
        if guest in DOORS:
            assert name in DOORS[guest], f"{name} imports {guest}; only {DOORS[guest]} may"
        if guest == "torch":
            assert room(path) in TORCH_ROOMS, f"{name} imports torch"


@pytest.mark.parametrize("path", modules("oracles"), ids=lambda p: str(p.relative_to(ROOT)))
def test_oracles_know_only_the_contract(path: Path) -> None:
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "bnn_driver" and len(parts) > 1:
            assert parts[1] in ("records", "units", "errors", "oracle", "ipi"), f"{path} imports {name}"


def test_asserts_and_catch_all_rooms_do_not_exist() -> None:
    for path in modules("bnn_driver") + modules("oracles"):
        assert path.stem not in ("utils", "helpers", "common", "misc")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(n, ast.Assert) for n in ast.walk(tree)), f"{path}: assert is for tests only"
