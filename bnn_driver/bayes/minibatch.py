"""Priority sampling of minibatches: the newest labels come often, and the weights keep the estimate unbiased.

With N labels, each drawn with probability q_i, the estimate Σ_b w_b x_b over B draws with w_b = 1 / (B N q_b) has the
expectation (1/N) Σ_i x_i exactly.  (Published form: (1/B) Σ_b w_b x_b with w_b = count · (1/N)/q; the factor 1/B is in w here.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bnn_driver.errors import BnnError

LabelWeights = Literal["equal", "bootstrap", "folds"]


def repeats(n_labels: int, batch_size: int, n_newest: int) -> int:
    """How often each newest label is repeated in the urn, L = ceil(c (N-K) / (K (B-c))).

    c is the expected number of newest labels in a minibatch: K, but at most half of the batch, and 1 when K = 1, where
    L = ceil((N-1)/(B-1)) with N-1 old labels as published.

    Args: n_labels: N.   batch_size: B.   n_newest: K.   Returns: L >= 1.
    """
    old = n_labels - n_newest
    expected = min(n_newest, max(1, batch_size // 2))
    if n_newest == 0 or old <= 0 or batch_size <= expected:
        return 1
    return max(1, math.ceil(expected * old / (n_newest * (batch_size - expected))))


def probabilities(n_labels: int, batch_size: int, newest: Sequence[int]) -> Tensor:
    """Probability q_i of each label in one draw.

    Args: n_labels: N.   batch_size: B.   newest: indices of the newest labels.   Returns: (N,) float64, sum 1.
    Raises: BnnError when N or B is below 1 or an index is outside 0..N-1.
    """
    if n_labels < 1 or batch_size < 1:
        raise BnnError(f"a minibatch needs at least one label and a batch size of 1, but got N = {n_labels}, B = {batch_size}")
    outside = [i for i in newest if not 0 <= i < n_labels]
    if outside:
        raise BnnError(f"newest label {outside[0]} is not one of the {n_labels} labels (0..{n_labels - 1})")
    tickets = torch.ones(n_labels, dtype=torch.float64)
    tickets[list(set(newest))] = float(repeats(n_labels, batch_size, len(set(newest))))
    return tickets / tickets.sum()


def draw_chains(
    n_labels: int, batch_size: int, newest: Sequence[int], generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """One minibatch per chain, all of the same width, so that shapes stay fixed during an update.

    A label drawn twice stays twice in the row, which gives the same estimate as merging.  N <= B: every label once, weight 1/N.

    Args: n_labels: N.   batch_size: B.   newest: indices.   generators: M CPU generators, one per chain.
    Returns: index (M, b) int64 and weight (M, b) float64, b = min(N, B); Σ_b weight x[index] estimates the mean of x.
    """
    m = len(generators)
    if n_labels <= batch_size:
        index = torch.arange(n_labels).expand(m, n_labels)
        return index, torch.full((m, n_labels), 1.0 / n_labels, dtype=torch.float64)
    q = probabilities(n_labels, batch_size, newest)
    edges = q.cumsum(0)
    uniform = torch.stack([torch.rand(batch_size, dtype=torch.float64, generator=g) for g in generators])
    index = torch.searchsorted(edges, uniform, right=True).clamp_(max=n_labels - 1)
    return index, 1.0 / (batch_size * n_labels * q[index])


def own_weights(kind: LabelWeights, seeds: Sequence[Sequence[int]]) -> Tensor | None:
    """Weight of every label in the likelihood of every chain, so that the chains do not learn one and the same set.

    "bootstrap": independent draws from the exponential law of mean 1 (the Bayesian bootstrap, Rubin 1981, DOI
    10.1214/aos/1176345338, without its normalisation, so that a new label leaves the others as they are; Newton, Raftery 1994).
    "folds": two chains leave a label out, one where there are fewer than six (cross-validation committee, Krogh, Vedelsby 1995,
    NeurIPS 7); the others learn it with the weight that keeps the sum over the chains.

    Args: kind: "equal" gives None.   seeds: (M, N) integers; in "folds" those of the first chain choose who leaves a label out.
    Returns: (M, N) float64 or None.
    """
    if kind == "equal":
        return None
    table = torch.tensor(seeds, dtype=torch.int64)
    if kind == "bootstrap":
        uniform = (table.double() + 0.5) / 2.0**63
        return -torch.log1p(-uniform.clamp(max=1 - 1e-12))
    m = len(table)
    weights = torch.ones(table.shape, dtype=torch.float64)
    out = 2 if m >= 6 else 1
    for k in range(out):
        chain = (table[0] + k * (m // out)) % m
        weights[chain, torch.arange(table.shape[1])] = 0.0
    return weights * m / (m - out)


def draw(n_labels: int, batch_size: int, newest: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One minibatch with duplicates merged.

    Args: as in `draw_chains`.   Returns: distinct indices (b,) int64 in rising order and weights (b,) float64, b <= B.
    """
    index, weight = draw_chains(n_labels, batch_size, newest, [generator])
    distinct, where = torch.unique(index[0], return_inverse=True)
    return distinct, torch.zeros(len(distinct), dtype=torch.float64).index_add(0, where, weight[0])
