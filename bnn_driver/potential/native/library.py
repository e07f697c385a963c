"""From kernels.cpp to a loaded library: compiled once per machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from bnn_driver.errors import BnnError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""Not -ffast-math: with it a library changes the arithmetic of the whole process when it is loaded (denormal numbers become zero), and
not-a-number, by which a blown-up simulation is noticed, need not stay one."""
LANE_BYTES = 64
"""Channels come in vectors of this many bytes."""
MAX_DEGREE = 4
"""Of spherical harmonics and features, DEGREES - 1 in kernels.cpp."""
_TIMEOUT = 300


class NoKernels(BnnError):
    """The kernels cannot be had on this machine; the message says why."""


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels of this machine.  Raises: NoKernels when there is no compiler or it fails."""
    compiler = find_compiler()
    file = _cache() / file_name(compiler)
    if not file.is_file():
        _compile(compiler, file)
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise NoKernels(f"{file} cannot be loaded ({error}); delete it to have it made again") from None


def find_compiler() -> str:
    """The C++ compiler of this machine.  Raises: NoKernels when there is none."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoKernels("there is no C++ compiler (c++, g++ or clang++ on the PATH, or the variable CXX)")
    return compiler


def _cache() -> Path:
    """A folder that belongs to this user alone: what lies in it is run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "bnn-driver"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError as error:
        raise NoKernels(f"the folder {folder} for compiled kernels cannot be used: {error}") from None
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise NoKernels(f"the folder {folder} for compiled kernels can be written by others: its owner must be you, its mode 700")
    return folder


def file_name(compiler: str) -> str:
    """Of the library, after everything on which it depends: machines that share a home may differ in their processors."""
    version = _output([compiler, "--version"])
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    model = next((line for line in lines if line.startswith("model name")), "")
    text = "\n".join([SOURCE.read_text(), *FLAGS, compiler, version, platform.machine(), model, features])
    return f"kernels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def _compile(compiler: str, file: Path) -> None:
    """Compile with OpenMP where the compiler has it; the file appears whole or not at all."""
    logger.info("compiling kernels for this processor, once; it takes about a quarter of a minute")
    failures = []
    for extra in (("-fopenmp",), ()):
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / "kernels.so"
            try:
                _output([compiler, *FLAGS, *extra, str(SOURCE), "-o", str(made)])
            except NoKernels as failure:
                failures.append(str(failure))
                continue
            os.replace(made, file)
            return
    raise NoKernels(failures[-1])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"the compiler {command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise NoKernels(f"the compiler {command[0]} failed with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout
