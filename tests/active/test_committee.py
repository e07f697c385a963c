"""Disagreement and the choice of a batch: closed forms, brute force, laws, and the published committees' own numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from bnn_driver.active import committee
from bnn_driver.errors import BnnError

RNG = np.random.default_rng(1)


def some_forces(members: int = 4, frames: int = 5, atoms: int = 3) -> np.ndarray:
    return RNG.normal(size=(members, frames, atoms, 3))


def test_force_disagreement_is_its_formula_term_by_term() -> None:
    forces = some_forces()
    for b in range(5):
        per_atom = []
        for a in range(3):
            mean = sum(forces[m, b, a] for m in range(4)) / 4
            per_atom.append(np.sqrt(sum(np.dot(forces[m, b, a] - mean, forces[m, b, a] - mean) for m in range(4)) / 4))
        assert committee.atom_disagreement(forces)[b] == pytest.approx(per_atom)
        assert committee.force_disagreement(forces)[b] == pytest.approx(sum(per_atom) / 3)
        assert committee.largest_atom_disagreement(forces)[b] == pytest.approx(max(per_atom))


def test_two_members_that_differ_by_a_vector_disagree_by_half_its_length() -> None:
    forces = np.zeros((2, 1, 4, 3))
    forces[1] += [0.3, 0.0, 0.4]
    assert committee.force_disagreement(forces) == pytest.approx(0.25)


def test_disagreement_is_free_of_axes_atom_order_and_a_common_force() -> None:
    forces = some_forces()
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    changed = forces[:, :, [2, 0, 1]] @ turn + RNG.normal(size=(5, 3, 3))
    np.testing.assert_allclose(committee.force_disagreement(changed), committee.force_disagreement(forces))


def test_energies_are_freed_of_each_members_constants_per_element() -> None:
    """Constants of any size, per atom of an element and member, change nothing; what is left is the spread about them."""
    atoms = np.array([[2, 1], [2, 1], [4, 2], [1, 0], [5, 2], [5, 2], [3, 3], [6, 1]])
    energy = RNG.normal(size=(4, len(atoms)))
    shifted = energy + 1000.0 * RNG.normal(size=(4, 2)) @ atoms.T
    np.testing.assert_allclose(
        committee.energy_disagreement(shifted, atoms), committee.energy_disagreement(energy, atoms), atol=1e-9
    )
    assert committee.energy_disagreement(energy, atoms).max() > 0.1


def test_energies_of_one_composition_lose_the_mean_difference_alone() -> None:
    energy = RNG.normal(size=(3, 6)) + np.array([[0.0], [9.7], [-400.0]])
    difference = energy - energy.mean(axis=0)
    expected = np.sqrt(np.mean((difference - difference.mean(axis=1, keepdims=True)) ** 2, axis=0))
    np.testing.assert_allclose(committee.energy_disagreement(energy, np.tile([5, 2], (6, 1))), expected)


def test_fitted_constants_are_the_least_squares_of_all_frames() -> None:
    atoms = np.array([[2, 1], [2, 1], [2, 1], [4, 2], [1, 0], [5, 3]])
    values = RNG.normal(size=(6, 2))
    expected = atoms @ np.linalg.lstsq(atoms.astype(float), values, rcond=None)[0]
    np.testing.assert_allclose(committee.fitted_constants(values, atoms), expected, atol=1e-12)


def test_the_force_error_is_that_of_the_published_generalisation_error() -> None:
    forces, reference = some_forces()[0], some_forces()[1]
    expected = []
    for frame, truth in zip(forces, reference, strict=True):
        expected.append(np.sqrt(np.mean([np.linalg.norm(f - r) ** 2 for f, r in zip(frame, truth, strict=True)])))
    np.testing.assert_allclose(committee.force_error(forces, reference), expected)


def test_the_most_uncertain_come_in_falling_order_and_equals_in_the_order_given() -> None:
    assert committee.most_uncertain(np.array([1.0, 3.0, 2.0, 3.0, 0.0]), 4).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("shortlist", [4, 7, 30])
def test_each_diverse_frame_is_the_farthest_of_the_uncertain_ones(shortlist: int) -> None:
    scores, place, known = RNG.random(30), RNG.normal(size=(30, 4)), RNG.normal(size=(3, 4))
    chosen = committee.most_diverse(scores, place, 4, shortlist, known).tolist()
    uncertain = set(np.argsort(-scores)[:shortlist].tolist())
    assert chosen[0] == int(np.argmax(scores))
    for count in range(1, 4):
        taken = [*known, *place[chosen[:count]]]
        gap = {i: min(np.linalg.norm(place[i] - x) for x in taken) for i in uncertain - set(chosen[:count])}
        assert chosen[count] == max(gap, key=lambda i: gap[i])


def test_diverse_frames_are_never_twice_the_same_even_where_all_are_alike() -> None:
    chosen = committee.most_diverse(np.arange(6.0), np.zeros((6, 2)), 6, 6)
    assert sorted(chosen.tolist()) == list(range(6))
    assert chosen[0] == 5


def test_diversity_spreads_over_clusters_where_plain_ranking_stays_in_one() -> None:
    """The most uncertain cluster holds enough frames for the whole batch; diversity still visits all three."""
    centres = np.repeat([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], 10, axis=0)
    place = centres + 0.1 * RNG.normal(size=centres.shape)
    scores = np.repeat([3.0, 2.0, 1.0], 10) + 0.01 * RNG.random(30)
    assert {i // 10 for i in committee.most_uncertain(scores, 3)} == {0}
    assert {i // 10 for i in committee.most_diverse(scores, place, 3, 30)} == {0, 1, 2}


@pytest.mark.parametrize("k", [0, 6])
def test_more_frames_than_there_are_cannot_be_chosen(k: int) -> None:
    with pytest.raises(BnnError, match=f"k = {k}"):
        committee.most_uncertain(np.arange(5.0), k)


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(BnnError, match="frame 2 is nan"):
        committee.most_uncertain(np.array([1.0, 2.0, np.nan]), 1)


def test_a_single_model_is_no_committee() -> None:
    with pytest.raises(BnnError, match="at least 2 members"):
        committee.force_disagreement(some_forces(members=1))


def scripted_committee(files: list[Path], frames: list[ase.Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Energies (M, B) and forces (M, B, A, 3) of TorchScript MACE models for molecules of the same atoms."""
    numbers, n = frames[0].numbers, len(frames[0])
    positions = np.concatenate([a.positions for a in frames])
    energies, forces = [], []
    for file in files:
        module = torch.jit.load(str(file)).double()
        elements = [int(z) for z in module.atomic_numbers]
        pairs = [
            (b * n + i, b * n + j)
            for b, a in enumerate(frames)
            for i, j in itertools.permutations(range(n), 2)
            if a.get_distance(i, j) < float(module.r_max)
        ]
        shifts = torch.zeros(len(pairs), 3, dtype=torch.float64)
        kinds = torch.tensor([elements.index(int(z)) for z in numbers] * len(frames))
        out = module({
            "positions": torch.tensor(positions), "edge_index": torch.tensor(pairs).T, "shifts": shifts, "unit_shifts": shifts,
            "cell": torch.zeros(3 * len(frames), 3, dtype=torch.float64),
            "node_attrs": torch.nn.functional.one_hot(kinds, len(elements)).double(),
            "batch": torch.arange(len(frames)).repeat_interleave(n), "ptr": torch.arange(0, n * len(frames) + 1, n),
            "head": torch.zeros(len(frames), dtype=torch.int64),
        })  # fmt: skip
        energies.append(out["energy"].detach().numpy())
        forces.append(out["forces"].detach().numpy().reshape(len(frames), n, 3))
    return np.array(energies), np.array(forces)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "every", "disagreement", "largest", "error"),
    [
        ("zundel_1000_rpbe-d3_aims.extxyz", 4, 60.954, 157.567, 74.049),
        ("zundel_170_qbc_selected.extxyz", 1, 76.761, None, 102.860),
    ],
)
def test_the_published_committee_has_its_recorded_disagreement_and_error(
    shared_data: Path, name: str, every: int, disagreement: float, largest: float | None, error: float
) -> None:
    folder = shared_data / "zundel_eigen_qbc"
    frames = ase.io.read(folder / name, f"::{every}")
    energies, forces = scripted_committee(sorted((folder / "committee_zundel").glob("*.model")), frames)
    spread = 1e3 * committee.force_disagreement(forces)
    reference = np.array([a.arrays["REF_forces"] for a in frames])
    assert spread.mean() == pytest.approx(disagreement, abs=1e-3)
    assert largest is None or spread.max() == pytest.approx(largest, abs=1e-3)
    assert 1e3 * committee.force_error(forces.mean(axis=0), reference).mean() == pytest.approx(error, abs=1e-3)
    atoms = np.tile([5, 2], (len(frames), 1))
    assert energies.std(axis=0).mean() > 0.05, "the members' constants differ"
    assert committee.energy_disagreement(energies, atoms).mean() < 0.01, "and are no disagreement"


@pytest.mark.parametrize(("run", "disagreement"), [("ipi_run_eigen", 362.108), ("ipi_run_zundel", 18.561)])
def test_the_published_runs_have_their_recorded_disagreement(shared_data: Path, run: str, disagreement: float) -> None:
    folder = shared_data / "zundel_eigen_qbc" / run
    read = (ase.io.read(folder / f"ipi.mace_force_{m}.extxyz", ":") for m in range(4))
    forces = np.array([[a.arrays["forces_component_raw"] for a in frames] for frames in read])
    assert 1e3 * committee.force_disagreement(forces).mean() == pytest.approx(disagreement, abs=1e-3)
