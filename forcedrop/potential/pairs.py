"""What the network knows of the geometry: radial functions and spherical harmonics of every pair, and their derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.potential.radial import BesselBasis
from forcedrop.potential.sphere import harmonics_and_gradients, spherical_harmonics


class PairGeometry(NamedTuple):
    """All that the network knows of the geometry, shared by all functions and layers.

    Attributes:
        sphere: Y_lm of the directions, shape (N, S, M).
        radial: radial functions of the distances, shape (N, M, n).
    """

    sphere: Tensor
    radial: Tensor


class PairSlopes(NamedTuple):
    """The same with derivatives, for the way back.

    Attributes:
        sphere: Y_lm, shape (N, S, M).
        sphere_grad: their derivatives by x, y, z of the pair vector [1/Å], shape (3, N, S, M).
        radial: B_n, shape (N, M, n).
        slope: dB_n/dr [1/Å], shape (N, M, n).
        unit: directions, shape (N, M, 3).
    """

    sphere: Tensor
    sphere_grad: Tensor
    radial: Tensor
    slope: Tensor
    unit: Tensor

    @property
    def pairs(self) -> PairGeometry:
        """The geometry alone."""
        return PairGeometry(self.sphere, self.radial)

    def of(self, block: slice) -> PairSlopes:
        """Return those of a block of atoms."""
        return PairSlopes(
            self.sphere[block], self.sphere_grad[:, block], self.radial[block], self.slope[block], self.unit[block]
        )

    def to_vectors(self, by_sphere: Tensor, by_distance: Tensor) -> Tensor:
        """Return the gradient by the pair vectors, (K, N, M, 3), from those by Y_lm, (N, S, K, M), and distance, (N, K, M)."""
        columns = [
            (by_sphere * self.sphere_grad[i][:, :, None]).sum(1) + by_distance * self.unit[:, None, :, i]
            for i in range(3)
        ]
        return torch.stack(columns, dim=-1).transpose(0, 1)


class PairFunctions(nn.Module):
    """Radial functions and spherical harmonics of every pair."""

    def __init__(self, radial: BesselBasis, l_max: int) -> None:
        super().__init__()
        self.radial = radial
        self.l_max = l_max

    def forward(self, vec: Tensor) -> PairGeometry:
        """Return the geometry of pairs with vectors (N, M, 3) [Å]."""
        r = vec.square().sum(-1).sqrt()
        unit = vec / r[..., None]
        return PairGeometry(
            sphere=spherical_harmonics(unit, self.l_max).transpose(1, 2).contiguous(),
            radial=self.radial(r),
        )

    def with_slopes(self, vec: Tensor) -> PairSlopes:
        """Return the same with derivatives."""
        r = vec.square().sum(-1).sqrt()
        unit = vec / r[..., None]
        sphere, gradient = harmonics_and_gradients(unit, r, self.l_max)
        radial, slope = self.radial.with_slope(r)
        return PairSlopes(
            sphere.transpose(1, 2).contiguous(), gradient.transpose(2, 3).contiguous(), radial, slope, unit
        )


def spread_elements(radial: Tensor, one_hot: Tensor, nbr: Tensor) -> Tensor:
    """Return radial functions (N, M, n) in the columns of the neighbour's element, 0 elsewhere, (N, M, n × elements)."""
    return (radial[..., :, None] * one_hot[nbr][..., None, :]).flatten(2)
