"""Labelled frames with awkward numbers."""

from __future__ import annotations

import hashlib

import numpy as np

from bnn_driver.records import Frames, Generation, Label, LabelledFrame

FINGERPRINT = "b3lyp/def2-svp grid 3"


def make_label(seed: int, *, atoms: int = 5, periodic: bool = False) -> LabelledFrame:
    """Random numbers over many orders of magnitude, a pure function of `seed`."""
    rng = np.random.default_rng(seed)

    def wild(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 5, size=shape)

    cell = (np.eye(3) * 9 + 0.3 * rng.standard_normal((3, 3)))[None] if periodic else None
    frame = Frames(rng.integers(1, 90, size=atoms), wild(1, atoms, 3), cell, charge=-1, multiplicity=2)
    label = Label(
        energy=float(wild()),
        forces=wild(atoms, 3),
        stress=wild(3, 3) if periodic else None,
        code="pyscf 2.14 \\ \"quoted\" = 'x' {y}",
        fingerprint=FINGERPRINT,
        frame_id=hashlib.sha256(f"{seed}".encode()).hexdigest()[:32],
        evidence="mf.converged",
        rung=2,
        seconds=float(wild()),
    )
    context = {
        "step": int(rng.integers(1_000_000)),
        "bead": 3,
        "criterion": "energy",
        "audit": False,
        "generation": 4,
        "probability": float(rng.random()),
        "predicted_energy": float(wild()),
        "energy_predictive_sd": float(abs(wild())),
        "foundation_energy": float(wild()),
        "predicted_forces": wild(atoms, 3),
        "force_predictive_sd": np.abs(wild(atoms, 3)),
        "foundation_forces": wild(atoms, 3),
    }
    return LabelledFrame(frame, label, context)


def assert_same(a: object, b: object) -> None:
    """Equal in every bit, in dtype and in type."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, (Frames, Label, LabelledFrame, Generation)):
        for name in a.__dataclass_fields__:
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b
