"""What the benchmarks share: systems, models, interleaved timing, the floor of the matrix products, tables and JSON.

Times are CPU milliseconds of one thread (`process_time`), with `--device cuda` wall milliseconds until the GPU has nothing left to
do; medians of interleaved rounds, so that a busy machine hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import io
import itertools
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from ase import Atoms
from ase.build import molecule
from ase.spacegroup import crystal
from torch.utils._python_dispatch import TorchDispatchMode

from bnn_driver.potential.factory import make_potential
from bnn_driver.potential.params import stack_weights
from bnn_driver.potential.planning import free_memory
from bnn_driver.potential.pruning import SampledWeights
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.records import Frames

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potential"))  # random_models
warnings.filterwarnings("ignore")

CPU = torch.device("cpu")
ALL_ELEMENTS = tuple(range(1, 90))
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": "32x0e+32x1o", "r_max": 4.5, "max_ell": 2, "correlation": 2, "num_bessel": 8},
    "medium": {"hidden": "128x0e+128x1o", "r_max": 6.0, "max_ell": 3, "correlation": 3, "num_bessel": 10},
}


@dataclass(frozen=True)
class Cost:
    """What one member of mace's own modules costs in float64, for the estimates by which cases are left out."""

    ms: float
    ms_per_atom: float
    ms_per_edge: float
    mb_per_atom: float
    mb_per_edge: float


COSTS = {"small": Cost(6.0, 0.15, 0.018, 0.2, 0.02), "medium": Cost(20.0, 11.0, 0.19, 2.5, 0.08)}


# ---- systems


def water(molecules: int) -> Atoms:
    """A periodic box of randomly turned water molecules at the density of the liquid."""
    side = (29.9 * molecules) ** (1 / 3)
    per_side = int(np.ceil(molecules ** (1 / 3) - 1e-9))
    rng = np.random.default_rng(0)
    box = Atoms(cell=[side] * 3, pbc=True)
    for place in itertools.islice(itertools.product(range(per_side), repeat=3), molecules):
        one = molecule("H2O")
        one.euler_rotate(*(360 * rng.random(3)), center="COM")
        one.translate((np.array(place) + 0.5) * side / per_side - one.get_center_of_mass())
        box += one
    return box


def perovskite(*repeat: int) -> Atoms:
    """SrTiO3, five atoms a cell."""
    cell = crystal(["Sr", "Ti", "O"], [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)], spacegroup=221, cellpar=[3.93] * 3 + [90] * 3)
    return cell.repeat(repeat)


SYSTEMS: dict[str, Callable[[], Atoms]] = {
    "ethanol": lambda: molecule("CH3CH2OH"),
    "crystal40": lambda: perovskite(2, 2, 2),
    "water192": lambda: water(64),
    "crystal160": lambda: perovskite(4, 4, 2),
}


def distorted(atoms: Atoms, count: int, seed: int = 0, spread: float = 0.03) -> Frames:
    """`count` frames around a structure; `spread` in Å."""
    noise = spread * np.random.default_rng(seed).standard_normal((count, len(atoms), 3))
    cell = np.repeat(atoms.cell.array[None], count, axis=0) if atoms.pbc.all() else None
    return Frames(atoms.numbers, atoms.positions + noise.clip(-0.1, 0.1), cell)


def edges(atoms: Atoms, cutoff: float) -> int:
    """Directed neighbour pairs within the cutoff."""
    from ase.neighborlist import neighbor_list

    return len(neighbor_list("i", atoms, cutoff))


# ---- models


def random_model(size: str, elements: Sequence[int], dtype: torch.dtype) -> torch.nn.Module:
    """A MACE module of one of the two sizes with random weights."""
    with contextlib.redirect_stdout(io.StringIO()):
        from random_models import o3, random_mace
    module = random_mace(
        elements=tuple(elements),
        MLP_irreps=o3.Irreps("16x0e"),
        radial_MLP=[64, 64, 64],
        avg_num_neighbors=20.0,
        atomic_energies=np.linspace(-5.0, -1.0, 119)[list(elements)],
        **SIZES[size],
    )
    return module.to(dtype).eval()


def sampled(module: torch.nn.Module, numbers: Iterable[int]) -> SampledWeights:
    """The weights of a module that are sampled for these elements."""
    elements = tuple(sorted({int(z) for z in numbers}))
    return SampledWeights(module, elements, 0, next(module.parameters()).dtype, CPU)


def committee(size: str, numbers: Iterable[int], members: int, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Modules with all 89 elements whose sampled weights differ a little."""
    first = random_model(size, ALL_ELEMENTS, dtype)
    names = sampled(first, numbers).index
    modules = [copy.deepcopy(first) for _ in range(members)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in modules:
            for name, p in module.named_parameters():
                if name in names:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return modules


def pruned(modules: Sequence[torch.nn.Module], size: str, numbers: Iterable[int]) -> list[torch.nn.Module]:
    """The same functions as mace modules that know these elements only (as mace's `load_foundations_elements` makes them)."""
    elements = sorted({int(z) for z in numbers})
    ratio = (len(elements) / len(ALL_ELEMENTS)) ** 0.5  # e3nn divides by the number of elements
    first = random_model(size, elements, next(modules[0].parameters()).dtype)
    few = [copy.deepcopy(first) for _ in modules]
    for module, small in zip(modules, few, strict=True):
        part = sampled(module, elements)
        for name, p in small.named_parameters():
            x = part.pruned(name, part.full[name]) if name in part.index else part.full[name]
            scale = ratio if "skip_tp" in name or name == "node_embedding.linear.weight" else 1.0
            p.data.copy_(scale * x.view(p.shape))
    return few


def our_potential(
    module: torch.nn.Module, numbers: Iterable[int], compile: str = "off", device: torch.device = CPU
) -> StackedPotential:
    """Our fast path."""
    dtype = next(module.parameters()).dtype
    return make_potential(copy.deepcopy(module), [int(z) for z in numbers], dtype, device, path="stacked", compile=compile)


def our_weights(modules: Sequence[torch.nn.Module], numbers: Iterable[int]) -> dict[str, torch.Tensor]:
    """name -> (M, ...): the sampled weights of all modules."""
    return stack_weights([sampled(module, numbers).theta() for module in modules])


# ---- time


def interleaved(
    jobs: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    warm: int = 2,
    most: int = 60,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Median milliseconds of each job; rounds until `seconds` of wall time are spent, at least `least`."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        for _ in range(warm):
            job()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or (time.perf_counter() < end and len(next(iter(times.values()))) < most):
        for name, job in jobs.items():
            times[name].append(timed(job, device))
    return {name: 1e3 * float(np.median(t)) for name, t in times.items()}


def timed(job: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call: of this process's CPU, or of the wall until the GPU has done it."""
    if device.type != "cuda":
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


Operand = tuple[torch.Size, tuple[int, ...], torch.dtype]


class _Products(TorchDispatchMode):
    """Takes down every matrix product that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Operand, Operand]] = []
        self.device = CPU

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            self.device = a.device
            self.pairs.append(((a.shape, a.stride(), a.dtype), (b.shape, b.stride(), b.dtype)))
        return function(*args, **(kwargs or {}))


def products_of(job: Callable[[], object]) -> Callable[[], None]:
    """The matrix products of a job alone, shapes and strides as they were, operands made beforehand."""
    with _Products() as seen:
        job()
    room = [max((_extent(pair[side]) for pair in seen.pairs), default=1) for side in (0, 1)]
    dtype = seen.pairs[0][0][2]
    buffers = [torch.full((n,), 0.5, dtype=dtype, device=seen.device) for n in room]
    ready = [tuple(x.as_strided(op[0], op[1]) for x, op in zip(buffers, pair, strict=True)) for pair in seen.pairs]

    def run() -> None:
        for a, b in ready:
            torch.matmul(a, b)

    return run


def _extent(operand: Operand) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(operand[0], operand[1], strict=True))


# ---- options, tables, files


def arguments(doc: str | None, dtype: str = "float64") -> argparse.ArgumentParser:
    """The options that all benchmarks have.  Args: dtype: the one when none is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cheap cases, under a minute")
    parser.add_argument("--full", action="store_true", help="expensive cases too")
    parser.add_argument("--compile", choices=["off", "auto", "on"], default="off", help="passed on to make_potential")
    parser.add_argument("--device", type=available, default=CPU, help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float64", "float32"], default=dtype)
    parser.add_argument("--json", type=Path, help="write all rows, the machine and the versions here")
    return parser


def available(name: str) -> torch.device:
    """The device of that name.  Raises: argparse.ArgumentTypeError when this machine does not have it."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name} was asked for, but torch {torch.__version__} sees no GPU on this machine")
    return device


def add_cases(parser: argparse.ArgumentParser, systems: Sequence[str] = ()) -> None:
    """Options for the choice of models and, where there are several, systems."""
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    if systems:
        parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(systems))


@dataclass
class Table:
    """Rows printed as they come; a column is "key:format"."""

    columns: Sequence[str]

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print("  ".join(f"{self._head(c):>{self._width(c)}}" for c in self.columns), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Keep and print one row."""
        self.rows.append(row)
        print("  ".join(f"{self._cell(c, row):>{self._width(c)}}" for c in self.columns), flush=True)

    @staticmethod
    def _head(column: str) -> str:
        return column.partition(":")[0]

    def _width(self, column: str) -> int:
        return max(len(self._head(column)), {"system": 10, "sampled": 16}.get(self._head(column), 7))

    def _cell(self, column: str, row: Mapping[str, Any]) -> str:
        key, _, form = column.partition(":")
        value = row.get(key)
        return "-" if value is None else format(value, form)


def write_json(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object with the rows and where they were measured."""
    if path is None:
        return
    packages = ("torch", "mace-torch", "e3nn", "ipi", "numpy", "ase", "bnn-driver", "triton", "cuequivariance-torch")
    facts = {
        "rows": list(rows),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load": os.getloadavg(),
        },
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def free_gib(device: torch.device = CPU) -> float:
    """Memory that a benchmark may use: three quarters of what is available now."""
    return 0.75 * free_memory(device) / 2**30


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Floats with four significant digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
