"""What the tests of this room share."""

from __future__ import annotations

import pytest
import torch
from random_models import random_mace


@pytest.fixture(scope="session")
def residual_mace() -> torch.nn.Module:
    """The plain variant, built once; no test changes it."""
    return random_mace()
