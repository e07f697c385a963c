"""Chosen frames and frames by lot are compared at equal effort: the steps of an update, and a refusal where these have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bnn_driver.config import Config
from bnn_driver.errors import ConfigError
from bnn_driver.pool_config import SelectConfig

STEPS = "steps_per_update"
"""In the record of what was learnt with them."""


def effort(config: Config) -> tuple[str, int]:
    """The setting that says how many gradient steps a member makes in an update, and how many these are."""
    if isinstance(config, SelectConfig) and config.committee.kind == "scratch":
        return "[committee] steps", config.committee.steps
    return "[ensemble] steps_per_update", config.ensemble.steps_per_update


def check_equal_effort(config: Config, records: Iterable[Mapping[str, Any]]) -> None:
    """Raises: ConfigError when some were learnt with other numbers of steps.

    Args: records: of what was learnt so far, with STEPS (but those of versions that did not write it).
    """
    name, steps = effort(config)
    if other := sorted({int(record[STEPS]) for record in records if STEPS in record} - {steps}):
        raise ConfigError(
            f"frames by lot are learnt with the same effort as the chosen ones, but {name} = {steps}, and updates of this run had "
            f"{', '.join(map(str, other))}; set it back, set baseline = 0, or begin a new run directory"
        )
