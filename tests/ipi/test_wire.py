"""Messages: layouts as i-PI writes them, units, and bytes out of step."""

import struct

import numpy as np
import pytest

from bnn_driver.errors import GuardStop, ProtocolError
from bnn_driver.ipi import wire
from bnn_driver.units import BOHR, HARTREE, HARTREE_PER_BOHR

RNG = np.random.default_rng(1)
CELL = np.array([[10.0, 0.0, 0.0], [1.0, 9.0, 0.0], [-0.5, 0.7, 8.0]])  # Å, rows


def test_every_header_has_twelve_bytes():
    assert {len(word) for word in (wire.STATUS, wire.INIT, wire.FORCEREADY, wire.EXIT)} == {12}
    assert wire.header("getforce") == b"GETFORCE    "


def test_plain_posdata_is_cell_inverse_count_positions_with_vectors_in_columns():
    x = RNG.normal(size=(1, 4, 3))
    data = wire.pack_posdata(x, CELL[None], batched=False)
    h = np.frombuffer(data, np.float64, 9, offset=12).reshape(3, 3)
    assert data[:12] == b"POSDATA     "
    assert h == pytest.approx(CELL.T / BOHR, rel=1e-15)  # columns are the vectors: upper triangular
    assert h[1, 0] == h[2, 0] == h[2, 1] == 0.0
    assert np.frombuffer(data, np.float64, 9, offset=84).reshape(3, 3) @ h == pytest.approx(np.eye(3), abs=1e-14)
    assert struct.unpack_from("=i", data, 156) == (4,)
    assert np.frombuffer(data, np.float64, offset=160) == pytest.approx(x.ravel() / BOHR, rel=1e-15)


def test_positions_and_cell_return_from_a_batched_message():
    x, cell = RNG.normal(size=(3, 5, 3)), np.array([CELL, 1.1 * CELL, CELL + 0.01])
    data = wire.pack_posdata(x, cell, batched=True)
    n_atoms = wire.unpack_count(data[12:16], "atoms")
    body = data[16:]
    assert len(body) == wire.posdata_body_size(n_atoms, 3)
    back_x, back_cell = wire.decode_frames(*wire.split_batched_posdata(body, n_atoms, 3), n_atoms)
    assert back_x == pytest.approx(x, rel=1e-14)  # two conversions, one rounding each
    assert back_cell == pytest.approx(cell, rel=1e-14)


def test_results_return_in_ev_and_angstrom():
    e, f, w = RNG.normal(size=1), RNG.normal(size=(1, 4, 3)), RNG.normal(size=(1, 3, 3))
    data = wire.pack_forces(e, f, w, ["{}"])
    assert data[:12] == wire.FORCEREADY
    assert struct.unpack_from("=d", data, 12)[0] == pytest.approx(e[0] / HARTREE, rel=1e-15)
    assert np.frombuffer(data, np.float64, 12, offset=24) == pytest.approx(f.ravel() / HARTREE_PER_BOHR, rel=1e-15)
    energy, forces, virial = wire.decode_forces(data[12:20], data[24:120], data[120:192])
    assert energy == pytest.approx(e[0], rel=1e-14)
    assert forces == pytest.approx(f[0], rel=1e-14)
    assert virial == pytest.approx(w[0], rel=1e-14)
    assert data[192:] == struct.pack("=i", 2) + b"{}"


def test_length_of_extras_counts_bytes_not_characters():
    text = '{"unit": "Å"}'
    assert wire.pack_extras([text]) == struct.pack("=i", len(text) + 1) + text.encode()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (" ", 1),
        ("  batch_size:4", 4),
        (" template : init.xyz , , batch_size:32", 32),
        (" batch_size : 7 , , batch_size:4", 4),  # a user's own parameter comes first; i-PI's counts
        (" batch_size : many , ", 1),
        (" my_batch_size : 3 , ", 1),
    ],
)
def test_batch_size_is_read_from_the_text_of_init(text: str, size: int):
    assert wire.batch_size(text) == size


def test_positions_that_are_not_finite_are_refused_with_the_place():
    x = np.zeros((2, 12))
    x[1, 7] = np.nan
    with pytest.raises(GuardStop, match="atom 2 of structure 1"):
        wire.decode_frames(np.ones((2, 9)), x, 4)
    with pytest.raises(GuardStop, match="the cell"):
        wire.decode_frames(np.full((2, 9), np.inf), np.zeros((2, 12)), 4)


@pytest.mark.parametrize("value", [-1, 2_000_000_000])
def test_absurd_count_means_out_of_step(value: int):
    with pytest.raises(ProtocolError, match="out of step"):
        wire.unpack_count(struct.pack("=i", value), "atoms")
