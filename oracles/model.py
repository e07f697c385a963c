"""A teacher: a MACE model that labels, to rehearse a whole run with the true answer known and no ab initio code at hand.

It is evaluated by mace's own ASE calculator, none of whose code the driver's potential shares: also a second opinion on that.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import io
import pickle
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from bnn_driver.errors import EnvironmentProblem, ModelError, OracleConfigError
from bnn_driver.oracle import Capabilities, check_capabilities, make_label
from bnn_driver.records import Frames, Label
from oracles.ase_calculator import atoms_of, check_elements, evaluate

EMBEDDED = "embedded"
"""The model that comes with the program."""


@dataclass(frozen=True)
class Teacher:
    """A MACE model file as an oracle; energy, forces and, for periodic frames, stress.

    The file is a pickle: name only what you trust.  A model knows no charge and no spin: leave them out of [system].
    """

    model: str = field(metadata={"path": True, "names": (EMBEDDED,)})
    """A .model file (relative to the config file), or "embedded"."""
    head: str = ""
    """Which head of a model that has several."""
    device: str = "cpu"
    dtype: Literal["float64", "float32"] = "float64"
    delay: float = field(default=0.0, metadata={"quantity": "wall time"})
    """Seconds to sleep per label, to rehearse a slow code; not physics."""

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise OracleConfigError(f"model: delay must not be negative, got {self.delay} s")

    @cached_property
    def code(self) -> str:
        """Name and version of mace, and the start of the model file's checksum."""
        return f"mace {_version()}, model {self._checksum[:12]}"

    @property
    def capabilities(self) -> Capabilities:
        """Neutral molecules and crystals without spin."""
        return Capabilities(stress=True, periodic=True, charge=False, spin=False)

    def physics(self) -> dict[str, Any]:
        """What is in the file, wherever it lies, the head, the precision, and mace as major.minor."""
        return {
            "code": "mace " + ".".join(_version().split(".")[:2]),
            "model": self._checksum,
            "head": self.head,
            "dtype": self.dtype,
        }

    def check(self, frame: Frames) -> None:
        """Load the model; head and elements exist.  Raises: OracleConfigError, ModelError."""
        check_capabilities(self, frame)
        check_elements(self.code, self._calculator, frame)

    def __call__(self, frame: Frames) -> Label:
        """Label one frame after the delay."""
        self.check(frame)
        if self.delay > 0:
            time.sleep(self.delay)
        wanted = ["energy", "forces", *(["stress"] if frame.periodic else [])]
        results = evaluate(self.code, self._calculator, atoms_of(frame), wanted)
        evidence = f"a model: nothing to converge; {results.energy_name}"
        return make_label(self, frame, results.energy, results.forces, results.stress, evidence=evidence)

    @cached_property
    def _file(self) -> Path:
        if self.model == EMBEDDED:
            return Path(str(importlib.resources.files("bnn_driver") / "data" / "embedded.model"))
        return Path(self.model).expanduser()

    @cached_property
    def _checksum(self) -> str:
        """SHA-256, hex."""
        try:
            return hashlib.sha256(self._file.read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(
                f"[oracle.model] model = {self.model!r}: {error.strerror}; expected a .model file, relative to the config file, "
                f"or {EMBEDDED!r}"
            ) from error

    @cached_property
    def _calculator(self) -> Any:
        """mace's calculator, loaded once."""
        with _quiet():
            module = self._module()
            heads = list(getattr(module, "heads", None) or ["Default"])
            if (self.head or len(heads) > 1) and self.head not in heads:
                # mace would take another head and only log it
                raise OracleConfigError(
                    f"{self._file} has the heads {', '.join(heads)}, got head = {self.head!r}; name one of them"
                )
            calculators = importlib.import_module("mace.calculators")
            return calculators.MACECalculator(
                models=[module], device=self.device, default_dtype=self.dtype, head=self.head or heads[0]
            )

    def _module(self) -> Any:
        """The network in the file, on the device."""
        _ = self._checksum  # says first that the file is missing
        expected = "expected a .model file as mace_run_train writes it"
        importlib.import_module("mace")  # before torch reads what e3nn wrote
        try:
            module = torch.load(self._file, map_location=self.device, weights_only=False)
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"{self._file} cannot be read ({type(error).__name__}: {error}); {expected}") from error
        if type(module).__name__ not in ("MACE", "ScaleShiftMACE"):
            raise ModelError(f"{self._file} holds a {type(module).__name__}; {expected}")
        return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what mace says to every user: of its environment variable, and of packages that it would like."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _version() -> str:
    try:
        return importlib.metadata.version("mace-torch")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem("the oracle model needs the package mace-torch: pip install mace-torch") from None
