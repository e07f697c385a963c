"""Which frames of a pool are held back, which are learnt first, and which may be chosen; everything that cannot be is said here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from bnn_driver.active.likeness import Gallery
from bnn_driver.errors import ConfigError
from bnn_driver.loops.screening import different
from bnn_driver.loops.seeds import generator
from bnn_driver.pool_config import SelectConfig
from bnn_driver.records import Array
from bnn_driver.store.pool import Keys, Pool, formula


@dataclass(frozen=True, eq=False)
class Division:
    """Numbers in the pool; no frame is in two of them."""

    test: Array
    """Never learnt; other frames that are nearly one of them are never learnt either."""
    start: Array
    candidates: Array


def open_pool(config: SelectConfig, base: Path) -> Pool:
    """The pool, and behind it the files of test and start frames where these are files.  Raises: ConfigError."""
    p, system = config.pool, config.system
    files = [p.file, *(name for name in (p.test, p.start) if isinstance(name, str))]
    keys = Keys(
        p.energy_key, p.forces_key, p.stress_key, p.charge_key, p.multiplicity_key, p.level_key, system.charge, system.multiplicity
    )  # fmt: skip
    pool = Pool(tuple(base / name for name in files), keys)
    if "periodic" in system.model_fields_set:
        for number, kind in enumerate(pool.kinds):
            if kind[1] != system.periodic:
                where = pool.where(int(np.argmax(pool.kind == number)))
                raise ConfigError(
                    f"[system] periodic = {str(system.periodic).lower()}, but pbc says otherwise in {where}; correct one of them"
                )
    return pool


def check_elements(pool: Pool, known: tuple[int, ...], model: str) -> None:
    """Raises: ConfigError naming the first frame with an element that the model does not know."""
    unknown = [z for z in pool.elements if z not in known]
    if unknown:
        names = ", ".join(chemical_symbols[z] for z in known)
        raise ConfigError(
            f"{pool.where(pool.first_with(unknown[0]))} has the element {chemical_symbols[unknown[0]]}, which [potential] model {model} "
            f"does not know (it knows {names}); use another model, or take such frames out"
        )


def divide(pool: Pool, config: SelectConfig) -> Division:
    """Draw what is to be drawn, from seeds of their own.

    Raises: ConfigError when the pool is too small for the test and start frames and one batch, or the numbers of start frames are
        not in it.
    """
    p, seed = config.pool, config.run.seed
    own = pool.of_file(0)
    given = _given_start(pool, config)
    rest = np.setdiff1d(own, given)
    wanted = (p.test if isinstance(p.test, int) else 0, p.start if isinstance(p.start, int) else 0, p.batch)
    if sum(wanted) > len(rest):
        raise ConfigError(
            f"{pool.files[0]} has {len(rest)} frames to choose from, but {wanted[0]} test frames, {wanted[1]} start frames and "
            f"batches of {wanted[2]} are wanted; lower [pool] test, start or batch, or give a larger pool"
        )
    test = (
        pool.of_file(1)
        if isinstance(p.test, str)
        else _drawn_test(pool, rest, wanted[0], gallery_of(pool, given, p.duplicates), seed)
    )
    held = gallery_of(pool, test, p.duplicates)
    rest = np.setdiff1d(rest, test)
    start = given if len(given) else _drawn(pool, rest, wanted[1], held, seed)
    _check_start(pool, start, config)
    for index in given:
        if held.has(pool.one(int(index)).frames):
            raise ConfigError(
                f"{pool.where(int(index))} is a start frame, but nearly the same as a test frame; leave it out of one of them"
            )
    _check_constants(pool, start)
    candidates = np.setdiff1d(rest, start)
    _check_usable(pool, candidates, held, start, config)
    return Division(test, start, candidates)


def gallery_of(pool: Pool, index: Array, tolerance: float) -> Gallery:
    """Some frames of the pool, for comparison."""
    gallery = Gallery(tolerance)
    for i in index:
        gallery.add(pool.one(int(i)).frames)
    return gallery


def _given_start(pool: Pool, config: SelectConfig) -> Array:
    """Start frames that the user named; empty when they are to be drawn."""
    start = config.pool.start
    if isinstance(start, str):
        return pool.of_file(len(pool.files) - 1)
    if isinstance(start, int):
        return np.zeros(0, dtype=np.int64)
    size = pool.first[1]
    if max(start) >= size:
        raise ConfigError(f"[pool] start names frame {max(start)}, but {pool.files[0]} has the frames 0 to {size - 1}")
    return np.array(start, dtype=np.int64)


def _drawn_test(pool: Pool, rest: Array, count: int, given: Gallery, seed: int) -> Array:
    """Test frames that are not nearly one of the start frames that the user named."""
    drawn: list[int] = []
    for index in generator(seed, "test").permutation(rest).tolist():
        if len(drawn) < count and not given.has(pool.one(index).frames):
            drawn.append(index)
    if len(drawn) < count:
        raise ConfigError(
            f"{pool.files[0]} has only {len(drawn)} of {count} test frames that are not nearly a start frame; lower [pool] test"
        )
    return np.sort(np.array(drawn, dtype=np.int64))


def _drawn(pool: Pool, rest: Array, count: int, held: Gallery, seed: int) -> Array:
    order = _spanning_first(pool, rest, generator(seed, "start").permutation(len(rest)), held)
    rows, passed = different(pool, rest, order, count, held)
    if len(rows) < count:
        raise ConfigError(
            f"{pool.files[0]}: {len(passed)} of {len(rest)} frames are nearly the same as a test frame or as each other ([pool] duplicates), "
            f"and only {len(rows)} of {count} start frames are left; lower duplicates or start"
        )
    return rest[rows]


def _spanning_first(pool: Pool, rest: Array, order: Array, held: Gallery) -> Array:
    """The same order but for the first frames that, together, fix the constants of the energies of all elements; they come first."""
    atoms = pool.atoms()[rest]
    kind_of = np.unique(atoms, axis=0, return_inverse=True)[1].ravel()
    needed: list[int] = []
    for kind in kind_of[order][np.sort(np.unique(kind_of[order], return_index=True)[1])]:
        own = order[kind_of[order] == kind].tolist()
        if np.linalg.matrix_rank(atoms[[*needed, own[0]]]) > len(needed):
            needed += next(([row] for row in own if not held.has(pool.one(int(rest[row])).frames)), [])
    return np.array([*needed, *(row for row in order.tolist() if row not in needed)])


def _check_start(pool: Pool, start: Array, config: SelectConfig) -> None:
    """Raises: ConfigError for start frames that are the same structure, too few for models from scratch, or beyond the budget."""
    first: dict[str, int] = {}
    for index in start.tolist():
        before = first.setdefault(pool.one(index).frames.content_id(""), index)
        if before != index:
            raise ConfigError(
                f"{pool.where(index)} and {pool.where(before)} are start frames of the same structure; leave one out"
            )
    if config.committee.kind == "scratch" and len(start) < 2:
        raise ConfigError(
            "models from scratch need at least 2 labels, one of which each holds back to judge itself; raise [pool] start"
        )
    budget = config.pool.max_labels
    if budget is not None and len(start) > budget:
        raise ConfigError(
            f"[pool] max_labels = {budget}, but there are {len(start)} start frames; raise max_labels or lower start"
        )


def _check_constants(pool: Pool, start: Array) -> None:
    """Raises: ConfigError when the start frames leave constants open that energies of other frames have."""
    atoms = pool.atoms()
    known, rank = atoms[start], np.linalg.matrix_rank(atoms[start])
    for number in range(len(pool.kinds)):
        index = int(np.argmax(pool.kind == number))
        if np.linalg.matrix_rank(np.vstack([known, atoms[index]])) > rank:
            raise ConfigError(
                f"the start frames do not fix the constants of the energies of {formula(pool.kinds[number][0])} ({pool.where(index)}): the "
                f"pool's compositions need at least {np.linalg.matrix_rank(atoms)} start frames of different ones; add one to [pool] start"
            )


def _check_usable(pool: Pool, candidates: Array, held: Gallery, start: Array, config: SelectConfig) -> None:
    """At least one batch must be left beside test and start frames and what is nearly the same."""
    taken = gallery_of(pool, start, config.pool.duplicates)
    left = 0
    for index in candidates:
        frame = pool.one(int(index)).frames
        if not (held.has(frame) or taken.has(frame)):
            taken.add(frame)
            left += 1
        if left == config.pool.batch:
            return
    raise ConfigError(
        f"the pool is used up before the first round: of {len(candidates)} frames beside the {len(start)} start frames, {left} are "
        f"not nearly the same as another, a test or a start frame, but a batch has {config.pool.batch}; lower [pool] batch or "
        "duplicates, or give a larger pool"
    )
