"""Short-range screened nuclear repulsion, shared by all samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase.data import covalent_radii
from ase.units import Bohr, Hartree
from torch import Tensor, nn

from forcedrop.potential.radial import polynomial_cutoff


class ZBLRepulsion(nn.Module):
    r"""The universal repulsion of Ziegler, Biersack & Littmark (1985), switched off at the sum of the covalent radii.

    :math:`E = \tfrac12 \sum_{ij} \frac{e^2 Z_i Z_j}{r} \phi(r/a)\, u(r/r_c)`, a = 0.8854 a₀ / (Z_i^0.23 + Z_j^0.23),
    r_c = covalent radius of i + that of j, u the polynomial cutoff. No parameters.
    """

    charges: Tensor
    radii: Tensor
    coefficients: Tensor
    exponents: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("charges", torch.tensor(elements, dtype=dtype), persistent=False)
        radii = torch.tensor([covalent_radii[z] for z in elements], dtype=dtype)
        self.register_buffer("radii", radii, persistent=False)
        c = torch.tensor([0.18175, 0.50986, 0.28022, 0.02817], dtype=dtype)
        self.register_buffer("coefficients", c, persistent=False)
        d = torch.tensor([3.19980, 0.94229, 0.40290, 0.20162], dtype=dtype)
        self.register_buffer("exponents", d, persistent=False)

    def forward(self, vec: Tensor, species: Tensor, nbr: Tensor, cutoff: float) -> Tensor:
        """Return each atom's half of its pair energies [eV], shape (N,), from pair vectors (N, M, 3) [Å]."""
        r = vec.square().sum(-1).sqrt()
        z_i, z_j = self.charges[species][:, None], self.charges[species][nbr]
        reach = (self.radii[species][:, None] + self.radii[species][nbr]).clamp(max=cutoff)
        length = 0.8854 * Bohr / (z_i**0.23 + z_j**0.23)
        screening = (self.coefficients * torch.exp(-self.exponents * (r / length)[..., None])).sum(-1)
        pair = Hartree * Bohr * z_i * z_j / r * screening * polynomial_cutoff(r / reach)
        return 0.5 * pair.sum(1)

    def with_gradient(self, vec: Tensor, species: Tensor, nbr: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
        """Return the same and the gradient of its sum by the pair vectors [eV/Å], shape (N, M, 3)."""
        with torch.enable_grad():
            leaf = vec.detach().requires_grad_(True)
            energies = self(leaf, species, nbr, cutoff)
            (gradient,) = torch.autograd.grad(energies.sum(), leaf)
        return energies.detach(), gradient
