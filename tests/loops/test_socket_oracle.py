"""A whole run whose labels come from a code behind a socket, in a folder named relative to the config."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest
from ase.io import read
from small_run import program, write_run

INPUTS = Path(__file__).parents[1] / "oracles" / "inputs" / "tblite"
ORACLE = f"""
[oracle]
kind = "socket"
timeout = "5 min"
[oracle.socket]
command = "{sys.executable} client.py {{socket}}"
folder = "inputs/xtb"
templates = ["settings.json", "start.xyz"]
code = "tblite behind ASE"
converged = "stdout.txt: charges converged"
box = "0 A"
[output]
"""


@pytest.mark.ipi
def test_a_run_is_labelled_by_one_code_that_ends_with_it(tmp_path: Path) -> None:
    pytest.importorskip("tblite")
    config = write_run(tmp_path, steps=3)
    shutil.copytree(INPUTS, tmp_path / "inputs" / "xtb")
    # gentle steps: the pair potential for tests is far from a real water
    text = config.read_text().replace("step_size = 3e-3", "step_size = 3e-4").replace("0.1 eV/A", "1 eV/A")
    config.write_text(text[: text.index("[oracle]")] + ORACLE + text.split("[output]\n")[1])
    result = program("run", config, timeout=500)
    assert result.returncode == 0, result.stderr
    labels = [read(path) for path in sorted((tmp_path / "run" / "labels").glob("*.extxyz"))]
    assert {atoms.info["code"] for atoms in labels} == {"tblite behind ASE"}
    starts = [atoms.info["evidence"].rpartition("(")[2].split(",")[0] for atoms in labels]
    assert starts == ["cold start)"] + ["warm"] * (len(labels) - 1)
    end = time.monotonic() + 60.0
    while left := [p.info for p in psutil.process_iter(["cwd", "cmdline"]) if (p.info["cwd"] or "").startswith(str(tmp_path))]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
