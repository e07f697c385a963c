"""The sections of a TOML file for `bnn-driver explore`: those of a simulation, and what is run, chosen and labelled when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from bnn_driver import units
from bnn_driver.config import Config, read_config, read_settings, read_toml
from bnn_driver.errors import ConfigError
from bnn_driver.pool_config import NO_TRAINER, Choosing, Idle, LabelKeys, read_select_config, refuse_idle
from bnn_driver.sections import Femtoseconds, Force, Length

ONLY = "dynamics"
"""Name of the walker of [ipi] input."""
TEMPLATE = ("temperatures", "beads", "timestep", "steps")
"""Keys that mean nothing beside i-PI inputs of the user's own."""
IDLE: dict[str, Idle] = {
    "oracle": (frozenset({"ask", "rewinds"}), "no frame is served by the oracle"),
    "output": (frozenset({"stride"}), "[explore] stride says which frames are kept"),
    "trainer": NO_TRAINER,
    "system": (frozenset({"structure"}), "dynamics starts from [explore] structure or from inputs of your own"),
}
OF_KNOWN = (*LabelKeys.model_fields, "same_level")


def _kelvin(value: object) -> float:
    """A number is in kelvin, the only unit of temperatures."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    try:
        return units.parse_quantity(value, "temperature")
    except ConfigError as error:
        raise ValueError(str(error)) from None


Kelvin = Annotated[float, BeforeValidator(_kelvin), Field(gt=0)]


class ExploreSettings(LabelKeys, Choosing):
    """Dynamics of every round, what is chosen from it, and when it is enough."""

    structure: str = ""
    """A file that ASE reads, of which dynamics is started; empty: the inputs of [ipi] are used."""
    temperatures: tuple[Kelvin, ...] = ()
    """One walker each; K."""
    beads: int = Field(default=1, ge=1)
    """1: classical, Langevin thermostat; more: path integrals with PILE."""
    timestep: Femtoseconds = "0.5 fs"  # type: ignore[assignment]
    steps: int = Field(default=1000, ge=1)
    """Of every walker in every round; with an input of the user's own <total_steps> is."""
    stride: int = Field(default=20, ge=1)
    """Steps between the frames (all beads) that are pooled."""
    max_disagreement: Force | None = None
    """A walker is stopped where the members disagree more on the force of an atom; not given: only by [sanity]."""
    max_gap: Length = "5 A"  # type: ignore[assignment]
    """A walker is stopped where a part of a molecule or cluster is further than this from all other atoms; looked at every `stride`
    steps.  Without this, pieces that fly apart would look like dynamics on which all members agree."""
    known: str = ""
    """Labelled frames, extended XYZ, that are learnt first and whose disagreement is the level to be reached; other compositions may be
    among them."""
    same_level: bool = False
    """What the user states of `known`: its labels were made with the settings of [oracle].  Files of this program say it themselves."""
    start: int = Field(default=10, ge=2)
    """Frames labelled in the first round where nothing is known: far from each other, for there is no disagreement yet."""
    audits: int = Field(default=0, ge=0)
    """Random frames of every round that are labelled too, to measure whether the promise of [accuracy] holds."""
    baseline: int = Field(default=0, ge=0)
    """At the end, so many times for comparison: as many frames by lot from the same dynamics, learnt with the same effort and tested at
    the same audits.  Each asks the oracle for about as many labels as were chosen, beside [oracle] max_labels."""
    rounds: int = Field(default=10, ge=1)
    """With labels, at most; one more runs at the end for the figures of the last weights."""
    approach: float = Field(default=1.5, ge=0)
    """Converged when the mean disagreement on fresh dynamics is at most so many times that of the known frames; without these that of
    the labels, in two rounds in a row.  0: never."""

    @model_validator(mode="after")
    def _fits_together(self) -> ExploreSettings:
        if self.structure and not self.temperatures:
            raise ValueError("temperatures is missing: dynamics from `structure` needs at least one, such as [300]")
        given = [name for name in TEMPLATE if name in self.model_fields_set]
        if given and not self.structure:
            raise ValueError(
                f"{given[0]} belongs to dynamics from `structure`, which is not given; an input of your own says it itself"
            )
        if self.structure and self.steps < self.stride:
            raise ValueError(
                f"with steps = {self.steps} and stride = {self.stride} no frame but the first would be pooled; lower stride"
            )
        wanted = self.audits + (self.batch if self.known else max(self.batch, self.start))
        frames = len(self.temperatures) * self.beads * (self.steps // self.stride + 1)
        if self.structure and wanted > frames:
            raise ValueError(
                f"a round has {frames} frames (every {self.stride} steps of {self.steps}, {self.beads} beads, {len(self.temperatures)} "
                f"temperatures), but up to {wanted} are to be labelled; lower stride, batch, start or audits, or raise steps"
            )
        if self.baseline and not self.audits:
            raise ValueError(
                "baseline is compared at the audited frames of each round, but audits = 0; set audits, for example to 5"
            )
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures has one twice: {list(self.temperatures)}")
        alone = [name for name in OF_KNOWN if name in self.model_fields_set]
        if alone and not self.known:
            raise ValueError(f"{alone[0]} belongs to labelled frames in `known`, which is not given")
        return self


class ExploreConfig(Config):
    """Everything that an exploration is made of."""

    explore: ExploreSettings

    @model_validator(mode="after")
    def _dynamics_of_one_kind(self) -> ExploreConfig:
        own = bool(self.ipi.input or self.ipi.walkers)
        if own == bool(self.explore.structure):
            what = "both are" if own else "neither is"
            raise ValueError(f"dynamics comes from [ipi] input (or [ipi.walkers]) or from [explore] structure, but {what} given")
        refuse_idle(self, IDLE)
        if "audit" in self.model_fields_set:
            raise ValueError("[audit] has no meaning for `explore`, where no frame is served by the oracle; use [explore] audits")
        return self

    def walkers(self) -> tuple[str, ...]:
        """Names of the simulations of every round."""
        if self.explore.structure:
            return tuple(f"{kelvin:g}K" for kelvin in self.explore.temperatures)
        return tuple(self.ipi.walkers) or (ONLY,)


def read_explore_config(path: Path) -> ExploreConfig:
    """Settings of a TOML file for `explore`.  Raises: ConfigError naming file, key, what came and what was expected."""
    return read_settings(path, ExploreConfig)


def read_any_config(path: Path) -> Config:
    """Settings of a TOML file of any kind, told apart by the sections [pool] and [explore].  Raises: ConfigError."""
    tables = read_toml(path)
    if "explore" in tables:
        return read_explore_config(path)
    return read_select_config(path) if "pool" in tables else read_config(path)
