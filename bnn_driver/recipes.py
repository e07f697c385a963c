"""Named settings of the ensemble and its calibration: the published recipe beside the default ones of `bnn_driver.config`.

A key that stands in the config file wins over the recipe.
"""

from __future__ import annotations

from typing import Any, Literal

Recipe = Literal["dispersed", "rensmeyer2026"]

DEFAULT: Recipe = "dispersed"

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "dispersed": {},
    # Rensmeyer, Kramer, Niggemann, Digital Discovery 2026, DOI 10.1039/d5dd00392j, for MACE
    "rensmeyer2026": {
        "ensemble": {"step_size": 1e-3, "dispersion": 0.0, "distance": "off", "predicted_noise": ("forces",)},
        "calibration": {"a": 1.5, "b": 10.0, "forgetting": 1.0},
    },
}


def filled(raw: dict[str, Any]) -> dict[str, Any]:
    """A config as read from its file, with what its recipe says where the file says nothing; wrong types are left to validation."""
    ensemble = raw.get("ensemble")
    name = ensemble.get("recipe", DEFAULT) if isinstance(ensemble, dict) else DEFAULT
    recipe = RECIPES.get(name, {}) if isinstance(name, str) else {}
    found = dict(raw)
    for section, values in recipe.items():
        given = raw.get(section, {})
        if isinstance(given, dict):
            found[section] = values | given
    return found
