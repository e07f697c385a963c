"""From sampled weights back to files that MACECalculator and i-PI's mace driver load."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bnn_driver.errors import ModelError
from bnn_driver.potential.factory import MacePotential
from bnn_driver.potential.params import unstack_weights

logger = logging.getLogger(__name__)


def to_mace(potential: MacePotential, weights: Mapping[str, Tensor]) -> nn.Module:
    """A full MACE module, all elements and heads, with the weights of one member.

    Weights that are not sampled, and entries of absent elements and other heads, keep their foundation values.

    Args: weights: name -> (...), without member axis; names under "noise." are left out.
    Raises: ModelError when a weight is missing or has another shape.
    """
    for name, expected in potential.weights.items():
        if name not in weights or weights[name].shape != expected.shape:
            came = tuple(weights[name].shape) if name in weights else "nothing"
            raise ModelError(f"weight {name}: expected shape {tuple(expected.shape)}, but got {came}; give one member's weights")
    module = copy.deepcopy(potential.module)
    full = potential.sampled.expanded({name: weights[name].detach() for name in potential.weights})
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(full[name])
    return module


def export_mace(potential: MacePotential, weights: Mapping[str, Tensor], folder: str | Path) -> list[Path]:
    """Write member_0.model, member_1.model, ... into a folder; each replaces an older file at once or not at all.

    Args: weights: name -> (M, ...), on any device.   Returns: the paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    network = {name: x for name, x in weights.items() if name in potential.weights}
    paths = []
    for m, member in enumerate(unstack_weights(network)):
        path = folder / f"member_{m}.model"
        partial = folder / f"member_{m}.model.part"
        torch.save(to_mace(potential, member).cpu(), partial)
        os.replace(partial, path)
        paths.append(path)
    logger.info("wrote %d models into %s", len(paths), folder)
    return paths
