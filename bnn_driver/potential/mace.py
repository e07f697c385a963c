"""The only import of MACE and e3nn: loading a model file, and the two coupling tables the fast path needs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from bnn_driver.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "embedded.model"
_ENERGY_MODELS = ("ScaleShiftMACE", "MACE")
_GIVE_A_FILE = "Give the path of a .model file as `model` instead."


@dataclass(frozen=True)
class LoadedModel:
    """A MACE module and where it came from."""

    module: nn.Module
    name: str
    """What the user wrote."""
    path: Path
    sha256: str
    elements: tuple[int, ...]
    cutoff: float
    """Å."""
    heads: tuple[str, ...]
    head: int
    """Index of the head in use."""
    parameters: int


def load_mace(
    name: str | Path,
    head: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    cache: Path | None = None,
) -> LoadedModel:
    """A MACE model from a file, from a name that mace-torch knows, or the one that comes with the program ("embedded").

    Names: "medium-mpa-0", "small", ... (MACE-MP), "off:small" (MACE-OFF), "anicc".  The file is a pickle: load only what you trust.

    Args: head: name of the head of a multi-head model; "" is its only or first one.   cache: folder for downloads.
    Raises: ModelError when the file is missing, is not a MACE energy model, or cannot be had.
    """
    path = _locate(str(name), cache)
    module = _modernised(_unpickled(path), path)
    heads = tuple(getattr(module, "heads", None) or ("Default",))
    if head and head not in heads:
        raise ModelError(f"{path} has the heads {', '.join(heads)}, but the head {head!r} was asked for")
    if len(heads) > 1 and not head:
        logger.warning("%s has the heads %s; the first is used. Name one as `head` to choose.", path.name, ", ".join(heads))
    module = module.to(device=device, dtype=dtype).eval()
    return LoadedModel(
        module=module,
        name=str(name),
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        elements=tuple(int(z) for z in module.atomic_numbers),
        cutoff=float(module.r_max),
        heads=heads,
        head=heads.index(head) if head else 0,
        parameters=sum(p.numel() for p in module.parameters()),
    )


def wigner_3j(l1: int, l2: int, l3: int) -> np.ndarray:
    """(2 l1 + 1, 2 l2 + 1, 2 l3 + 1) real coupling coefficients in e3nn's convention."""
    return _o3().wigner_3j(l1, l2, l3, dtype=torch.float64).numpy()


def spherical_harmonics(lmax: int, vectors: torch.Tensor) -> torch.Tensor:
    """e3nn's real spherical harmonics of unit vectors, component-normalised.  Args: (n, 3).  Returns: (n, (lmax+1)²)."""
    return _o3().spherical_harmonics(list(range(lmax + 1)), vectors, normalize=True, normalization="component")


def converted_to_cueq(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with cuEquivariance's operators, by mace's own conversion.

    Raises: ModelError when the package is missing.   Whatever the conversion raises for models that it does not cover.
    """
    _import_quietly()
    from mace.cli import convert_e3nn_cueq

    if not convert_e3nn_cueq.CUEQQ_AVAILABLE:
        raise ModelError(
            "cuequivariance is not installed (pip install 'bnn-driver[cueq]', on a GPU also its kernels for the CUDA at hand)"
        )
    before = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # mace copies tensors in a way that torch advises against
            converted: nn.Module = convert_e3nn_cueq.run(module, device=device.type)
    finally:
        torch.set_default_dtype(before)
    return converted.to(device).eval()


def cueq_projection(contraction: Any, correlation: int) -> torch.Tensor:
    """(k, k') from the weights of a symmetric contraction to those of cuEquivariance's.  Args: contraction: the module in e3nn."""
    import cuequivariance as cue
    from mace.tools.cg import O3_e3nn
    from mace.tools.cg_cueq_tools import symmetric_contraction_proj

    o3 = _o3()
    before, after = (
        cue.Irreps(O3_e3nn, str(o3.Irreps(irrep.ir for irrep in irreps)))
        for irreps in (contraction.irreps_in, contraction.irreps_out)
    )
    _, projection = symmetric_contraction_proj(before, after, tuple(range(1, correlation + 1)))
    return torch.as_tensor(projection)


def _o3() -> ModuleType:
    """e3nn.o3."""
    _import_quietly()
    from e3nn import o3

    return o3


def _import_quietly() -> None:
    """Import mace, then e3nn (mace tells torch that e3nn's tables may be loaded), without the words they have for every user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("mace", "mace.modules"):
            importlib.import_module(name)


def trainer_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of mace_run_train as its command line has them: true or false for a flag, values behind all others.

    Raises: ConfigError with the words of mace's parser for options that it does not take.
    """
    found = []
    for key, value in options.items():
        if isinstance(value, bool) and not _refused([f"--{key}"]):
            found += [f"--{key}"] if value else []
        else:
            found.append(f"--{key}={value}")
    if reason := _refused(found):
        raise ConfigError(f"mace's trainer does not take these options: {reason}; `mace_run_train --help` lists what it takes")
    return found


def _refused(arguments: Sequence[str]) -> str:
    """What mace's parser says against these arguments; empty when it takes them."""
    _import_quietly()
    from mace.tools import build_default_arg_parser

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            build_default_arg_parser().parse_args(["--name=member", *arguments])
    except SystemExit:
        return told.getvalue().strip().splitlines()[-1].partition("error: ")[2] or told.getvalue()
    return ""


def _locate(name: str, cache: Path | None) -> Path:
    """Path of the file that `name` means."""
    if name == "embedded":
        if not EMBEDDED.is_file():
            raise ModelError(f"the embedded model is not installed ({EMBEDDED} is missing). {_GIVE_A_FILE}")
        return EMBEDDED
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix or "/" in name:
        raise ModelError(f"there is no model file {path}")
    return _downloaded(name, cache)


def _downloaded(name: str, cache: Path | None) -> Path:
    """File of a foundation model by the name mace-torch gives it, fetched when it is not in its cache."""
    _import_quietly()
    from mace.calculators import foundations_models as known

    off = [f"off:{key}" for key in known.mace_off_urls]
    names = [*known.mace_mp_urls, *off, "anicc"]
    if name not in names:
        raise ModelError(f"{name!r} is neither a file nor a model that mace-torch knows ({', '.join(names)}, embedded)")
    try:
        if cache is not None and name in known.mace_mp_urls:
            return _fetched(known, known.mace_mp_urls[name], cache)
        if cache is not None and name in off:
            return _fetched(known, known.mace_off_urls[name[4:]], cache)
        if name == "anicc":
            return Path(known.__file__).parent / "foundations_models" / "ani500k_large_CC.model"
        if name.startswith("off:"):
            return _fetched(known, known.mace_off_urls[name[4:]], Path(known.get_cache_dir()))
        return Path(known.download_mace_mp_checkpoint(name))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"the model {name!r} could not be downloaded ({error}); is there a network? {_GIVE_A_FILE}") from error


def _fetched(known: Any, url: str, cache: Path) -> Path:
    """The file behind a URL in a folder of the user's choice."""
    path = cache / url.rsplit("/", 1)[1]
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        logger.info("fetching %s into %s", url, cache)
        known._urlretrieve_with_timeout(url, str(path))
    return path


def _unpickled(path: Path) -> nn.Module:
    """The module in a file that the user named."""
    _import_quietly()

    what = "a .model file as mace_run_train writes it (a whole ScaleShiftMACE or MACE module)"
    if not path.is_file():
        raise ModelError(f"there is no model file {path}. {_GIVE_A_FILE}")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as a MACE model ({type(error).__name__}: {error}); expected {what}") from error
    if isinstance(loaded, dict):
        raise ModelError(f"{path} holds a dict ({', '.join(list(loaded)[:4])}): a checkpoint of a training run; expected {what}")
    if isinstance(loaded, torch.jit.ScriptModule):
        raise ModelError(f"{path} holds a TorchScript module, whose weights cannot be sampled; expected {what}")
    if type(loaded).__name__ not in _ENERGY_MODELS:
        raise ModelError(f"{path} holds a {type(loaded).__name__}; expected {what}")
    return loaded


def _modernised(module: Any, path: Path) -> Any:
    """Attributes that models of before 2023 hold in another form, in the form of today."""
    for name, dtype in (("atomic_numbers", torch.int64), ("r_max", torch.float64)):
        value = getattr(module, name)
        if not isinstance(value, torch.Tensor):
            delattr(module, name)
            module.register_buffer(name, torch.as_tensor(value, dtype=dtype))
            logger.info("%s is an old model: its %s became a buffer", path.name, name)
    if getattr(module, "joint_embedding", None) is not None:
        raise ModelError(
            f"{path} needs further inputs per structure (charge, spin, ...), which are not supported; use another model"
        )
    return module
