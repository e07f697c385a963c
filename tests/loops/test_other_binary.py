"""Labels of one run come from one binary, whichever worker computes them and however new its folder is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.executors import LocalExecutor
from bnn_driver.loops.labelling import Labelling
from bnn_driver.loops.quarantine import Quarantine
from bnn_driver.oracle import fingerprint, load_oracle
from bnn_driver.records import Frames, Label
from bnn_driver.store.dataset import LabelStore

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from stand_ins.inputs import aims_command, aims_folder, water

CONTEXT: dict[str, Any] = {"step": 7, "bead": 0, "criterion": "energy", "audit": False}
NUMBERS, POSITIONS = water()


def frame(x: float) -> Frames:
    return Frames(NUMBERS, POSITIONS[None] + np.array([x, 0.0, 0.0]))


def labelled(folder: Path, version: str, x: float, audit: bool = False) -> Labelling:
    """Ask one start of the driver, with this binary, and workers whose folders are new."""
    settings = {
        "command": aims_command("compute", "--version", version),
        "folder": str(aims_folder(folder / "inputs", "xc pbe\n")),
    }
    oracle = load_oracle("aims", settings)
    with LocalExecutor("aims", settings, 1, 60.0, folder / f"work-{version}-{x}", 1, folder / "spool") as executor:
        desk = Labelling(
            LabelStore(folder / "labels"), executor, folder / "pending", fingerprint(oracle), None,
            Quarantine(folder / "quarantine", ""), code=oracle.code,
        )  # fmt: skip
        desk.recover(folder / "spool")
        if audit:
            desk.audit(frame(x), CONTEXT | {"audit": True}, print)
            desk.collect(print, timeout=60.0)
        else:
            desk.ask([frame(x)], [CONTEXT])
    return desk


@pytest.mark.parametrize("audit", [False, True])
def test_a_label_of_another_binary_is_refused_until_the_first_one_is_back(tmp_path: Path, audit: bool) -> None:
    assert len(labelled(tmp_path, "221103", 0.0).store) == 1
    for _ in range(2):  # the second start finds the label in the spool
        with pytest.raises(EnvironmentProblem, match=r'"aims 240507 cd81235a3".* come from "aims 221103 cd81235a3"') as refused:
            labelled(tmp_path, "240507", 1.0, audit)
    assert len(LabelStore(tmp_path / "labels")) == 1
    assert not (tmp_path / "quarantine").exists()  # the frame is not to blame
    (name,) = [path.name for path in (tmp_path / "spool" / "done").iterdir() if path.name in str(refused.value)]
    (tmp_path / "spool" / "done" / name).unlink()
    store = labelled(tmp_path, "221103", 1.0, audit).store
    assert {item.label.code for item in store.all()} == {"aims 221103 cd81235a3"}
    assert len(store) == 2


def adopted(folder: Path, known: str, codes: list[str]) -> list[str]:
    """Codes of all labels after these were adopted; the driver's oracle calls itself `known`."""
    desk = Labelling(
        LabelStore(folder / "labels"), None, folder / "pending", "theory", None, Quarantine(folder / "quarantine", ""), code=known
    )  # type: ignore[arg-type]
    for n, code in enumerate(codes):
        name = frame(n).content_id("theory")
        desk._adopt(frame(n), Label(0.0, np.zeros((len(NUMBERS), 3)), None, code, "theory", name, "converged"), CONTEXT)
    return [item.label.code for item in desk.store.all()]


def test_versions_that_the_fingerprint_leaves_open_may_change(tmp_path: Path) -> None:
    """A patch release of PySCF is the same theory, and so says its fingerprint; also when a worker has another one than the driver."""
    codes = ["pyscf 2.14.0", "pyscf 2.14.1", "pyscf 2.14.0"]
    assert adopted(tmp_path, "pyscf 2.14.0", codes) == codes


def test_an_output_that_names_no_version_contradicts_none(tmp_path: Path) -> None:
    codes = ["aims", "aims 221103", "aims", "aims 221103"]
    assert adopted(tmp_path, "aims", codes) == codes
    with pytest.raises(EnvironmentProblem, match='"aims 240507"'):
        adopted(tmp_path, "aims", ["aims 240507"])
