r"""What holds of every network at the two ends of a distance: far apart it adds nothing, close up it does not guess.

* :class:`Presence`: how much of a network's energy an atom has. 1 beside a bonded neighbour, 0 with none within the cutoff, so an
  atom alone has exactly its isolated energy, whatever biases the network has learned, and so has every function.
* :class:`ClosestApproach`: what distance a network is told. Below nine tenths of the shortest one in training it falls behind
  the true one and comes to rest at three quarters: from there on nothing of the network changes with the distance, and the
  repulsion below it is what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ase.data import covalent_radii
from torch import Tensor, nn

from forcedrop.potential.radial import smooth_step

REACH = 2.5
"""Sums of covalent radii at which a neighbour no longer counts as bonded."""
BONDED = 0.999
"""How much one bonded neighbour makes an atom present: a little less than 1 keeps every derivative finite."""
TRUSTED, RESTING = 0.9, 0.75
"""Shares of the shortest distance in training: below the first a network is told more than the true distance, never less than
the second."""

UNMET = 1.3
"""Sums of covalent radii that stand for the shortest distance of two elements that never met in training."""


def filled(shortest: Tensor, elements: Sequence[int]) -> Tensor:
    """Return shortest distances of pairs of elements (n, n) [Å] with :data:`UNMET` covalent sums where there is none (0)."""
    radii = torch.tensor([float(covalent_radii[z]) for z in elements]).to(shortest)
    return torch.where(shortest == 0, UNMET * (radii[:, None] + radii), shortest)


class Presence(nn.Module):
    r"""How much of a network's energy an atom has, :math:`1 - \prod_j (1 - 0.999\,s(r_{ij}))`.

    s is 1 up to the sum of the covalent radii and falls to 0 at 2.5 times that or at the cutoff (then from two fifths of it).
    """

    radii: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        radii = torch.tensor([float(covalent_radii[z]) for z in elements])
        self.register_buffer("radii", radii, persistent=False)

    def forward(self, r: Tensor, species: Tensor, nbr: Tensor, cutoff: float) -> Tensor:
        """Return it for every atom, shape (N,), from distances (N, M) [Å]; beyond the cutoff where a slot is empty."""
        reach = (REACH * (self.radii[species][:, None] + self.radii[species][nbr])).clamp(max=cutoff)
        start = 1 / REACH
        bonded = 1 - smooth_step((r / reach - start) / (1 - start))
        return 1 - (1 - BONDED * bonded).prod(1)


class ClosestApproach(nn.Module):
    """What distance a network is told, from the shortest ones in training.

    Args:
        n_species: number of elements.
    """

    shortest: Tensor

    def __init__(self, n_species: int) -> None:
        super().__init__()
        self.register_buffer("shortest", torch.zeros(n_species, n_species))
        self.known = False

    def set(self, shortest: Tensor) -> None:
        """Set the shortest distances of pairs of elements [Å], shape (n_species, n_species); 0 where there is none."""
        self.shortest = shortest.to(self.shortest)
        self.known = bool(shortest.any())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.known = bool(self.shortest.any())

    def near(self, r: Tensor, species: Tensor, nbr: Tensor) -> bool:
        """Say whether any distance (N, M) [Å] is one of which a network is told another."""
        return self.known and bool((r < TRUSTED * self.shortest[species[:, None], species[nbr]]).any())

    def forward(self, r: Tensor, species: Tensor, nbr: Tensor) -> Tensor:
        """Return the distances that a network is told, (N, M) [Å], from the true ones."""
        unit = self.shortest[species[:, None], species[nbr]]
        width = 2 * (TRUSTED - RESTING) * unit
        x = ((TRUSTED * unit - r) / width.clamp(min=1e-6)).clamp(0, 1)
        # the integral of 1 − smooth_step from 0 to x: slope 1 at 0, at rest at 1
        behind = width * (x - x**4 * (2.5 + x * (x - 3)))
        return torch.where(r < TRUSTED * unit, TRUSTED * unit - behind, r)


def with_slopes(function: Callable[[Tensor], Tensor], r: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function of distances (N, M) and the derivative of the sum of its values by each distance, (N, M)."""
    with torch.enable_grad():
        leaf = r.detach().requires_grad_(True)
        values = function(leaf)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes
