"""A pool is read as it was written, by the keys that were asked for; what cannot be learnt together is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from bnn_driver.errors import ConfigError
from bnn_driver.store.pool import Keys, Pool, formula

KEYS = Keys("REF_energy", "REF_forces")
RNG = np.random.default_rng(3)


def labelled(symbols: str, energy: float, cell: np.ndarray | None = None, **info: object) -> Atoms:
    n = len(Atoms(symbols))
    atoms = Atoms(symbols, positions=RNG.uniform(0, 4, (n, 3)), cell=cell, pbc=cell is not None)
    atoms.info |= {"REF_energy": energy, "step": 7, "note": "a word", **info}
    atoms.arrays["REF_forces"] = RNG.normal(size=(n, 3))
    atoms.arrays["momenta"] = RNG.normal(size=(n, 3))
    return atoms


def waters(count: int = 6) -> list[Atoms]:
    return [labelled("OH2", -10.0 + 0.01 * i) for i in range(count)]


def written(folder: Path, frames: list[Atoms], name: str = "pool.extxyz") -> Path:
    ase.io.write(folder / name, frames, format="extxyz")
    return folder / name


def test_frames_come_back_as_ase_reads_them(tmp_path: Path) -> None:
    """Different compositions, orders of atoms and cells in one file; ASE's own reader is the reference."""
    cell = np.array([[5.0, 0.3, 0.0], [0.0, 6.0, 0.2], [0.1, 0.0, 7.0]])
    stress = "0.1 0.01 0.02 0.01 0.2 0.03 0.02 0.03 0.3"
    mixed = [
        labelled("OH2", -10.0),
        labelled("H2O", -10.1),
        labelled("CO", -30.0),
        labelled("OH2", -10.2),
        labelled("OH2", -10.3),
    ]
    file = written(tmp_path, mixed)
    pool = Pool((file,), KEYS)
    assert (len(pool), pool.elements, len(pool.kinds)) == (5, (1, 6, 8), 3)
    assert pool.atoms().tolist() == [[2, 0, 1], [2, 0, 1], [0, 1, 1], [2, 0, 1], [2, 0, 1]]
    seen = []
    for batch in pool.batches(range(5)):
        for row, number in enumerate(batch.index):
            truth = ase.io.read(file, int(number))
            np.testing.assert_array_equal(batch.frames.positions[row], truth.positions)
            np.testing.assert_array_equal(batch.frames.numbers, truth.numbers)
            np.testing.assert_array_equal(batch.forces[row], truth.arrays["REF_forces"])
            assert batch.energy[row] == truth.info["REF_energy"] == pool.energy[number]
            seen.append(int(number))
    assert sorted(seen) == list(range(5))
    crystal = written(tmp_path, [labelled("CuAu", -5.0, cell, my_stress=stress)], "crystal.extxyz")
    one = Pool((crystal,), Keys("REF_energy", "REF_forces", "my_stress")).one(0)
    np.testing.assert_allclose(one.frames.cell[0], ase.io.read(crystal).cell.array)
    assert one.stress[0, 0].tolist() == [0.1, 0.01, 0.02]


def test_what_ase_calls_energy_and_forces_is_read_when_asked_for(tmp_path: Path) -> None:
    atoms = Atoms("OH2", positions=RNG.uniform(0, 4, (3, 3)))
    forces = RNG.normal(size=(3, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.25, forces=forces)
    pool = Pool((written(tmp_path, [atoms]),), Keys("energy", "forces"))
    assert pool.one(0).energy.tolist() == [-3.25]
    np.testing.assert_allclose(pool.one(0).forces[0], forces, atol=1e-8)


def test_batches_hold_about_as_many_atoms_as_asked_for_and_a_pool_may_be_larger(tmp_path: Path) -> None:
    pool = Pool((written(tmp_path, waters(25)),), KEYS)
    sizes = [len(batch.frames) for batch in pool.batches(range(25), atoms=12)]
    assert sizes == [4] * 6 + [1]


def test_several_files_are_numbered_through(tmp_path: Path) -> None:
    files = written(tmp_path, waters(4)), written(tmp_path, waters(3), "test.extxyz")
    pool = Pool(files, KEYS)
    assert pool.of_file(1).tolist() == [4, 5, 6]
    np.testing.assert_array_equal(pool.one(5).frames.positions[0], ase.io.read(files[1], 1).positions)
    assert "test.extxyz, frame 1" in pool.where(5)
    assert len(set(pool.checksums)) == 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (Keys("", "REF_forces"), "energy_key is missing and is not guessed"),
        (Keys("REF_energy", ""), "there are: REF_forces, momenta"),
        (Keys("energy", "REF_forces"), "there are: REF_energy, step"),
        (Keys("REF_energy", "forces"), "there are: REF_forces, momenta"),
        (Keys("note", "REF_forces"), "not a number"),
        (Keys("REF_energy", "REF_forces", "stress"), "stress_key"),
        (Keys("REF_energy", "REF_forces", "step"), "9, or 6"),
        (Keys("REF_energy", "REF_forces", charge="q"), "charge_key"),
        (Keys("REF_energy", "REF_forces", level="theory"), "level_key"),
    ],
)
def test_keys_are_never_guessed_and_candidates_are_listed(tmp_path: Path, keys: Keys, says: str) -> None:
    with pytest.raises(ConfigError, match=r"pool\.extxyz") as refusal:
        Pool((written(tmp_path, waters()),), keys)
    assert says in str(refusal.value)


def test_a_frame_without_label_is_named(tmp_path: Path) -> None:
    frames = waters()
    del frames[4].info["REF_energy"]
    with pytest.raises(ConfigError, match=r"frame 4 \(line 21\): there is no 'REF_energy'"):
        Pool((written(tmp_path, frames),), KEYS)


@pytest.mark.parametrize("where", ["energy", "forces", "positions"])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, where: str) -> None:
    frames = waters()
    if where == "energy":
        frames[2].info["REF_energy"] = np.nan
    else:
        (frames[2].arrays["REF_forces"] if where == "forces" else frames[2].positions)[1, 1] = np.inf
    with pytest.raises(ConfigError, match=r"frame 2 \(line 11\).*not finite"):
        Pool((written(tmp_path, frames),), KEYS)


def test_levels_of_theory_that_name_themselves_do_not_mix(tmp_path: Path) -> None:
    frames = [labelled("OH2", -10.0, theory=name) for name in ("pbe", "pbe", "hse")]
    file = written(tmp_path, frames)
    Pool((file,), KEYS)
    with pytest.raises(ConfigError, match=r"pbe in .*frame 0.*hse in .*frame 2"):
        Pool((file,), Keys("REF_energy", "REF_forces", level="theory"))


def test_a_pool_of_which_a_part_names_its_level_is_refused(tmp_path: Path) -> None:
    frames = [labelled("OH2", -10.0), *waters()]
    frames[0].info["fingerprint"] = "abc"
    with pytest.raises(ConfigError, match=r"abc in .*frame 0.*nothing said in .*frame 1"):
        Pool((written(tmp_path, frames),), KEYS)
    assert Pool((written(tmp_path, waters()),), KEYS).level == ""


@pytest.mark.parametrize(("shift", "two"), [(0.3, False), (0.8, True)])
def test_two_groups_of_energies_are_seen_nearer_to_each_other_than_one_frame(tmp_path: Path, shift: float, two: bool) -> None:
    """PBE and B3LYP differ by 0.8 eV per atom for water; one frame that is 2 eV per atom higher is a frame that is squeezed."""
    rng = np.random.default_rng(0)
    frames = [labelled("OH2", -2080.0 + x) for x in [*rng.normal(0, 0.1, 8), *rng.normal(3 * shift, 0.1, 8)]]
    for i, atoms in enumerate(frames):
        atoms.positions[0, 0] += 0.01 * i
    Pool((written(tmp_path, [*frames[:8], labelled("OH2", -2074.0)]),), KEYS)
    third = [labelled("OH2", -2080.0 + x) for x in rng.normal(6 * shift, 0.1, 8)]
    lone = labelled("OH2", -2078.0 + 3 * shift)
    if two:
        for pool in (frames, [*frames, *third], [*frames, lone]):
            with pytest.raises(ConfigError, match="do not mix"):
                Pool((written(tmp_path, pool),), KEYS)
    else:
        Pool((written(tmp_path, frames),), KEYS)


def test_one_structure_with_two_labels_is_two_levels_of_theory(tmp_path: Path) -> None:
    frames = waters()
    again = frames[1].copy()
    Pool((written(tmp_path, [*frames, again]),), KEYS)
    again.info["REF_energy"] += 0.5
    with pytest.raises(ConfigError, match=r"frame 6 .* is that of .*frame 1 .*energy"):
        Pool((written(tmp_path, [*frames, again]),), KEYS)
    again.info["REF_energy"] -= 0.5
    again.arrays["REF_forces"] = 1.1 * again.arrays["REF_forces"]
    with pytest.raises(ConfigError, match="rms force"):
        Pool((written(tmp_path, [*frames, again]),), KEYS)


def test_energies_of_two_codes_are_seen(tmp_path: Path) -> None:
    far = [labelled("OH2", -2080.0), labelled("CO", -3080.0)]
    same = [*waters(), far[0]]
    for frame in same:
        frame.info["theory"] = "pbe"
    Pool((written(tmp_path, same),), Keys("REF_energy", "REF_forces", level="theory"))
    Pool((written(tmp_path, [*waters(), far[1]]),), KEYS)
    with pytest.raises(ConfigError, match=r"-2080 eV in .*frame 6.*do not mix"):
        Pool((written(tmp_path, [*waters(), far[0]]),), KEYS)


def test_the_published_frames_at_two_levels_are_told_apart(shared_data: Path) -> None:
    folder = shared_data / "zundel_eigen_qbc"
    aims, dftb = folder / "zundel_1000_rpbe-d3_aims.extxyz", folder / "zundel_1000_dftb3.extxyz"
    pool = Pool((aims,), KEYS)
    assert (len(pool), [formula(kind[0]) for kind in pool.kinds]) == (1000, ["H5O2"])
    with pytest.raises(ConfigError, match="do not mix"):
        Pool((aims, dftb), KEYS)


def test_charge_and_spin_are_carried_and_contradictions_refused(tmp_path: Path) -> None:
    file = written(tmp_path, [labelled("OH3", -10.0, charge=1), labelled("OH2", -9.0, charge=0, multiplicity=3)])
    with pytest.raises(ConfigError, match="charge_key = 'charge'"):
        Pool((file,), KEYS)
    with pytest.raises(ConfigError, match="multiplicity is 3, but"):
        Pool((file,), Keys("REF_energy", "REF_forces", charge="charge"))
    with pytest.raises(ConfigError, match="multiplicity_key"):
        Pool((file,), Keys("REF_energy", "REF_forces", charge="charge", multiplicity="multiplicity"))
    ions = written(tmp_path, [labelled("OH3", -10.0), labelled("OH2", -9.0)])
    assert [kind[2:] for kind in Pool((ions,), Keys("REF_energy", "REF_forces", default_charge=1)).kinds] == [(1, 1)] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-20], "line 26"),
        (lambda text: text.replace("3\n", "three\n", 1), "line 1: expected the number of atoms"),
        (lambda text: text.replace("H ", "Xx ", 1), "not a frame of extended XYZ"),
        (lambda text: text.replace('pbc="F F F"', 'pbc="T F F"', 1), "some directions only"),
        (lambda text: text.replace('pbc="F F F"', 'pbc="T T T"', 1), "no cell"),
        (lambda text: text.replace("note=", "REF_energy=-2.0 note=", 1), "REF_energy stands twice in the comment line"),
        (lambda text: text.replace("momenta:R", "REF_forces:R", 1), "REF_forces stands twice in Properties"),
        (lambda text: "", "holds no frame"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    file = written(tmp_path, waters())
    file.write_text(change(file.read_text()))
    with pytest.raises(ConfigError, match=r"pool\.extxyz") as refusal:
        Pool((file,), KEYS)
    assert says in str(refusal.value)


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, waters())
    pool = Pool((file,), KEYS)
    file.write_text("\n" + file.read_text())
    with pytest.raises(ConfigError, match="has changed while it was in use"):
        pool.one(3)


def test_a_multiplicity_is_at_least_one(tmp_path: Path) -> None:
    file = written(tmp_path, [labelled("OH2", -10.0, spin=0)])
    with pytest.raises(ConfigError, match=r"spin is 0, expected 2 S \+ 1"):
        Pool((file,), Keys("REF_energy", "REF_forces", multiplicity="spin"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.extxyz cannot be read"):
        Pool((tmp_path / "absent.extxyz",), KEYS)
