"""One TOML file -> frozen settings: the only home of default numbers.

Defaults are the published ones (Rensmeyer, Kramer, Niggemann, Digital Discovery 2026, 10.1039/d5dd00392j) unless said otherwise;
those that `bnn_driver.recipes` names were chosen by `tests/benchmarks/uncertainty.py`.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bnn_driver.errors import ConfigError
from bnn_driver.executor_config import ExecutorSettings, TrainerSettings
from bnn_driver.recipes import DEFAULT, Recipe, filled
from bnn_driver.sections import Energy, Force, Fraction, Length, Seconds, Section, Stress

WalkerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]


class Run(Section):
    """Where the run lives, and the seed from which all others are derived."""

    directory: str = "run"
    """Relative to the config file."""
    seed: int = Field(default=1, ge=0)
    margin: Seconds = "2 min"  # type: ignore[assignment]
    """Kept before the end of the job (or --until) for stopping alone: i-PI writes its RESTART, processes end.  No label need fit in."""


class Ipi(Section):
    """The i-PI input; address, mode, batch size, beads and atoms are read from it."""

    input: str = ""
    """The XML, relative to the config file; may stay empty for `serve` when [system] structure is given."""
    walkers: dict[WalkerName, str] = Field(default_factory=dict)
    """Name -> XML of simulations of the same atoms that share labels, chains and weights: replicas, temperatures, umbrella windows."""
    connect_timeout: Seconds = "2 min"  # type: ignore[assignment]
    reconnects: int = Field(default=10, ge=0)
    silence_timeout: Seconds = "6 h"  # type: ignore[assignment]
    """An i-PI that asks nothing for so long is taken for hung; longer when other force providers of the same input take longer."""

    @model_validator(mode="after")
    def _one_or_many(self) -> Ipi:
        if self.input and self.walkers:
            raise ValueError("either input, for one simulation, or walkers, for several, but both are given")
        repeated = sorted(file for file in set(self.walkers.values()) if list(self.walkers.values()).count(file) > 1)
        if repeated:
            raise ValueError(
                f"two walkers have the same input {repeated[0]!r}; give each its own XML, with its own socket address and random seed"
            )
        return self

    def input_of(self, walker: str) -> str:
        """The XML of a walker, or of the only simulation.  Raises: ConfigError for an unknown name."""
        if not walker:
            return self.input
        if walker not in self.walkers:
            raise ConfigError(f"there is no walker {walker!r} in [ipi.walkers]{_nearest(walker, self.walkers)}")
        return self.walkers[walker]


class System(Section):
    """What the i-PI protocol does not tell."""

    periodic: bool
    """i-PI always sends a cell; False: molecules in vacuum, the cell is ignored."""
    charge: int = 0
    multiplicity: int = Field(default=1, ge=1)
    structure: str = ""
    """A file that ASE reads, for the order of the elements, when there is no i-PI input."""


class PotentialSettings(Section):
    """The foundation potential."""

    model: str = "embedded"
    """A .model file (relative to the config file), a name that mace-torch knows, or "embedded"."""
    head: str = ""
    device: str = "cpu"
    dtype: Literal["float64", "float32"] = "float32"
    kernels: Literal["auto", "off"] = "auto"
    """Our own C++ for the inner loops on a CPU: compiled once per machine in a quarter of a minute where there is a compiler, and used
    while it agrees with the plain operations."""
    path: Literal["auto", "stacked", "modules", "cueq"] = "auto"
    """Which code evaluates MACE: the fast path where it is exact ("auto", "stacked"), MACE's own modules, or these with
    cuEquivariance's operators, which are meant for GPUs."""
    compile: Literal["off", "auto", "on"] = "off"
    """Machine code for the fast path, compared with the plain one before it is used: "on" at the first use of a shape, which takes
    minutes on a CPU, "auto" once a shape has cost as much time as compiling it would.  On a GPU both also replay recordings of their
    kernels (CUDA graphs), "auto" from the third use of a shape on."""
    threads: int = Field(default=1, ge=1)
    """Threads of one process; more than one pays only on idle machines and for large systems."""


class EnsembleSettings(Section):
    """Prior, likelihood and sampler of the Bayesian network."""

    recipe: Recipe = DEFAULT
    """Named defaults of this section and of [calibration]; "rensmeyer2026" is the published recipe."""
    members: int = Field(default=8, ge=2)
    sampled: Literal["all", "last-interaction", "readout"] = "all"
    """The weights that move; the others keep their foundation values, and what they make of a frame is computed once for all members."""
    prior_sd: float = Field(default=0.5, gt=0)
    """sigma_TL: weights ~ N(foundation, prior_sd²); published 0.5 for MACE."""
    dispersion: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """sd of the chains' own centres around the foundation weights: each chain starts at its centre and has its prior around it.  "auto":
    as large as explains the foundation's error in the first labels, at most prior_sd; published 0."""
    distance: Literal["auto", "energy", "off"] = "auto"
    """"energy": the variance of an energy gets what the labels leave open of the last layer's weights, in closed form, which grows with
    the distance to the labels; "auto": where the potential has such a layer; published "off"."""
    label_weights: Literal["equal", "bootstrap", "folds"] = "equal"
    """How the labels count in each chain: all the same, with weights of its own (Bayesian bootstrap), or some left out."""
    energy_noise: Fraction = 0.1
    """sd of a label's energy as a share of the accuracy."""
    force_noise: Force = "0.1 kcal/mol/A"  # type: ignore[assignment]
    """sd of a label's force component; with predicted noise, before the head has learnt."""
    stress_noise: Stress = "0.00625 kcal/mol/A^3"  # type: ignore[assignment]
    """sd of a label's stress component: 0.1/16 kcal/mol/Å^3."""
    predicted_noise: tuple[Literal["energy", "forces"], ...] = ()
    """Quantities whose noise a head predicts from the features of the atoms, times the sds above; published: ["forces"]."""
    noise_head: tuple[int, ...] = (64, 16)
    """Widths of its hidden layers."""
    steps_per_update: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=5, ge=2)
    step_size: float = Field(default=3e-3, gt=0)
    """At the start of an update; published 1e-3 for MACE."""
    cycles: int = Field(default=1, ge=1)
    """Cosines of the step size in one update, of which the last one ends on the sample."""
    friction: float = Field(default=0.1, gt=0, le=1)
    mass_decay: float = Field(default=0.999, gt=0, lt=1)
    mass_floor: float = Field(default=1e-4, gt=0)
    temperature: float = Field(default=1.0, ge=0)
    noiseless: Fraction = 0.2
    """Share of an update before the noise begins."""
    ramp: Fraction = 0.05
    """Share of an update over which the noise then rises to its full amplitude."""
    stop_when_learnt: bool = False
    """End an update early when all chains meet its new labels within their noise (χ² test at full temperature)."""
    settling: float = Field(default=0.25, gt=0, le=1)
    """Share of an update that still follows then, at full temperature and with a falling step."""
    loss_margin: float = Field(default=1.0, gt=0)
    """Nats per label component by which the loss may end above its start before an update counts as diverged."""
    temperature_range: tuple[float, float] = (0.2, 5.0)
    """Kinetic temperature, in units of the target, outside which an update counts as diverged."""
    member_chunk: int | None = Field(default=None, ge=1)
    """Members evaluated together; chosen from the size of the work when not given."""
    skin: Length | None = None
    """Neighbour lists serve until an atom has moved by half of it; 0.5 Å on a GPU and 0 on a CPU when not given."""


class ForceGroup(Section):
    """Named atoms with a force threshold of their own."""

    atoms: tuple[int, ...]
    """Indices from 0, in the order of the i-PI input."""
    forces: Force


class Accuracy(Section):
    """The promise: P(|error| >= accuracy) <= 1 - confidence for every frame that is served."""

    energy: Energy
    """Total energy of the structure."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    forces: Force | None = None
    """Error of the force on any atom (vector norm); off when not given."""
    species: dict[str, Force] = Field(default_factory=dict)
    """Threshold for the atoms of one element."""
    groups: dict[str, ForceGroup] = Field(default_factory=dict)


class CalibrationSettings(Section):
    """Gamma prior on the precision of the predictive sd: before the first pair errors are sqrt(b/a) times as large as predicted."""

    a: float = Field(default=1.0, gt=0)
    """Half the degrees of freedom before the first pair: few, so that the first pairs are decided with wide tails and then count;
    published 1.5."""
    b: float = Field(default=1.5, gt=0)
    """Published 10."""
    forgetting: float = Field(default=0.9, gt=0, le=1)
    """Weight of a pair relative to the next one: the trust in the sds follows a change of conformer or phase; 1, as published, forgets
    nothing."""


class Audit(Section):
    """Random labels of served frames, which measure whether the promise holds."""

    expected: float = Field(default=30, ge=0)
    """Labels expected over the run when its number of steps is known."""
    probability: Fraction | None = None
    """Chance that a served frame is audited; wins over `expected`."""


class Sanity(Section):
    """A frame outside ends the run instead of being labelled."""

    min_distance: Length = "0.5 A"  # type: ignore[assignment]
    max_force: Force = "100 eV/A"  # type: ignore[assignment]


class OracleSettings(Section):
    """The ab initio code; its own options stand in the table [oracle.KIND]."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)

    kind: str
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    timeout: Seconds = "1 h"  # type: ignore[assignment]
    ask: Literal["all", "worst"] = "all"
    """When several beads of a step are beyond the accuracy: label all of them at once, or the most uncertain ones, as many as there are
    workers; then the chains learn and the others are judged again, until none is left."""
    max_labels: int | None = Field(default=None, ge=1)
    """Budget; reaching it ends the run with exit code 7, never loosens the promise."""
    rewinds: int = Field(default=3, ge=0)
    """How many times in a row `run` goes back to a checkpoint, and on with other random numbers, when a frame cannot be labelled."""

    @property
    def options(self) -> dict[str, Any]:
        """The table [oracle.KIND]."""
        return dict((self.model_extra or {}).get(self.kind, {}))

    @model_validator(mode="after")
    def _only_own_table(self) -> OracleSettings:
        for key, value in (self.model_extra or {}).items():
            if key == self.kind and isinstance(value, dict):
                continue
            if isinstance(value, dict):
                raise ValueError(f'table [oracle.{key}] does not belong to kind = "{self.kind}"; name it [oracle.{self.kind}]')
            raise ValueError(
                f"unknown key {key!r}{_nearest(key, type(self).model_fields)}; options of the code go to [oracle.{self.kind}]"
            )
        return self


class Output(Section):
    """What is recorded and sent."""

    stride: int = Field(default=10, ge=1)
    """Steps between records of frames that are only served; asked and audited ones are always recorded."""
    extras: Literal["scalars", "energy", "forces"] = "scalars"
    """What i-PI gets beside bnn_*: nothing, committee_pot, or also committee_force and committee_virial."""
    keep_generations: int = Field(default=5, ge=1)


class Config(Section):
    """Everything that a run is made of."""

    run: Run = Run()
    ipi: Ipi = Ipi()
    system: System
    potential: PotentialSettings = PotentialSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    accuracy: Accuracy
    calibration: CalibrationSettings = CalibrationSettings()
    audit: Audit = Audit()
    sanity: Sanity = Sanity()
    trainer: TrainerSettings = TrainerSettings()
    oracle: OracleSettings
    executor: ExecutorSettings = ExecutorSettings()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, raw: Any) -> Any:
        return filled(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _labels_fit_the_executor(self) -> Config:
        try:
            self.executor.check(self.oracle.timeout, "workers" in self.oracle.model_fields_set)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


def read_config(path: Path) -> Config:
    """Settings of the TOML file of a simulation.  Raises: ConfigError naming file, key, what came and what was expected."""
    return read_settings(path, Config)


Settings = TypeVar("Settings", bound=Config)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Settings of a TOML file with the sections of `kind`.  Raises: ConfigError as `read_config`."""
    try:
        return kind.model_validate(read_toml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, item, kind) for item in error.errors())) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, whatever they hold.  Raises: ConfigError when there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; examples/ethanol/bnn.toml is one to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def _explain(path: Path, item: Any, kind: type[Config]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = _section_at(item["loc"][:-1], kind)
        known = section.model_fields if section is not None else {}
        return f"{path}: unknown key {where}{_nearest(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{path}: {where} is missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if not where:
        return f"{path}: {message}"
    came = "" if repr(item["input"]) in message else f" (got {item['input']!r})"
    return f"{path}: {where}: {message}{came}"


def _section_at(location: tuple[Any, ...], kind: type[Config]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = kind
    for name in location:
        if section is None or name not in section.model_fields:
            return None
        inner = section.model_fields[name].annotation
        section = next((t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel)), None)
    return section


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known keys: {', '.join(known)}" if known else ""
