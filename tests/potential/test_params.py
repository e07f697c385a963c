"""Stacking and flattening lose nothing."""

from __future__ import annotations

import pytest
import torch

from bnn_driver.errors import ModelError
from bnn_driver.potential.params import flatten, stack_weights, unstack_weights


def test_flat_rows_and_named_weights_are_inverse() -> None:
    weights = {"a": torch.randn(3, 2, 4), "b": torch.randn(3, 1), "c": torch.randn(3)}
    theta, layout = flatten(weights)
    assert theta.shape == (3, 10)
    assert layout.size == 10
    back = layout.views(theta)
    assert all(torch.equal(back[name], x) for name, x in weights.items())
    again = stack_weights(unstack_weights(weights))
    assert all(torch.equal(again[name], x) for name, x in weights.items())


def test_gradient_through_the_views_reaches_theta() -> None:
    theta, layout = flatten({"a": torch.randn(2, 3), "b": torch.randn(2, 2)})
    theta.requires_grad_(True)
    views = layout.views(theta)
    (g,) = torch.autograd.grad((views["b"] ** 2).sum(), theta)
    assert torch.equal(g[:, 3:], 2 * theta.detach()[:, 3:])
    assert not g[:, :3].any()


def test_members_of_different_architecture_are_refused() -> None:
    with pytest.raises(ModelError, match="member 1"):
        stack_weights([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
