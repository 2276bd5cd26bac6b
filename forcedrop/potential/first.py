"""The first layer: it knows its neighbours by element and distance alone, so its weights act once per atom."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forcedrop.potential.blocks import blocks_of
from forcedrop.potential.contract import GraphInputs
from forcedrop.potential.linear import SphereNorm, TensorLinear, by_degree
from forcedrop.potential.pairs import PairGeometry, PairSlopes, spread_elements
from forcedrop.potential.products import Tape, Update


class FirstLayer(nn.Module):
    """Fields on the sphere from Σ_j B_n(r) Y_lm(r̂) over the neighbours of each element, and their products.

    Args:
        n_species: number of elements.
        n_channels: C.
        n_radial: radial functions.
        l_max: of the fields.
        l_out: of what comes out.
    """

    def __init__(self, n_species: int, n_channels: int, n_radial: int, l_max: int, l_out: int) -> None:
        super().__init__()
        self.norm = SphereNorm(l_max)
        self.fields = TensorLinear([n_radial * n_species] * (l_max + 1), 3 * n_channels)
        self.update = Update(n_species, n_channels, l_max, l_out)

    def forward(self, pairs: PairGeometry, one_hot: Tensor, graph: GraphInputs) -> tuple[Tensor, Tensor, Tape]:
        """Return the features ((l_out+1)², N, C), the invariant products (N, 3C) and what the way back needs."""
        by_element = spread_elements(pairs.radial, one_hot, graph.nbr)
        sums = self.norm((pairs.sphere @ by_element).transpose(0, 1))
        branch, products, tape = self.update(self.fields(by_degree(sums)), one_hot)
        return branch, products, tape

    def back(
        self,
        tape: Tape,
        slopes: PairSlopes,
        one_hot: Tensor,
        graph: GraphInputs,
        by_features: Tensor,
        by_products: Tensor,
        gradient: Tensor,
    ) -> None:
        """Add the gradient by the pair vectors to ``gradient``, (K, N, M, 3).

        Args:
            tape: of the way there.
            slopes: geometry and derivatives.
            one_hot: elements.
            graph: neighbours.
            by_features: the gradient by what came out, (S_out, N, K, C).
            by_products: that by the products themselves, (N, K, 3C).
            gradient: in place.
        """
        n, k, c = by_features.shape[1:]
        each = c * (5 * graph.nbr.shape[1] + 3 * len(tape.grid))
        for b in blocks_of(n, k * each * by_features.element_size(), by_features.device):
            by_fields = self.update.back(tape.of(b), by_features[:, b], by_products[b], one_hot[b])
            by_sums = self.norm.back(self.fields.back(by_fields))  # (n, S, K, elements × functions)
            gradient[:, b] += self._pairs_back(by_sums, slopes.of(b), one_hot, graph.nbr[b])

    @staticmethod
    def _pairs_back(by_sums: Tensor, slopes: PairSlopes, one_hot: Tensor, nbr: Tensor) -> Tensor:
        n, s, k = by_sums.shape[:3]
        both = torch.cat([spread_elements(f, one_hot, nbr) for f in (slopes.radial, slopes.slope)], dim=1)
        by_sphere, steep = (by_sums.flatten(1, 2) @ both.transpose(1, 2)).view(n, s, k, 2, -1).unbind(3)
        return slopes.to_vectors(by_sphere, (steep * slopes.sphere[:, :, None]).sum(1))
