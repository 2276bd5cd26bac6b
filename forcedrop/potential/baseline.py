r"""The best pair potential, below the network: what is simplest of a data set is not left to the network to learn.

On top of the repulsion, :math:`\tfrac12 \sum_j \sum_n c_{ab,n} B_n(r_{ij})` with Bessel functions B and coefficients of every
pair of elements, found once by least squares on the training labels (``training/pairs.py``). It takes half to nine tenths off
the forces; the network learns what is left. All functions share it. Too close (``limits.ClosestApproach``) it rests, as the
network does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.potential.radial import BesselBasis

N_RADIAL, POWER = 6, 2
"""Bessel functions, and the power of their cutoff."""


class PairBaseline(nn.Module):
    """A pair energy that is linear in its coefficients; 0 until they are set.

    Args:
        n_species: number of elements.
        cutoff: [Å].
    """

    weight: Tensor

    def __init__(self, n_species: int, cutoff: float) -> None:
        super().__init__()
        self.radial = BesselBasis(N_RADIAL, cutoff, POWER)
        self.register_buffer("weight", torch.zeros(n_species, n_species, N_RADIAL))
        self.known = False

    def set(self, weight: Tensor) -> None:
        """Set the coefficients [eV·√Å·Å], shape (n_species, n_species, functions), symmetric."""
        self.weight = weight.to(self.weight)
        self.known = bool(weight.any())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.known = bool(self.weight.any())

    def forward(self, r: Tensor, species: Tensor, nbr: Tensor) -> Tensor:
        """Return each atom's half of its pair energies [eV], shape (N,), from distances (N, M) [Å]."""
        return 0.5 * (self.weight[species[:, None], species[nbr]] * self.radial(r)).sum((1, 2))
