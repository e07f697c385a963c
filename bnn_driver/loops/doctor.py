"""`doctor`: what this machine has of what a run needs.

Nothing but the standard library is imported before it is looked for, so that a machine where packages are missing can be examined
as well; each problem says what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnn_driver.errors import EnvironmentProblem
from bnn_driver.loops.scheduler import current_job
from bnn_driver.threads import THREADS

REQUIRED = {
    "numpy": "numpy", "scipy": "scipy", "ase": "ase", "torch": "torch", "e3nn": "e3nn", "mace-torch": "mace", "ipi": "ipi",
    "pydantic": "pydantic", "psutil": "psutil", "safetensors": "safetensors", "matplotlib": "matplotlib", "typer": "typer",
}  # fmt: skip
"""Distribution -> module."""
OPTIONAL = ("pyscf", "tblite", "parsl", "gpaw", "cuequivariance", "cuequivariance-torch", "gpu4pyscf", "numba", "mpi4py")
COMMANDS = (
    "cp2k", "cp2k.psmp", "nwchem", "abinit", "pw.x", "aims.x", "aims", "vasp_std", "vasp_gam", "gpaw", "orca", "dftb+", "xtb", "mopac",
    "psi4", "siesta", "mpirun", "srun",
)  # fmt: skip
FOLDERS = (
    "VASP_PP_PATH", "AIMS_SPECIES_DIR", "ESPRESSO_PSEUDO", "GPAW_SETUP_PATH", "ABINIT_PP_PATH", "CP2K_DATA_DIR", "NWCHEM_BASIS_LIBRARY",
)  # fmt: skip
"""Variables that name folders, one or several with colons."""
ASE_VARIABLES = ("ASE_CONFIG_PATH", "ASE_VASP_COMMAND", "ASE_AIMS_COMMAND", "VASP_COMMAND", "VASP_PP_VERSION")
SUBMIT = {"sbatch": "Slurm", "qsub": "PBS or SGE", "bsub": "LSF"}
ORACLES = "bnn_driver.oracles"
LEAST_FREE = 2e9
"""Bytes of disk below which is warned."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    text: str
    remedy: str = ""
    """What to do; empty: all is well."""
    required: bool = False
    """No run without it."""


def examine(folder: Path, say: Callable[[Finding], None]) -> None:
    """Look at everything.

    Args: folder: where a run would live.   say: hears of each finding at once.
    Raises: EnvironmentProblem when something without which nothing runs is missing or broken.
    """
    broken = []
    for part in (_python, _required, _optional, _devices, _model, _ipi, _oracles, _codes, _variables, _scheduler, _cores):
        for finding in _guarded(part):
            say(finding)
            broken += [finding.name] if finding.required and finding.remedy else []
    for finding in _disk(folder):
        say(finding)
        broken += [finding.name] if finding.required and finding.remedy else []
    if broken:
        raise EnvironmentProblem(f"nothing will run before these are mended (see above): {', '.join(broken)}")


def _guarded(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a part; one that breaks is a finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from part()
    except Exception as error:
        yield Finding(part.__name__.strip("_"), f"could not be examined: {type(error).__name__}: {error}", "see the message")


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {sys.executable}, {platform.platform()}")


def _required() -> Iterator[Finding]:
    wanted = _specifiers()
    for name, module in REQUIRED.items():
        version = _version(name)
        if version is None:
            yield Finding(name, "not installed", f"pip install '{name}{wanted.get(name, '')}'", required=True)
            continue
        failure = _import_failure(module)
        if failure:
            yield Finding(
                name, f"{version}, cannot be imported: {failure}", f"pip install --force-reinstall '{name}'", required=True
            )
        elif not _meets(version, wanted.get(name, "")):
            yield Finding(name, f"{version}, but {wanted[name]} is needed", f"pip install '{name}{wanted[name]}'", required=True)
        else:
            yield Finding(name, version)


def _optional() -> Iterator[Finding]:
    for name in OPTIONAL:
        version = _version(name)
        if version is not None:
            yield Finding(name, version)
    absent = [name for name in OPTIONAL if _version(name) is None]
    yield Finding("optional", f"not installed: {', '.join(absent) or 'none'}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _specifiers() -> dict[str, str]:
    """Versions that the installed bnn-driver asks for; nothing where it, or packaging, is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("bnn-driver") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    return {r.name: str(r.specifier) for line in lines if not (r := Requirement(line)).marker}


def _meets(version: str, specifier: str) -> bool:
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _import_failure(module: str) -> str:
    """Why a module cannot be imported; empty when it can."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        return f"{type(error).__name__}: {error}"
    return ""


def _devices() -> Iterator[Finding]:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    cards = _cards()
    if not torch.cuda.is_available():
        remedy = 'install the torch for your CUDA driver (pytorch.org), or leave [potential] device at "cpu"' if cards else ""
        yield Finding("gpu", f"{cards or 'none'}; torch is {built}", remedy)
        return
    cudnn = torch.backends.cudnn.version()
    for k in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(k)
        memory = f"{facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        yield Finding(f"gpu {k}", f"{facts.name}, {memory}; torch is {built}, cuDNN {cudnn}")


def _cards() -> str:
    """Cards that the NVIDIA driver knows, whatever torch can use."""
    return "; ".join(_said(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]).splitlines())


def _said(command: list[str]) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _model() -> Iterator[Finding]:
    """The embedded model evaluated once, with our own kernels where they can be had."""
    from bnn_driver.potential.native.library import NoKernels, find_compiler, load_kernels

    try:
        compiler = find_compiler()
        library = load_kernels()._name
        yield Finding("kernels", f"compiled by {compiler}: {library}")
    except NoKernels as error:
        yield Finding(
            "kernels", str(error), "without them CPUs evaluate two to three times slower: install g++ or clang++, or set CXX"
        )
    begin = time.perf_counter()
    path = _embedded_path()
    text = f"{path}; loaded and evaluated in {time.perf_counter() - begin:.1f} s"
    yield Finding("potential", f"embedded model: {text}")


def _embedded_path() -> str:
    """Which code evaluates the embedded model here; a water molecule is evaluated by it."""
    import numpy as np
    import torch

    from bnn_driver.potential.factory import make_potential
    from bnn_driver.potential.graph import build_graph
    from bnn_driver.potential.mace import load_mace
    from bnn_driver.potential.params import repeat_weights
    from bnn_driver.records import Frames

    water = Frames(np.array([8, 1, 1]), np.array([[[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]]]))
    loaded = load_mace("embedded")
    potential = make_potential(loaded.module, [8, 1, 1], torch.float32, "cpu", "auto", loaded.head)
    graph = build_graph(water, potential.cutoff, torch.float32, torch.device("cpu"))
    result: Any = potential.evaluate(repeat_weights(potential.weights, 2), graph)
    if not torch.isfinite(result.energy).all():
        raise EnvironmentProblem("the embedded model gives energies that are not finite")
    return potential.path


def _ipi() -> Iterator[Finding]:
    from bnn_driver.ipi.simulation import ipi_script

    try:
        yield Finding("i-pi", f"{ipi_script()}")
    except EnvironmentProblem as error:
        yield Finding("i-pi", str(error), "pip install 'ipi>=3.3'; `serve` can drive one that is elsewhere")


def _oracles() -> Iterator[Finding]:
    points = sorted(importlib.metadata.entry_points(group=ORACLES), key=lambda point: point.name)
    if not points:
        yield Finding(
            "oracles", "none are installed", "pip install bnn-driver (a source tree alone has no entry points)", required=True
        )
    for point in points:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                point.load()
            yield Finding(f"oracle {point.name}", f"loads from {point.value}")
        except Exception as error:  # a broken package raises anything
            text = f"does not load from {point.value}: {type(error).__name__}: {error}"
            yield Finding(f"oracle {point.name}", text, "reinstall the package that provides it")


def _codes() -> Iterator[Finding]:
    found = [f"{name} {path}" for name in COMMANDS if (path := shutil.which(name))]
    yield Finding("commands", "; ".join(found) or f"none of {', '.join(COMMANDS)} on the PATH (a module to load?)")


def _variables() -> Iterator[Finding]:
    for name in FOLDERS:
        value = os.environ.get(name)
        if value is None:
            continue
        missing = [part for part in value.split(":") if part and not Path(part).is_dir()]
        yield Finding(name, value, f"there is no folder {', '.join(missing)}: mend the variable" if missing else "")
    for name in ASE_VARIABLES:
        if name in os.environ:
            yield Finding(name, os.environ[name])
    config = Path(os.environ.get("ASE_CONFIG_PATH") or Path.home() / ".config" / "ase" / "config.ini")
    yield Finding("ase config", f"{config}" if config.is_file() else "none")


def _scheduler() -> Iterator[Finding]:
    found = [f"{kind} ({path})" for name, kind in SUBMIT.items() if (path := shutil.which(name))]
    yield Finding("scheduler", ", ".join(found) or "none")
    job = current_job()
    if job is None:
        return
    if job.end is None:
        yield Finding("job", f"{job}: {job.source}", "if it has a limit, give `run --until`")
    else:
        yield Finding("job", f"{job}: {(job.end - time.time()) / 60:.0f} min left, from {job.source}")


def _cores() -> Iterator[Finding]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    cores = allowed if quota is None else min(allowed, quota)
    limits = f"{allowed} allowed of {os.cpu_count()}" + ("" if quota is None else f", a quota of {quota:g}")
    yield Finding("cores", limits)
    threads = {name: os.environ[name] for name in THREADS if name in os.environ}
    too_many = [name for name, value in threads.items() if value.isdigit() and int(value) > cores]
    text = ", ".join(f"{name}={value}" for name, value in threads.items())
    remedy = f"{', '.join(too_many)} above the number of cores slows everything down: unset it" if too_many else ""
    yield Finding("threads", text or "not set; one each unless you say otherwise", remedy)
    with contextlib.suppress(OSError, ValueError):
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield Finding("memory", f"{pages * size / 2**30:.0f} GiB on this machine")


def _quota() -> float | None:
    """Cores by the cgroup (version 2) of a container or job; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    return None


def _disk(folder: Path) -> Iterator[Finding]:
    """What a run directory needs of its file system, tried out; and the room that is left."""
    name, where = "run directory", folder.absolute()
    try:
        with tempfile.TemporaryDirectory(prefix=".bnn-doctor-", dir=where) as scratch:
            _try_lock(Path(scratch) / "lock")
            _try_rename(Path(scratch))
    except EnvironmentProblem as error:
        yield Finding(name, f"{where}: {error}", "put [run] directory on a file system that has them", required=True)
        return
    except OSError as error:
        yield Finding(name, f"{where} cannot be written in: {error}", "go to a folder of your own", required=True)
        return
    yield Finding(name, f"{where}: locks and renames work")
    free = shutil.disk_usage(where).free
    remedy = "free some: a run keeps weights of all members and every label" if free < LEAST_FREE else ""
    yield Finding("disk", f"{free / 1e9:.0f} GB free", remedy)


def _try_lock(path: Path) -> None:
    """A lock that a second holder is refused.  Raises: EnvironmentProblem."""
    with open(path, "w") as first, open(path, "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EnvironmentProblem(f"the file system has no locks (flock: {error})") from error
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise EnvironmentProblem("the file system gives one lock to two holders (flock)")


def _try_rename(folder: Path) -> None:
    """A rename over a file that is there.  Raises: EnvironmentProblem."""
    (folder / "old").write_text("old")
    (folder / "new").write_text("new")
    try:
        os.replace(folder / "new", folder / "old")
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except OSError as error:
        raise EnvironmentProblem(f"the file system does not rename over a file, or does not keep it ({error})") from error
    if (folder / "old").read_text() != "new" or (folder / "new").exists():
        raise EnvironmentProblem("the file system does not rename over a file")
