"""An oracle is a frozen dataclass called as `oracle(frame) -> Label`; here it is found, named, checked and called.

Every label passes `label`, so a frame that is unfit and a result that contradicts itself are refused in one place.  Finished
labels and failures wait in a spool until the driver takes them:

    SPOOL/done/FRAME_ID.json      the label, written once, by rename
    SPOOL/failed/FRAME_ID.json    class, message and count of the failures
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_type_hints, runtime_checkable

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from pydantic import ConfigDict, TypeAdapter, ValidationError

from bnn_driver import units
from bnn_driver.errors import (
    ConfigError,
    EnvironmentProblem,
    GeometryRejected,
    OracleConfigError,
    OracleInconsistent,
    writing,
)
from bnn_driver.records import Array, Frames, Label

GROUP = "bnn_driver.oracles"
"""The entry points under which oracles are found."""


@dataclass(frozen=True)
class Capabilities:
    """What a code, with these settings, can label."""

    stress: bool
    """Labels of periodic frames carry the stress."""
    periodic: bool
    charge: bool
    """False: only neutral frames."""
    spin: bool
    """False: only multiplicity 1."""


@dataclass(frozen=True)
class Limits:
    """Beyond these a frame or a result is refused, whatever the code says."""

    min_distance: float = 0.5
    """Å, between any two atoms."""
    covalent_fraction: float = 0.3
    """Least distance as a share of the sum of the covalent radii; the larger of both rules holds."""
    max_force: float = 100.0
    """eV/Å, largest norm of the force on an atom."""
    max_net_force: float = 5e-3
    """eV/Å, largest norm of the sum of all forces on a molecule."""


@runtime_checkable
class Oracle(Protocol):
    """What every file in `oracles/` provides; the fields of the dataclass are the keys of the table [oracle.KIND].

    A field that carries a unit declares its kind, `field(default=..., metadata={"quantity": "force"})`, and is given as a string;
    one that is a path declares {"path": True}, and is seen from the folder of the config file, but for what {"names": (...)} lists.
    """

    @property
    def code(self) -> str:
        """Name and version."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can label."""

    def physics(self) -> dict[str, Any]:
        """Every option that fixes the level of theory, with the version of the code; JSON-able."""

    def check(self, frame: Frames) -> None:
        """Cheap test that these settings can work for such a frame.  Raises: OracleConfigError, EnvironmentProblem."""

    def __call__(self, frame: Frames) -> Label:
        """Label one frame (B = 1).  Raises: OracleError; a result that is not converged is never returned."""


def fingerprint(oracle: Oracle) -> str:
    """SHA-256 of the canonical JSON of the oracle's class and physics, 64 hex digits."""
    facts = {"class": type(oracle).__name__, "physics": oracle.physics()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def load_oracle(kind: str, settings: dict[str, Any]) -> Oracle:
    """The oracle registered as `kind`, with the settings of its table.

    Args: kind: name of an entry point of the group bnn_driver.oracles.   settings: as read from TOML.
    Raises: ConfigError for an unknown kind or key, a missing key, a value of a wrong type; EnvironmentProblem if it has no code.
    """
    cls = _oracle_class(kind)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in settings:
        if key not in fields:
            raise ConfigError(
                f"[oracle.{kind}] unknown key {key!r}{_nearest(key, list(fields))}; known keys: {', '.join(fields) or 'none'}"
            )
    for name, item in fields.items():
        if name not in settings and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"[oracle.{kind}] {name} is missing; it has no default")
    hints = get_type_hints(cls)
    oracle: Oracle = cls(**{key: _setting(kind, fields[key], hints[key], value) for key, value in settings.items()})
    return oracle


def absolute_paths(kind: str, settings: dict[str, Any], base: Path) -> dict[str, Any]:
    """The settings with each field that is a path (metadata {"path": True}) seen from a folder; workers run in folders of their own.

    Args: base: folder of the config file.   Raises: ConfigError or EnvironmentProblem, as `load_oracle`.
    """
    paths = {f.name: f.metadata.get("names", ()) for f in dataclasses.fields(_oracle_class(kind)) if f.metadata.get("path")}
    return {
        key: _seen_from(base, value) if key in paths and value not in paths[key] else value for key, value in settings.items()
    }


def _seen_from(base: Path, value: object) -> object:
    return str((base / Path(value).expanduser()).absolute()) if isinstance(value, str) and value else value


def _oracle_class(kind: str) -> Any:
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if kind not in found:
        known = f"installed are {', '.join(sorted(found)) or 'none'}"
        raise ConfigError(f"[oracle] kind = {kind!r} is unknown{_nearest(kind, list(found))}; {known}")
    try:
        return found[kind].load()
    except (ImportError, AttributeError) as error:
        where = f"{found[kind].value}"
        raise EnvironmentProblem(
            f"oracle {kind!r} cannot be imported from {where}: {error}; reinstall the package that provides it"
        ) from error


def _setting(kind: str, item: dataclasses.Field[Any], hint: Any, value: object) -> object:
    where = f"[oracle.{kind}] {item.name}"
    quantity = item.metadata.get("quantity")
    try:
        if quantity is not None:
            return units.parse_quantity(value, quantity)
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg']}, got {value!r}") from None


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def label(oracle: Oracle, frame: Frames, limits: Limits | None = None) -> Label:
    """The oracle's label of one frame, with the frame checked before and the result after.

    Raises: OracleConfigError, GeometryRejected, OracleInconsistent, and whatever the oracle raises.
    """
    limits = Limits() if limits is None else limits
    check_frame(oracle, frame, limits)
    start = time.monotonic()
    result = oracle(frame)
    check_label(oracle, frame, result, limits)
    return replace(result, seconds=time.monotonic() - start)


def make_label(
    oracle: Oracle, frame: Frames, energy: float, forces: Array, stress: Array | None, *, evidence: str, rung: int = 0
) -> Label:
    """A Label of this oracle and frame.  Args: energy: eV.   forces: (A, 3) eV/Å.   stress: (3, 3) eV/Å^3 or None."""
    name = fingerprint(oracle)
    return Label(float(energy), np.array(forces, dtype=float), stress, oracle.code, name, frame.content_id(name), evidence, rung)


def check_frame(oracle: Oracle, frame: Frames, limits: Limits) -> None:
    """Refuse a frame that this oracle cannot or should not label.

    Raises: OracleConfigError if it is beyond the capabilities; GeometryRejected if it is not finite or two atoms are too close.
    """
    if len(frame) != 1:
        raise OracleConfigError(f"{oracle.code}: an oracle labels one frame, but a batch of {len(frame)} came; pass frames[i]")
    check_capabilities(oracle, frame)
    cell = np.zeros(0) if frame.cell is None else frame.cell
    if not (np.isfinite(frame.positions).all() and np.isfinite(cell).all()):
        raise GeometryRejected("positions or cell are not finite: the simulation has exploded; reduce its time step")
    _check_distances(frame, limits)


def check_capabilities(oracle: Oracle, frame: Frames) -> None:
    """Refuse a frame that the oracle says it cannot label.  Raises: OracleConfigError naming cell, charge or multiplicity."""
    able, code = oracle.capabilities, oracle.code
    if frame.periodic and not able.periodic:
        raise OracleConfigError(
            f"{code} labels molecules only, but the frame has a cell; set [system] periodic = false or use another oracle"
        )
    if frame.charge != 0 and not able.charge:
        raise OracleConfigError(f"{code} labels neutral systems only, but the charge is {frame.charge:+d}; use another oracle")
    if frame.multiplicity != 1 and not able.spin:
        raise OracleConfigError(
            f"{code} knows multiplicity 1 only, but {frame.multiplicity} came; use another oracle or other settings"
        )


def check_multiplicity(frame: Frames, electrons: float) -> None:
    """Refuse a number of electrons that cannot have the frame's multiplicity.  Raises: OracleConfigError."""
    unpaired = frame.multiplicity - 1
    if electrons < unpaired or (electrons - unpaired) % 2:
        raise OracleConfigError(
            f"{electrons:g} electrons (charge {frame.charge:+d}) cannot have multiplicity {frame.multiplicity}; "
            "mend [system] charge or multiplicity"
        )


def _check_distances(frame: Frames, limits: Limits) -> None:
    radii = covalent_radii[frame.numbers]
    furthest = max(limits.min_distance, 2 * limits.covalent_fraction * float(radii.max()))
    i, j, vectors = pairs_within(frame, furthest)
    if len(i) == 0:
        return
    distance = np.linalg.norm(vectors, axis=1)
    least = np.maximum(limits.min_distance, limits.covalent_fraction * (radii[i] + radii[j]))
    worst = int(np.argmin(distance - least))
    if distance[worst] < least[worst]:
        names = [f"{chemical_symbols[frame.numbers[k]]}{k}" for k in (i[worst], j[worst])]
        raise GeometryRejected(
            f"atoms {names[0]} and {names[1]} are {distance[worst]:.3f} Å apart, less than the limit of {least[worst]:.3f} Å; "
            "the simulation has left sensible structures: see the frames before it, or lower [sanity] min_distance"
        )


def check_label(oracle: Oracle, frame: Frames, result: Label, limits: Limits) -> None:
    """Refuse a result that contradicts itself.

    Raises: OracleInconsistent (NaN, shape, asymmetric stress, net force, wrong frame); GeometryRejected if a force is absurd.
    """
    code, atoms = oracle.code, len(frame.numbers)
    if result.forces.shape != (atoms, 3):
        raise OracleInconsistent(
            f"{code} returned forces of shape {result.forces.shape} for {atoms} atoms; expected ({atoms}, 3)"
        )
    if not (np.isfinite(result.energy) and np.isfinite(result.forces).all()):
        raise OracleInconsistent(f"{code} returned an energy or forces that are not finite (energy {result.energy} eV)")
    _check_stress(code, oracle.capabilities.stress and frame.periodic, result.stress)
    if not result.evidence:
        raise OracleInconsistent(f"{code} returned a label without evidence that it converged")
    if result.frame_id != frame.content_id(fingerprint(oracle)):
        raise OracleInconsistent(f"{code} returned a label of another frame or of other settings ({result.frame_id})")
    norms = np.linalg.norm(result.forces, axis=1)
    if norms.max() > limits.max_force:
        raise GeometryRejected(
            f"the force on atom {norms.argmax()} is {norms.max():.1f} eV/Å, above the limit of {limits.max_force} eV/Å; "
            "see the frame, or raise [sanity] max_force"
        )
    net = float(np.linalg.norm(result.forces.sum(axis=0)))
    if not frame.periodic and net > limits.max_net_force:
        raise OracleInconsistent(
            f"{code}: the forces on the molecule add up to {net:.2g} eV/Å, expected less than {limits.max_net_force} eV/Å; "
            "use a finer integration grid or the response of the grid (grid_response = true)"
        )


def _check_stress(code: str, expected: bool, stress: Array | None) -> None:
    if expected and stress is None:
        raise OracleInconsistent(f"{code} returned no stress for a periodic frame, though it says it can")
    if stress is None:
        return
    if stress.shape != (3, 3) or not np.isfinite(stress).all():
        raise OracleInconsistent(f"{code} returned a stress of shape {stress.shape}, expected finite (3, 3)")
    if np.abs(stress - stress.T).max() > 1e-4 * max(1.0, float(np.abs(stress).max())):
        raise OracleInconsistent(f"{code} returned a stress that is not symmetric:\n{stress}")


def pairs_within(frame: Frames, cutoff: float) -> tuple[Array, Array, Array]:
    """All ordered pairs of atoms and periodic images closer than a cutoff, for any cell and atoms that left it.

    Args: frame: B = 1.   cutoff: Å.   Returns: i (P,), j (P,), vectors (P, 3) Å from atom i to (an image of) atom j.
    """
    x = frame.positions[0]
    vectors = x[None, :, :] - x[:, None, :]
    images = np.zeros((1, 3))
    if frame.cell is not None:
        cell = frame.cell[0]
        inverse = np.linalg.inv(cell)
        fractional = vectors @ inverse
        vectors = (fractional - np.rint(fractional)) @ cell
        # after rounding |s| <= 1/2, so |s + n| * height <= cutoff bounds n
        reach = np.floor(cutoff * np.linalg.norm(inverse, axis=0) + 0.5).astype(int)
        images = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 3) @ cell
    near_i, near_j, near_v = [], [], []
    for image in images:
        shifted = vectors + image
        near = np.einsum("ijx,ijx->ij", shifted, shifted) < cutoff**2
        if not image.any():
            np.fill_diagonal(near, False)
        i, j = np.nonzero(near)
        near_i.append(i)
        near_j.append(j)
        near_v.append(shifted[i, j])
    return np.concatenate(near_i), np.concatenate(near_j), np.concatenate(near_v)


def label_to_json(result: Label) -> str:
    """JSON that gives back bit-identical numbers (Python writes the shortest text that reads back the same double)."""
    facts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    facts["forces"] = result.forces.tolist()
    facts["stress"] = None if result.stress is None else result.stress.tolist()
    return json.dumps(facts, allow_nan=False)


def label_from_json(text: str) -> Label:
    """Inverse of `label_to_json`.  Raises: OracleInconsistent if the text is not such a label."""
    try:
        facts = json.loads(text)
        facts["forces"] = np.array(facts["forces"], dtype=float).reshape(-1, 3)
        facts["stress"] = None if facts["stress"] is None else np.array(facts["stress"], dtype=float)
        return Label(**facts)
    except (ValueError, TypeError, KeyError) as error:
        raise OracleInconsistent(f"expected the JSON of a label, got {text[:80]!r}: {error}") from error


def write_done(spool: Path, result: Label) -> None:
    """Put a finished label into the spool: complete or not at all, also when the power fails.  Raises: EnvironmentProblem."""
    _write(spool / "done" / f"{result.frame_id}.json", label_to_json(result))
    (spool / "failed" / f"{result.frame_id}.json").unlink(missing_ok=True)


def read_done(spool: Path, frame_id: str) -> Label | None:
    """The finished label of a frame, or None.  Raises: OracleInconsistent naming the file, if it is not a label."""
    path = spool / "done" / f"{frame_id}.json"
    try:
        return label_from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OracleInconsistent, UnicodeDecodeError) as error:
        raise OracleInconsistent(f"{path}: {error}; remove the file to have the label computed again") from error


def write_failed(spool: Path, frame_id: str, error: BaseException) -> None:
    """Record a failure of a frame and count it."""
    count = read_failures(spool).get(frame_id, {}).get("count", 0) + 1
    facts = {"class": type(error).__name__, "message": str(error), "count": count}
    _write(spool / "failed" / f"{frame_id}.json", json.dumps(facts))


def read_failures(spool: Path) -> dict[str, dict[str, Any]]:
    """Frame id -> class, message and count of its failures."""
    found = {path.stem: _failure(path) for path in sorted((spool / "failed").glob("*.json"))}
    return {name: facts for name, facts in found.items() if facts}


def _failure(path: Path) -> dict[str, Any]:
    """Nothing for a file that is damaged or gone: a count of failures is no reason to stop."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
