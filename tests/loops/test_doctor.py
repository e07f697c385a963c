"""`doctor` tells what is there, what is missing and what to do, on bare machines too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from pathlib import Path

from small_run import command

ROOT = Path(__file__).resolve().parents[2]


def examined(folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and all words."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command("doctor", folder), env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def line(said: str, name: str) -> str:
    """The finding of a name, with its remedy."""
    rows = said.splitlines()
    place = next(i for i, row in enumerate(rows) if row.startswith(f"{name} "))
    return "\n".join(rows[place : place + 2])


def package(folder: Path, name: str, module: str, points: str) -> None:
    information = folder / f"{name}-1.dist-info"
    information.mkdir(parents=True)
    (folder / f"{name}.py").write_text(module)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(points)


def test_a_machine_on_which_the_tests_run_is_in_order(tmp_path: Path) -> None:
    code, said = examined(tmp_path, SLURM_JOB_ID="7", SLURM_JOB_END_TIME=str(int(time.time()) + 3630))
    assert code == 0, said
    for name in ("python", "torch", "mace-torch", "ipi", "i-pi", "oracle toy", "commands", "cores", "disk"):
        assert line(said, name)
    assert "BROKEN" not in said
    assert "loads from oracles.toy:Toy" in line(said, "oracle toy")
    assert "embedded model" in line(said, "potential")
    assert "60 min left, from SLURM_JOB_END_TIME" in line(said, "job")
    assert "locks and renames work" in line(said, "run directory")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_problems_that_need_not_stop_a_run_are_told_with_a_remedy(tmp_path: Path) -> None:
    tools, site, run = tmp_path / "tools", tmp_path / "site", tmp_path / "run"
    tools.mkdir()
    run.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA Imaginary, 81559 MiB'\n")
    (tools / "vasp_std").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    package(site, "broken", "import absent_package\n", "[bnn_driver.oracles]\nbroken = broken:Oracle\n")
    code, said = examined(
        run,
        PATH=f"{tools}:{os.environ['PATH']}",
        PYTHONPATH=f"{site}:{os.environ.get('PYTHONPATH', '')}",
        CXX="/absent/compiler",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        VASP_PP_PATH="/absent/potentials",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="4096",
    )
    assert code == 0, said
    assert "NVIDIA Imaginary" in line(said, "gpu")
    assert "PROBLEM: install the torch" in line(said, "gpu")
    assert "absent_package" in line(said, "oracle broken")
    assert "PROBLEM: reinstall" in line(said, "oracle broken")
    assert "/absent/compiler" in line(said, "kernels")
    assert "PROBLEM" in line(said, "kernels")
    assert "there is no folder /absent/potentials" in line(said, "VASP_PP_PATH")
    assert "above the number of cores" in line(said, "threads")
    assert f"vasp_std {tools / 'vasp_std'}" in line(said, "commands")


def test_a_package_that_does_not_import_is_broken_and_the_rest_is_told(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mace.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    code, said = examined(tmp_path, PYTHONPATH=f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    assert code == 3, said
    assert "libcudart.so.12" in line(said, "mace-torch")
    assert "BROKEN: pip install --force-reinstall" in line(said, "mace-torch")
    assert "nothing will run before these are mended" in said
    assert "locks and renames work" in line(said, "run directory"), "the examination went on"


def test_a_folder_that_cannot_be_used_is_broken(tmp_path: Path) -> None:
    code, said = examined(tmp_path / "absent")
    assert code == 3, said
    assert "cannot be written in" in line(said, "run directory")


def test_a_bare_python_is_examined_to_the_end(tmp_path: Path) -> None:
    """An environment without any package; the command itself needs typer, so the loop is called."""
    venv.create(tmp_path / "bare", symlinks=True)
    program = (
        "from pathlib import Path; from bnn_driver.loops.doctor import examine\n"
        "examine(Path.cwd(), lambda f: print(f.name, '|', f.text, '|', f.remedy, '|', f.required))"
    )
    done = subprocess.run(
        [str(tmp_path / "bare" / "bin" / "python"), "-s", "-c", program],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "nothing will run before these are mended" in done.stderr, done.stderr
    rows = {row.split(" | ")[0]: row for row in done.stdout.splitlines()}
    assert "not installed | pip install 'torch" in rows["torch"]
    assert rows["typer"].endswith("True")
    assert "locks and renames work" in rows["run directory"]
    assert sys.prefix not in rows["python"]
