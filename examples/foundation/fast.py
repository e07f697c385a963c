"""The energy of one kind of MACE written out: scalar features, two layers, correlation 2.

Without vectors between layers the Clebsch-Gordan products reduce to sums of squares, so the general kernels of mace are not
needed; a training step costs about a fifth. It reads the weights of a mace module, which therefore is what gets trained.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ScalarMACE:
    """Interaction energy of batches from the weights of a ScaleShiftMACE with hidden irreps Cx0e, max_ell 2, correlation 2."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.channels = model.products[0].linear.irreps_out.dim
        self.squares = [diagonal(p.symmetric_contractions.contractions[0].U_matrix_2) for p in model.products]
        self.single = [float(p.symmetric_contractions.contractions[0].U_matrix_1[0, 0]) for p in model.products]

    def energy(
        self, counts: list[int], vectors: Tensor, sender: Tensor, receiver: Tensor, frame: Tensor, n_frames: int
    ) -> Tensor:
        """Energy of each frame without the isolated atoms'.

        Args: counts: atoms of each element; the batch's atoms stand in the order of the elements.   vectors: (E, 3) Å from sender to receiver.
            sender, receiver: (E,) atom indices.   frame: (N,) frame of each atom.   n_frames: B.
        Returns: (B,) eV.
        """
        model, c = self.model, self.channels
        lengths = vectors.norm(dim=1, keepdim=True)
        radial, _ = model.radial_embedding(lengths, sender, sender, sender)
        slot, width = slots(receiver, len(frame))
        harmonics = [padded(y, slot, len(frame), width).transpose(1, 2) for y in spherical_harmonics(vectors / lengths)]
        table = model.node_embedding(torch.eye(len(counts), dtype=vectors.dtype))
        features = torch.cat([row.expand(n, c) for row, n in zip(table, counts, strict=True)])
        energy = torch.zeros(len(frame), dtype=vectors.dtype)
        for layer, (interaction, product) in enumerate(zip(model.interactions, model.products, strict=True)):
            skip = interaction.skip_tp.weight / (c * len(counts)) ** 0.5
            kept = 0.0
            if layer == 1:
                kept = by_element(features, skip.view(c, len(counts), c), counts)
            up = features @ interaction.linear_up.weight.view(c, c) / c**0.5
            weights = interaction.conv_tp_weights(radial).view(-1, 3, c)
            summed = neighbours(up[sender].unsqueeze(1) * weights, harmonics, slot)
            mixed = [x @ w / c**0.5 for x, w in zip(summed, interaction.linear.weight.view(3, c, c), strict=True)]
            mixed = [x / interaction.avg_num_neighbors for x in mixed]
            if layer == 0:
                mixed = [by_element(x, w, counts) for x, w in zip(mixed, skip.view(3, c, len(counts), c), strict=True)]
            features = self.product(layer, mixed, counts) @ product.linear.weight.view(c, c) / c**0.5 + kept
            energy = energy + model.readouts[layer](features, None).view(-1)
        scaled = model.scale_shift.scale * energy + model.scale_shift.shift
        return torch.zeros(n_frames, dtype=vectors.dtype).index_add(0, frame, scaled)

    def product(self, layer: int, mixed: list[Tensor], counts: list[int]) -> Tensor:
        """Symmetric contraction to scalars: a linear term and the squared norm of each l, weighted by element.  Returns: (N, C)."""
        contraction = self.model.products[layer].symmetric_contractions.contractions[0]
        norms = torch.stack([x.square().sum(1) for x in mixed], dim=1)  # (N, 3, C)
        quadratic = torch.einsum("lk,zkc->zlc", self.squares[layer], contraction.weights_max)
        linear = self.single[layer] * contraction.weights[0][:, 0]
        parts = zip(norms.split(counts), mixed[0][:, 0].split(counts), quadratic, linear, strict=True)
        return torch.cat([(n * q).sum(1) + s * w for n, s, q, w in parts])


def diagonal(coupling: Tensor) -> Tensor:
    """(3, K): the coupling of A_lm with A_lm for each l, from mace's (9, 9, K), which has nothing else."""
    on = torch.stack([coupling[i, i] for i in (0, 1, 4)])
    expected = torch.zeros_like(coupling)
    for i in range(9):
        expected[i, i] = on[0 if i == 0 else 1 if i < 4 else 2]
    if not torch.allclose(coupling, expected, atol=1e-6):
        raise ValueError(
            "the coupling is not a sum of squares: this energy is written for hidden irreps Cx0e and correlation 2 only"
        )
    return on


def spherical_harmonics(unit: Tensor) -> list[Tensor]:
    """l = 0, 1, 2 in e3nn's "component" norm, |Y_l|² = 2l+1; the order of m is free as only norms are taken.  Args: unit: (E, 3)."""
    x, y, z = unit.unbind(1)
    s = 15.0**0.5
    second = [s * x * y, s * y * z, s * x * z, 0.5 * s * (x * x - y * y), 0.5 * 5.0**0.5 * (3 * z * z - 1)]
    return [torch.ones_like(unit[:, :1]), 3.0**0.5 * unit, torch.stack(second, dim=1)]


def slots(receiver: Tensor, n_atoms: int) -> tuple[Tensor, int]:
    """(E,) a place of its own for each edge, receiver * K + k, and K, the largest number of neighbours."""
    degree = torch.bincount(receiver, minlength=n_atoms)
    first = degree.cumsum(0) - degree
    order = torch.argsort(receiver, stable=True)
    rank = torch.empty_like(receiver)
    rank[order] = torch.arange(len(receiver)) - first[receiver[order]]
    width = int(degree.max())
    return receiver * width + rank, width


def padded(x: Tensor, slot: Tensor, n_atoms: int, width: int) -> Tensor:
    """(E, F) laid out by receiver, (N, K, F), zero where there is no neighbour."""
    return x.new_zeros(n_atoms * width, x.shape[1]).index_copy(0, slot, x).view(n_atoms, width, -1)


def neighbours(radial: Tensor, harmonics: list[Tensor], slot: Tensor) -> list[Tensor]:
    """Σ_j R_l(r_ij) x_j Y_lm for each l: (N, 2l+1, C).  Args: radial: (E, 3, C), the product of R and x.  harmonics: (N, 2l+1, K) each."""
    n_atoms, _, width = harmonics[0].shape
    parts = padded(radial.flatten(1), slot, n_atoms, width).split(radial.shape[2], dim=2)
    return [torch.bmm(y, x) for y, x in zip(harmonics, parts, strict=True)]


def by_element(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Each atom's features times the matrix of its element.  Args: x: (N, ..., C), atoms in the order of the elements.  weight: (C, Z, C)."""
    return torch.cat([part @ w for part, w in zip(x.split(counts), weight.unbind(1), strict=True)])
