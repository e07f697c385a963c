"""Ways to make an ensemble know its errors, each as settings of the product, with their sources.

Every candidate is a set of `[ensemble]` keys on top of the default or of the published recipe; `uncertainty.py` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.config import CalibrationSettings, EnsembleSettings
from bnn_driver.loops.assembly import make_learner, make_noise
from bnn_driver.loops.chain_update import Learner
from bnn_driver.potential.contract import Potential
from bnn_driver.potential.stacked import StackedPotential
from bnn_driver.potential.subspace import SubspacePotential
from bnn_driver.recipes import DEFAULT, RECIPES


@dataclass(frozen=True)
class Candidate:
    """One way."""

    recipe: str
    keys: dict[str, Any] = field(default_factory=dict)
    """[ensemble] keys."""
    source: str = ""
    base: str = ""
    """Name of the candidate whose chains are used, when only the sds differ."""
    sds: Literal["spread", "laplace", "sum"] = "spread"
    """Where the sds come from: the members, the last-layer Laplace of `laplace.py`, or both variances together."""
    function_prior: bool = False
    """The chains are drawn to the foundation model at unlabelled frames, see `function_prior.py`."""

    def settings(self, **others: Any) -> EnsembleSettings:
        """[ensemble].  Args: others: keys that win, such as a smaller number of steps."""
        return EnsembleSettings(**({"recipe": self.recipe} | RECIPES[self.recipe].get("ensemble", {}) | self.keys | others))

    def calibration(self) -> GammaCalibration:
        """What is believed before the first pair."""
        c = CalibrationSettings(**RECIPES[self.recipe].get("calibration", {}))
        return GammaCalibration(c.a, c.b, c.forgetting)


PUBLISHED = "rensmeyer2026"
CANDIDATES: dict[str, Candidate] = {
    "published": Candidate(PUBLISHED, source="Rensmeyer et al. 2026"),
    "default": Candidate(DEFAULT),
    # what the default changes, one after the other
    "fixed noise": Candidate(PUBLISHED, {"predicted_noise": ()}, "no head"),
    "fixed noise, large steps": Candidate(DEFAULT, {"dispersion": 0.0}, "no head, step size 3e-3"),
    "published, large steps": Candidate(PUBLISHED, {"step_size": 3e-3}),
    "published, dispersed": Candidate(PUBLISHED, {"dispersion": "auto"}),
    "dispersed 0.125": Candidate(DEFAULT, {"dispersion": 0.125}, "anchored ensemble, Pearce et al. 2020"),
    "dispersed 0.25": Candidate(DEFAULT, {"dispersion": 0.25}, "anchored ensemble"),
    "dispersed 0.5": Candidate(DEFAULT, {"dispersion": 0.5}, "anchored ensemble"),
    # other ways, on top of the default
    "predicted energy noise": Candidate(PUBLISHED, {"predicted_noise": ("energy", "forces")}, "Nix, Weigend 1994"),
    "bootstrap": Candidate(DEFAULT, {"label_weights": "bootstrap"}, "Rubin 1981; Newton, Raftery 1994"),
    "bootstrap alone": Candidate(DEFAULT, {"label_weights": "bootstrap", "dispersion": 0.0}, "Newton, Raftery 1994"),
    "folds": Candidate(DEFAULT, {"label_weights": "folds"}, "Krogh, Vedelsby 1995"),
    "cold": Candidate(DEFAULT, {"temperature": 0.0}, "deep ensemble, Lakshminarayanan et al. 2017"),
    "hot": Candidate(DEFAULT, {"temperature": 10.0, "dispersion": 0.0, "temperature_range": (0.05, 20.0)}, "tempered posterior"),
    "longer": Candidate(PUBLISHED, {"steps_per_update": 6000}, "three times the steps"),
    "cyclical": Candidate(PUBLISHED, {"cycles": 4}, "Zhang et al. 2020"),
    "function prior": Candidate(DEFAULT, {"dispersion": 0.0}, "Hafner et al. 2018", function_prior=True),
    "default, function prior": Candidate(DEFAULT, source="Hafner et al. 2018", function_prior=True),
    "no distance": Candidate(DEFAULT, {"distance": "off"}, "spread of dispersed chains alone", base="default"),
    "published, distance": Candidate(PUBLISHED, {"distance": "auto"}, "LLPR, Bigi et al. 2024", base="published"),
    "Laplace": Candidate(DEFAULT, {"distance": "off"}, "energies and forces, no spread", base="default", sds="laplace"),
    "Laplace and spread": Candidate(DEFAULT, {"distance": "off"}, "energies and forces", base="default", sds="sum"),
    "readouts": Candidate(DEFAULT, {"sampled": "readout", "step_size": 1e-2}, "Kellner, Ceriotti 2024"),
}  # fmt: skip


def potential_of(whole: StackedPotential, settings: EnsembleSettings) -> Potential:
    """The potential with the weights that move."""
    return whole if settings.sampled == "all" else SubspacePotential(whole, settings.sampled)


def learner_of(whole: StackedPotential, settings: EnsembleSettings, accuracy: float, seed: int) -> Learner:
    """As the trainer of a run has it.  Args: accuracy: eV."""
    potential = potential_of(whole, settings)
    return make_learner(potential, make_noise(settings, accuracy, potential.n_features), settings, seed)
