"""MACE's symmetric contraction as a sparse polynomial per channel, evaluated by two small matrix products.

out_w = Σ_ν Σ U_ν[w, i_1..i_ν, k] W_ν[k] x_{i_1}..x_{i_ν} has few distinct monomials once U is symmetrised (for lmax 3, ν = 3,
scalar output: 94 of 94,208).  Each monomial of degree <= 3, padded with the constant 1, is split into a pair and a single,
the pairs chosen so that few serve all (greedy cover):

    out_w = Σ_pairs (x_a x_b) Σ_i V[i, pair] x_i,        V = T W,

T the symmetrised coupling coefficients.  V depends on weights alone.  (Batatia et al., NeurIPS 2022, eq. 10 and 11.)

Compiled, and for few nodes, the plain sum over monomials is faster: it reads the five times fewer coefficients T W once, and
its products never reach memory.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnn_driver.potential.native.polynomial import PolynomialTables
from bnn_driver.records import Array

Monomial = tuple[int, int, int]
Polynomial = dict[Monomial, Array]


@dataclass(frozen=True)
class Coupling:
    """Coupling coefficients of one output irrep."""

    weights: tuple[str, ...]
    """Names of W_ν, each (elements, k_ν, channels), in the order of `tensors`."""
    tensors: tuple[Array, ...]
    """U_ν as (2l+1, n, ..., n, k_ν), ν indices of n components."""


@dataclass(frozen=True, eq=False)
class Monomials:
    """The polynomial term by term: Q terms of degree 3 in the components and the constant 1, sorted by output."""

    factors: tuple[Tensor, Tensor, Tensor]
    """Each (Q,) int64."""
    table: Tensor
    """T (k of all output irreps, Q)."""
    segments: list[int]
    """(R,) number of terms of each output."""

    def weights(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        """T W of every element, (M, E, Q, C).  Args: weights: as for `Contraction.weights`."""
        w = torch.cat([x for group in weights for x in group], dim=2)
        return torch.matmul(self.table.T, w)

    def __call__(self, x: Tensor, coefficients: Tensor, slices: Sequence[tuple[int, int, int]]) -> Tensor:
        """out (M, N, R, C).  Args: x, slices: as for `Contraction`.   coefficients: (M, E, Q, C)."""
        i, j, k = self.factors
        x, out = _with_one(x), []
        for e, first, last in slices:
            nodes = x[:, first:last]
            product = nodes.index_select(2, i) * nodes.index_select(2, j) * nodes.index_select(2, k)
            terms = (product * coefficients[:, e].unsqueeze(1)).split(self.segments, dim=2)
            out.append(torch.stack([part.sum(dim=2) for part in terms], dim=2))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


@dataclass(frozen=True, eq=False)
class Contraction:
    """Tables of one layer.  n components, R outputs over all output irreps, P pairs."""

    couplings: tuple[Coupling, ...]
    tables: tuple[Tensor, ...]
    """Per output irrep: T (k, P_L·(n+1))."""
    pairs: tuple[int, ...]
    """P_L."""
    first: Tensor
    """(P,) int64, first factor of each pair."""
    second: Tensor
    """(P,) int64, second factor."""
    segments: list[int]
    """(R,) number of pairs of each output; the pairs are sorted by output."""
    plain: Monomials
    """The same polynomial without factorisation."""
    sparse: PolynomialTables
    """The same, factorised, for the kernels."""
    components: int

    def weights(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        """V of every element.  Args: weights: per output irrep and ν: (M, E, k_ν, C).  Returns: (E, M, C, P, n+1)."""
        parts = []
        for table, pairs, group in zip(self.tables, self.pairs, weights, strict=True):
            w = torch.cat(list(group), dim=2).permute(1, 0, 3, 2)
            parts.append(torch.matmul(w, table).view(*w.shape[:3], pairs, self.components + 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def __call__(self, x: Tensor, pair_weights: Tensor, slices: Sequence[tuple[int, int, int]]) -> Tensor:
        """out (M, N, R, C).

        Args: x: (M, N, n, C).   pair_weights: (E, M, C, P, n+1).
            slices: (element, first node, last node + 1), nodes being sorted by element.
        """
        x = _with_one(x).permute(0, 3, 2, 1).contiguous()  # a product per channel
        of_element = pair_weights.unbind(0)
        nodes = x.split([b - a for _, a, b in slices], dim=-1)
        single = [torch.matmul(of_element[e], part) for (e, _, _), part in zip(slices, nodes, strict=True)]
        inner = single[0] if len(single) == 1 else torch.cat(single, dim=-1)
        terms = x.index_select(2, self.first) * x.index_select(2, self.second) * inner
        return torch.stack([part.sum(dim=2) for part in terms.split(self.segments, dim=2)], dim=2).permute(0, 3, 2, 1)


def _with_one(x: Tensor) -> Tensor:
    """(M, N, n + 1, C), the last component 1."""
    return torch.cat([x, x.new_ones(1, 1, 1, 1).expand(*x.shape[:2], 1, x.shape[3])], dim=2)


def build_contraction(couplings: Sequence[Coupling], dtype: torch.dtype, device: torch.device) -> Contraction:
    """Symmetrise and factorise the coupling tensors of one layer."""
    n = couplings[0].tensors[0].shape[1]
    tables: list[Array] = []
    counts: list[int] = []
    all_pairs: list[tuple[int, int]] = []
    owner: list[int] = []
    terms: list[tuple[int, int, Array]] = []
    widths = [sum(u.shape[-1] for u in coupling.tensors) for coupling in couplings]
    polynomials = [_monomials(coupling.tensors, n) for coupling in couplings]
    for number, (k, outputs) in enumerate(zip(widths, polynomials, strict=True)):
        first = max(owner, default=-1) + 1
        rows, pairs = _factorised(outputs, n)
        around = (sum(widths[:number]), sum(widths[number + 1 :]))
        terms += [(len(owner) + pair, single, np.pad(c, around)) for (single, pair), c in rows.items()]
        table = np.zeros((k, len(pairs), n + 1))
        for (single, pair), coefficients in rows.items():
            table[:, pair, single] += coefficients
        tables.append(table.reshape(k, -1))
        counts.append(len(pairs))
        all_pairs += [pair for _, pair in pairs]
        owner += [first + output for output, _ in pairs]
    factors = torch.tensor(all_pairs, dtype=torch.int64, device=device)
    return Contraction(
        couplings=tuple(couplings),
        tables=tuple(torch.as_tensor(t, dtype=dtype, device=device) for t in tables),
        pairs=tuple(counts),
        first=factors[:, 0].contiguous(),
        second=factors[:, 1].contiguous(),
        segments=np.bincount(owner).tolist(),
        plain=_plain(polynomials, widths, n, dtype, device),
        sparse=_sparse(terms, all_pairs, owner, sum(widths), dtype, device),
        components=n,
    )


def _plain(
    polynomials: Sequence[Sequence[Polynomial]], widths: Sequence[int], n: int, dtype: torch.dtype, device: torch.device
) -> Monomials:
    """All terms of all output irreps; an output without any keeps one of coefficient 0.  Args: widths: k of each irrep."""
    terms: list[Monomial] = []
    columns: list[Array] = []
    segments: list[int] = []
    for number, outputs in enumerate(polynomials):
        before, after = np.zeros(sum(widths[:number])), np.zeros(sum(widths[number + 1 :]))
        for monomials in outputs:
            found = sorted(monomials.items()) or [((n, n, n), np.zeros(widths[number]))]
            terms += [monomial for monomial, _ in found]
            columns += [np.concatenate([before, c, after]) for _, c in found]
            segments.append(len(found))
    index = torch.tensor(terms, dtype=torch.int64, device=device)
    factors = (index[:, 0].contiguous(), index[:, 1].contiguous(), index[:, 2].contiguous())
    return Monomials(factors, torch.as_tensor(np.stack(columns, axis=1), dtype=dtype, device=device), segments)


def _sparse(
    terms: Sequence[tuple[int, int, Array]],
    pairs: Sequence[tuple[int, int]],
    owner: Sequence[int],
    k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PolynomialTables:
    """Args: terms: (pair, single, coefficients (k,)).   pairs: (a, b).   owner: output of each pair."""
    ordered = sorted(terms, key=lambda term: term[:2])
    counts = np.bincount([pair for pair, _, _ in ordered], minlength=len(pairs))
    table = np.stack([c for _, _, c in ordered], axis=1) if ordered else np.zeros((k, 0))

    def integers(x: object) -> Tensor:
        return torch.as_tensor(np.asarray(x, dtype=np.int64), device=device)

    return PolynomialTables(
        single=integers([single for _, single, _ in ordered]),
        pair=integers([(a, b, r) for (a, b), r in zip(pairs, owner, strict=True)]),
        start=integers(np.concatenate([[0], np.cumsum(counts)])),
        table=torch.as_tensor(table, dtype=dtype, device=device),
        outputs=max(owner) + 1,
    )


Pair = tuple[int, tuple[int, int]]


def _factorised(outputs: Sequence[Polynomial], n: int) -> tuple[dict[tuple[int, int], Array], list[Pair]]:
    """(single, pair number) -> coefficients (k,), and the pairs (output, (a, b)) of one output irrep.

    Every output keeps at least one pair, so that an output that symmetry forbids is zero and not missing.
    """
    rows: dict[tuple[int, int], Array] = {}
    pairs: list[Pair] = []
    for output, monomials in enumerate(outputs):
        place: dict[tuple[int, int], int] = {}
        for monomial, (single, pair) in _cover(list(monomials)).items():
            if pair not in place:
                place[pair] = len(pairs)
                pairs.append((output, pair))
            rows[single, place[pair]] = monomials[monomial]
        if not monomials:
            pairs.append((output, (n, n)))
    return rows, pairs


def _monomials(tensors: Sequence[Array], n: int) -> list[Polynomial]:
    """Per output: sorted component indices (n stands for 1) -> coefficients (k,) over the weights of all ν."""
    k = sum(u.shape[-1] for u in tensors)
    out: list[dict[Monomial, Array]] = [defaultdict(lambda: np.zeros(k)) for _ in range(tensors[0].shape[0])]
    first = 0
    for u in tensors:
        nu, width = u.ndim - 2, u.shape[-1]
        for index in np.argwhere(np.abs(u).max(axis=-1) > 1e-12):
            components = sorted([int(i) for i in index[1:]] + [n] * (3 - nu))
            out[index[0]][(components[0], components[1], components[2])][first : first + width] += u[tuple(index)]
        first += width
    return [{m: c for m, c in terms.items() if np.abs(c).max() > 1e-12} for terms in out]


def _cover(monomials: Sequence[Monomial]) -> dict[Monomial, tuple[int, tuple[int, int]]]:
    """Monomial -> (single, pair), with few distinct pairs: greedy set cover."""
    users: dict[tuple[int, int], set[Monomial]] = defaultdict(set)
    for m in monomials:
        for a, b in itertools.combinations(range(3), 2):
            users[m[a], m[b]].add(m)
    out: dict[Monomial, tuple[int, tuple[int, int]]] = {}
    left = set(monomials)
    while left:
        pair = max(sorted(users), key=lambda p: len(users[p] & left))
        for m in sorted(users[pair] & left):
            rest = list(m)
            rest.remove(pair[0])
            rest.remove(pair[1])
            out[m] = (rest[0], pair)
        left -= users[pair]
    return out
