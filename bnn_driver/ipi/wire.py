"""i-PI messages <-> bytes and arrays, plain and batched; atomic units end here.

Every header is 12 ASCII bytes; integers are native int32, floats native float64.  i-PI sends a cell as the 9 numbers of h,
whose COLUMNS are the vectors; here vectors are rows.  Layouts (B structures of A atoms, bohr and hartree):

    plain    POSDATA h[9] ih[9] A pos[3A]               FORCEREADY pot A force[3A] virial[9] n extras[n]
    batched  POSDATA A B*(h[9] ih[9]) B*pos[3A]         FORCEREADY pot[B] A force[B*3A] virial[B*9] B*(n extras[n])
    shm      POSDATA A (6 names, the first time only)   FORCEREADY B*(n extras[n]), numbers in shared memory

Source: ipi/interfaces/sockets.py of i-PI 3.3.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bnn_driver.errors import GuardStop, ProtocolError
from bnn_driver.records import Array
from bnn_driver.units import BOHR, HARTREE, HARTREE_PER_BOHR

HEADER_SIZE = 12
CELLS_SIZE = 18 * 8  # h and its inverse
MOST_ATOMS = 10_000_000
MOST_TEXT = 10_000_000  # bytes of one INIT or extras
MOST_STRUCTURES = 100_000  # of one batch
SEGMENTS = ("pos", "h", "ih", "pot", "force", "vir")  # order of the names in the first shm POSDATA


def header(word: str) -> bytes:
    """The 12 bytes of a header word."""
    return word.upper().ljust(HEADER_SIZE).encode("ascii")


STATUS, INIT, POSDATA, GETFORCE, EXIT = map(header, ("status", "init", "posdata", "getforce", "exit"))
NEEDINIT, READY, HAVEDATA, FORCEREADY = map(header, ("needinit", "ready", "havedata", "forceready"))


def pack_int(value: int) -> bytes:
    """One native int32."""
    return np.int32(value).tobytes()


def unpack_int(data: bytes) -> int:
    """The native int32 of 4 bytes."""
    return int(np.frombuffer(data, np.int32)[0])


def unpack_count(data: bytes, what: str, limit: int = MOST_TEXT, least: int = 0) -> int:
    """An int32 that counts `what`.  Raises: ProtocolError outside [least, limit], as out-of-step bytes would give."""
    value = unpack_int(data)
    if not least <= value <= limit:
        raise ProtocolError(f"expected the number of {what} ({least} to {limit}) but got {value}: the two sides are out of step")
    return value


def unpack_atoms(data: bytes) -> int:
    """The number of atoms of a message.  Raises: ProtocolError outside [1, MOST_ATOMS]."""
    return unpack_count(data, "atoms", MOST_ATOMS, least=1)


def batch_size(parameters: str) -> int:
    """Structures per request that the text of INIT announces; 1 where it says nothing.

    i-PI appends "batch_size:B" to the text, so the last one counts, as in i-PI's own driver.
    Raises: ProtocolError beyond MOST_STRUCTURES.
    """
    size = 1
    for token in parameters.split(","):
        key, _, value = token.partition(":")
        if key.strip() == "batch_size" and re.fullmatch(r"\s*[0-9]+\s*", value):
            digits = value.strip().lstrip("0")
            if len(digits) > len(str(MOST_STRUCTURES)) or int(digits or 0) > MOST_STRUCTURES:
                raise ProtocolError(f"INIT announces batch_size:{digits[:20]}, expected at most {MOST_STRUCTURES}")
            size = max(1, int(digits or 0))
    return size


def pack_init(parameters: str, request_id: int = 0) -> bytes:
    """INIT with its text."""
    text = parameters.encode()
    return INIT + pack_int(request_id) + pack_int(len(text)) + text


def decode_cell(h: Array) -> Array:
    """(B, 9) bohr, vectors in columns -> (B, 3, 3) Å, vectors in rows."""
    return h.reshape(-1, 3, 3).swapaxes(1, 2) * BOHR


def encode_cell(cell: Array) -> tuple[Array, Array]:
    """(B, 3, 3) Å, vectors in rows -> h and its inverse, (B, 9) bohr and 1/bohr, vectors in columns."""
    h = np.ascontiguousarray(cell.swapaxes(1, 2)) / BOHR
    return h.reshape(-1, 9), np.linalg.inv(h).reshape(-1, 9)


def decode_frames(h: Array, positions: Array, n_atoms: int) -> tuple[Array, Array]:
    """Positions (B, A, 3) Å and cells (B, 3, 3) Å of what i-PI sent: h (B, 9) and positions (B, 3A) in bohr.

    Raises: GuardStop on a NaN or an infinity, which i-PI passes on unchecked.
    """
    if not (np.isfinite(positions).all() and np.isfinite(h).all()):
        atom = int(np.argwhere(~np.isfinite(positions.reshape(-1, 3)).all(axis=1)).min(initial=len(positions) * n_atoms))
        where = "the cell" if atom == len(positions) * n_atoms else f"atom {atom % n_atoms} of structure {atom // n_atoms}"
        raise GuardStop(
            f"i-PI sent a position that is not finite ({where}): the trajectory is lost from here on. "
            "Reduce the timestep or look at i-PI's last outputs, and restart from the last checkpoint"
        )
    return positions.reshape(-1, n_atoms, 3) * BOHR, decode_cell(h)


def posdata_body_size(n_atoms: int, batch: int) -> int:
    """Bytes that follow the atom count: of a plain POSDATA (batch = 1) only the positions."""
    return 24 * n_atoms if batch == 1 else batch * (CELLS_SIZE + 24 * n_atoms)


def split_batched_posdata(data: bytes, n_atoms: int, batch: int) -> tuple[Array, Array]:
    """h (B, 9) and positions (B, 3A) in bohr out of the body of a batched POSDATA."""
    numbers = np.frombuffer(data, np.float64)
    return numbers[: batch * 18].reshape(batch, 18)[:, :9], numbers[batch * 18 :].reshape(batch, 3 * n_atoms)


def pack_posdata(positions: Array, cell: Array, batched: bool) -> bytes:
    """POSDATA for positions (B, A, 3) Å and cell (B, 3, 3) Å rows; plain takes B = 1."""
    h, inverse = encode_cell(cell)
    cells = np.concatenate([h, inverse], axis=1).tobytes()
    atoms = pack_int(positions.shape[1])
    return POSDATA + (atoms + cells if batched else cells + atoms) + (positions / BOHR).tobytes()


def pack_extras(extras: Sequence[str]) -> bytes:
    """Length (in bytes, not characters) and text of each."""
    texts = [text.encode() for text in extras]
    return b"".join(pack_int(len(text)) + text for text in texts)


def pack_forces(energy: Array, forces: Array, virial: Array, extras: Sequence[str]) -> bytes:
    """FORCEREADY with energy (B,) eV, forces (B, A, 3) eV/Å, virial (B, 3, 3) eV and B texts.

    The plain layout is the batched one with B = 1.
    """
    return b"".join(
        (
            FORCEREADY,
            (np.asarray(energy, np.float64) / HARTREE).tobytes(),
            pack_int(forces.shape[1]),
            (np.asarray(forces, np.float64) / HARTREE_PER_BOHR).tobytes(),
            (np.asarray(virial, np.float64) / HARTREE).tobytes(),
            pack_extras(extras),
        )
    )


def decode_forces(energy: bytes, forces: bytes, virial: bytes) -> tuple[float, Array, Array]:
    """Energy eV, forces (A, 3) eV/Å and virial (3, 3) eV out of a plain FORCEREADY; absurd ones may become infinite."""
    with np.errstate(over="ignore"):
        return (
            float(np.frombuffer(energy, np.float64)[0]) * HARTREE,
            np.frombuffer(forces, np.float64).reshape(-1, 3) * HARTREE_PER_BOHR,
            np.frombuffer(virial, np.float64).reshape(3, 3) * HARTREE,
        )
