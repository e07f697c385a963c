"""Inputs of the rounds of an exploration, read by i-PI's own readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bnn_driver.errors import ConfigError
from bnn_driver.ipi.inputs import read_input
from bnn_driver.ipi.preparing import START, Start, own_input, standing, template_input

ROOT = Path(__file__).resolve().parents[2]
CELL = np.array([[9.0, 0.0, 0.0], [1.0, 8.0, 0.0], [-2.0, 0.5, 7.0]])
WATER = np.array([[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.123456789012]])


def written(folder: Path, start: Start, text: str) -> Path:
    (folder / START).write_text(start.text())
    (folder / "input.xml").write_text(text)
    return folder / "input.xml"


def start(beads: int = 1) -> Start:
    shifts = 0.01 * np.arange(beads)[:, None, None]
    return Start(("O", "D", "H"), WATER + shifts, CELL)


@pytest.mark.parametrize("beads", [1, 4])
def test_the_template_is_an_input_for_ipi(tmp_path: Path, beads: int) -> None:
    found = read_input(written(tmp_path, start(), template_input(450.0, beads, 0.25, 77, "name", 2**40 + 5)))
    assert (found.n_beads, found.total_steps, found.batch_size) == (beads, 77, beads)
    assert found.endpoints[0].address == "name"
    assert found.labels == ("O", "D", "H")
    np.testing.assert_allclose(found.positions, WATER, atol=1e-9)
    np.testing.assert_allclose(found.cell, CELL, atol=1e-9)
    assert not found.pbc
    assert found.checkpoint_stride is not None
    text = (tmp_path / "input.xml").read_text()
    assert ("langevin" in text, "pile_l" in text) == (beads == 1, beads > 1)
    assert text.count("450.0") == 2, "velocities and thermostat"


@pytest.mark.parametrize("name", ["md_nvt_unix", "pimd_batched", "npt_flexible"])
def test_an_input_of_the_users_own_starts_elsewhere_and_keeps_the_rest(tmp_path: Path, name: str) -> None:
    file = ROOT / "ipi_inputs" / f"{name}.xml"
    before = read_input(file)
    place = Start(before.labels, np.repeat(before.positions[None] + 0.1, before.n_beads, axis=0), before.cell)
    found = read_input(written(tmp_path, place, own_input(file.read_text(), file, 99, before.n_beads, restart=True)))
    np.testing.assert_allclose(found.positions, before.positions + 0.1, atol=1e-9)
    np.testing.assert_allclose(found.cell, before.cell, atol=1e-9)
    assert (found.n_beads, found.total_steps, found.labels) == (before.n_beads, before.total_steps, before.labels)
    assert found.endpoints == before.endpoints
    texts = [own_input(file.read_text(), file, seed, 1, restart=False) for seed in (1, 2)]
    assert texts[0].replace("<seed>1<", "<seed>2<") == texts[1], "the seed alone"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # i-PI leaves it open
def test_beads_start_apart(tmp_path: Path) -> None:
    import ipi.engine.initializer as reading

    written(tmp_path, start(3), "")
    frames, cell = reading.init_file("xyz", str(tmp_path / START))
    places = np.array([np.array(atoms.q).reshape(-1, 3) for atoms in frames]) * 0.52917721
    np.testing.assert_allclose(places, start(3).positions, atol=1e-6)
    np.testing.assert_allclose(np.array(cell.h).T * 0.52917721, CELL, atol=1e-5)


def test_masses_stay_and_a_restart_counts_its_steps_from_zero() -> None:
    text = """<simulation><step> 40 </step><total_steps> 100 </total_steps><prng><seed> 1 </seed></prng><system>
    <initialize nbeads='1'><file mode='xyz'> a.xyz </file><masses mode='manual'> [1, 2] </masses></initialize>
    <ensemble><temperature units='kelvin'> 250 </temperature></ensemble></system></simulation>"""
    made = own_input(text, Path("x.xml"), 3, 1, restart=True)
    assert "[1, 2]" in made
    assert "a.xyz" not in made
    assert "<step>0</step>" in made
    assert "<total_steps>60</total_steps>" in made
    assert '<velocities mode="thermal" units="kelvin"> 250 </velocities>' in made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "needs an i-PI input in XML"),
        ("<simulation><system/><system/></simulation>", r"expected one <system>, but got 2"),
        ("<simulation><system><initialize/></system></simulation>", "draws velocities anew"),
    ],
)
def test_inputs_that_cannot_start_elsewhere_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        own_input(text, Path("x.xml"), 1, 1, restart=True)


def test_a_crystal_stands_as_ipi_wants_it() -> None:
    rng = np.random.default_rng(2)
    cell, positions = 5 * np.eye(3) + rng.normal(size=(3, 3)), rng.normal(size=(4, 3))
    turned, moved = standing(cell, positions)
    assert np.abs(np.triu(turned, 1)).max() < 1e-12
    assert (np.diag(turned) > 0).all()
    np.testing.assert_allclose(turned @ turned.T, cell @ cell.T)
    np.testing.assert_allclose(moved @ np.linalg.inv(turned), positions @ np.linalg.inv(cell))
    with pytest.raises(ConfigError, match="left-handed"):
        standing(cell[[1, 0, 2]], positions)
