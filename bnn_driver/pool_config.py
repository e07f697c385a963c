"""The sections of a TOML file for `bnn-driver select`: those of a simulation, a pool and a committee; no i-PI and no oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bnn_driver.config import Config, EnsembleSettings, Force, Length, OracleSettings, Section, System, read_settings
from bnn_driver.executor_config import TrainerSettings

Rank = Literal["force", "energy", "predictive", "atom"]
Count = Annotated[int, Field(ge=1)]


Idle = tuple[frozenset[str], str]
"""Names of settings, and why they would do nothing."""
BETWEEN = "the chains learn between the rounds, on the device of [potential]"
NO_TRAINER: Idle = (frozenset(TrainerSettings.model_fields) - {"update_retries"}, BETWEEN)
IDLE: dict[str, Idle] = {
    "output": (frozenset({"stride", "extras"}), "there is no i-PI"),
    "run": (frozenset({"margin"}), "`select` knows no limit of time; stopped at any moment it goes on with the same command"),
    "system": (frozenset({"structure"}), "the pool has the structures"),
}
OF_CHAINS: dict[str, Idle] = {
    "trainer": NO_TRAINER,
    "committee": (
        frozenset({"steps", "parallel", "mace"}),
        'it belongs to kind = "scratch"; the effort of chains is [ensemble] steps_per_update',
    ),
}
OF_SCRATCH: dict[str, Idle] = {
    "trainer": (frozenset(TrainerSettings.model_fields) - {"device", "threads"}, "mace's own trainer makes the models"),
    "potential": (frozenset({"model", "head", "path", "compile"}), "models from scratch have no foundation"),
    "ensemble": (frozenset(EnsembleSettings.model_fields) - {"members"}, "mace's own trainer makes the models; see [committee]"),
}


class LabelKeys(Section):
    """Where the labels stand in extended XYZ; never guessed."""

    energy_key: str = ""
    """Name of the labels' energy in the comment lines."""
    forces_key: str = ""
    """Name of the column of their forces."""
    stress_key: str = ""
    """Name of the stress in the comment lines, 9 numbers or 6 (xx yy zz yz xz xy), ASE's sign; empty: not learnt."""
    charge_key: str = ""
    """Name of the charge in the comment lines; empty: [system] charge holds for all."""
    multiplicity_key: str = ""
    level_key: str = ""
    """Name of what tells the level of theory; more than one value in the file is refused."""


class Choosing(Section):
    """How the frames of a round are chosen."""

    batch: int = Field(default=10, ge=1)
    """k, frames taken per round."""
    rank: Rank = "force"
    """Disagreement of forces (mean over atoms), of energies, calibrated predictive sd of the energy (both per atom where frames have
    different atoms), or the force disagreement of the worst atom."""
    diversity: bool = True
    """Take those of the uncertain frames that are far from each other and from the labels in the model's descriptors; false: the k
    most uncertain ones."""
    shortlist: float = Field(default=4.0, ge=1)
    """How many times k frames count as uncertain."""
    duplicates: Length = "0.02 A"  # type: ignore[assignment]
    """Frames whose sorted interatomic distances all differ by no more than this are nearly the same, and one of them is taken."""


class PoolSettings(LabelKeys, Choosing):
    """The labelled frames, what is held back, and how many are taken when."""

    file: str
    """Extended XYZ, relative to the config file; eV, Å, eV/Å, eV/Å^3."""
    test: Count | str
    """Frames that are never learnt: so many drawn from the pool, or a file of them."""
    start: Count | tuple[int, ...] | str = 20
    """Frames learnt before the first round: so many drawn from the pool, their numbers (from 0), or a file of them."""
    rounds: int | None = Field(default=None, ge=1)
    max_labels: int | None = Field(default=None, ge=1)
    """Budget, with the start."""
    target: Force | None = None
    """Mean force error on the test frames that is good enough."""
    plateau: bool = True
    """Stop when the disagreement of the selected frames levels off near that of the remaining ones."""
    plateau_rounds: int = Field(default=3, ge=1)
    plateau_fall: float = Field(default=0.05, ge=0, lt=1)
    """Fall of the disagreement per round below which it is level."""
    plateau_approach: float = Field(default=2.0, ge=1)
    """Disagreement of the selected over that of the remaining frames that counts as near."""
    baseline: int = Field(default=1, ge=0)
    """Random selections of the same sizes, learnt with the same effort afterwards, for comparison."""

    @model_validator(mode="after")
    def _ends(self) -> PoolSettings:
        if isinstance(self.start, tuple) and (len(set(self.start)) < len(self.start) or not self.start or min(self.start) < 0):
            raise ValueError(f"start must name at least one frame, none twice and none below 0, but is {list(self.start)}")
        return self


class CommitteeSettings(Section):
    """Who disagrees: [ensemble] members of one kind."""

    kind: Literal["chains", "scratch"] = "chains"
    """"chains": samples of the posterior around the foundation potential; "scratch": models that mace trains from random weights,
    each with a seed of its own."""
    steps: int = Field(default=4000, ge=1)
    """Gradient steps of each model from scratch per round, however many labels there are."""
    parallel: int = Field(default=1, ge=1)
    """Models from scratch that are trained at once."""
    mace: dict[str, Any] = Field(default_factory=dict)
    """Options of mace_run_train for models from scratch, over the small ones of the program."""


class PoolSystem(System):
    """Charge and multiplicity of frames that do not say their own."""

    periodic: bool = False
    """Given: what pbc in the file must say; not given: whatever it says."""


class SelectConfig(Config):
    """Everything that a selection is made of."""

    system: PoolSystem = PoolSystem()
    oracle: OracleSettings = OracleSettings(kind="none")
    pool: PoolSettings
    committee: CommitteeSettings = CommitteeSettings()

    @model_validator(mode="after")
    def _only_what_counts(self) -> SelectConfig:
        for name in ("ipi", "oracle", "executor", "sanity", "audit"):
            if name in self.model_fields_set:
                raise ValueError(f"[{name}] has no meaning for `select`: the labels of the pool are there already; remove it")
        refuse_idle(self, IDLE | (OF_SCRATCH if self.committee.kind == "scratch" else OF_CHAINS))
        if self.committee.kind == "scratch" and self.pool.stress_key and "loss" not in self.committee.mace:
            raise ValueError(
                "[pool] stress_key is there, but models from scratch learn no stress with mace's default loss; set [committee] "
                'mace = { loss = "stress" }, or remove stress_key'
            )
        return self


def refuse_idle(config: Config, idle: Mapping[str, Idle]) -> None:
    """Settings that would do nothing.  Args: idle: by section.   Raises: ValueError naming the first one that is given."""
    for section, (names, why) in idle.items():
        given = getattr(config, section).model_fields_set if section in config.model_fields_set else set()
        if found := sorted(given & names):
            raise ValueError(f"[{section}] {found[0]} has no meaning here: {why}; remove it")


def read_select_config(path: Path) -> SelectConfig:
    """Settings of a TOML file for `select`.  Raises: ConfigError naming file, key, what came and what was expected."""
    return read_settings(path, SelectConfig)
