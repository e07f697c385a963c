"""One tree of errors; each class fixes the exit code of the program.

BnnError (1)
├── ConfigError (2)            the config, the i-PI input or the command line
├── EnvironmentProblem (3)     a package, a model file, a device or the run directory
│   ├── ModelError             a model file that cannot be used
│   └── LockedError            the run directory belongs to another live driver
├── OracleError (4)            a label could not be had
│   ├── OracleConfigError (2)  settings that can never work (basis, functional, charge)
│   ├── GeometryRejected       the structure itself is unfit
│   ├── SCFNotConverged        after all rungs of the ladder
│   ├── UnstableState          converged to a state that is not a minimum
│   ├── OracleTimeout          killed at its time limit
│   ├── OracleCrashed          the process died
│   │   └── WorkerLost         its worker or node was lost, for which the frame cannot be blamed
│   ├── FrameBusy              another process computes this very frame
│   └── OracleInconsistent     a result that contradicts itself (NaN, shape, net force)
├── DivergedError (5)          the chains left the posterior and no good generation is left
├── IpiGone (6)                i-PI died, never came, or broke the protocol
│   └── ProtocolError
├── GuardStop (7)              a guard of the user stopped the run (budget, sanity)
└── CleanStop (75)             stopped on request; the same command goes on
    └── WallLimit              stopped before the end of the time that the job has
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class BnnError(Exception):
    """Base of all errors that the program raises on purpose."""

    exit_code = 1


class ConfigError(BnnError):
    """The config, the i-PI input or the command line is wrong."""

    exit_code = 2


class EnvironmentProblem(BnnError):
    """Something outside the config is missing or unfit: package, file, device, run directory."""

    exit_code = 3


class ModelError(EnvironmentProblem):
    """A model file that cannot be used."""


class LockedError(EnvironmentProblem):
    """The run directory belongs to another live driver."""


class OracleError(BnnError):
    """A label could not be had."""

    exit_code = 4


class OracleConfigError(OracleError):
    """Oracle settings that can never work."""

    exit_code = 2


class GeometryRejected(OracleError):
    """The structure is unfit for the oracle: atoms too close, forces absurd."""


class SCFNotConverged(OracleError):
    """No rung of the ladder converged."""


class UnstableState(OracleError):
    """The calculation converged to a state that is not a minimum."""


class OracleTimeout(OracleError):
    """The calculation was killed at its time limit."""


class OracleCrashed(OracleError):
    """The process of the calculation died."""


class WorkerLost(OracleCrashed):
    """The worker or node of the calculation was lost; the frame is not to blame."""


class FrameBusy(OracleError):
    """Another process computes this very frame."""


class OracleInconsistent(OracleError):
    """The result contradicts itself: NaN, wrong shape, net force."""


class DivergedError(BnnError):
    """The chains left the posterior."""

    exit_code = 5


class IpiGone(BnnError):
    """i-PI died, never came, or left."""

    exit_code = 6


class ProtocolError(IpiGone):
    """The other side of the socket did not follow the i-PI protocol."""


class GuardStop(BnnError):
    """A guard that the user set stopped the run."""

    exit_code = 7


class CleanStop(BnnError):
    """The run was asked to stop; the same command goes on."""

    exit_code = 75


class WallLimit(CleanStop):
    """The run stopped before the end of its time; the same command goes on."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context that writes to `path`.  Raises: EnvironmentProblem with the remedy, for what the disk refuses (full, read-only)."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"{path} could not be written: {error}; free space or mend the folder's permissions, then run the same command again"
        ) from error
