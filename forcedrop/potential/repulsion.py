r"""Short-range energies of pairs, below the network: not trained with it, and shared by all functions.

At distances that no training structure has, a network says anything; a wall that is always there keeps atoms apart. What it
takes off the labels is also what is hardest to learn, a steep function of one distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ase.data import chemical_symbols, covalent_radii
from ase.units import Bohr, Hartree
from torch import Tensor, nn

from forcedrop.potential.radial import polynomial_cutoff, smooth_step


class Repulsion(nn.Module):
    """A pair energy that is shared equally by the two atoms; base of the kinds below."""

    def pair(self, r: Tensor, own: Tensor, other: Tensor, cutoff: float) -> Tensor:
        """Return the energy of pairs [eV] at distances ``r`` [Å] of elements with the places ``own`` and ``other``."""
        raise NotImplementedError

    def forward(self, r: Tensor, species: Tensor, nbr: Tensor, cutoff: float) -> Tensor:
        """Return each atom's half of its pair energies [eV], shape (N,), from distances (N, M) [Å]."""
        return 0.5 * self.pair(r, species[:, None], species[nbr], cutoff).sum(1)


class TightBindingRepulsion(Repulsion):
    r"""The repulsion of GFN2-xTB and, as in Morse's potential, a share of its square root; faded out from half the cutoff on.

    :math:`E = R + c_{ab} \sqrt{R}` with :math:`R = \frac{Z_a Z_b}{r} \exp(-\sqrt{\alpha_a \alpha_b}\, r^k)` in atomic units,
    k = 3/2, but 1 where both atoms are H or He. Source of R and its parameters: Bannwarth, Ehlert & Grimme, J. Chem. Theory
    Comput. 15, 1652 (2019), H to Rn. That the attraction of a bond falls half as steeply as the repulsion: Morse, Phys. Rev. 34,
    57 (1929). The coefficients c of pairs of elements, one each, are found by least squares on the training labels
    (``training/pairs.py``): at the distances of bonds the two nearly cancel, so the network has less to learn than without them,
    and far from these distances the sum is what a bond does: it lets go, or pushes. Where pairs explain next to nothing of the
    labels, or ``bonds`` of the shape is false, R acts only closer than any training structure (``only_inside``).

    Raises:
        ValueError: for an element beyond Rn.
    """

    charge: Tensor
    alpha: Tensor
    light: Tensor
    bond: Tensor
    start: Tensor
    taken: Tensor

    def __init__(self, elements: Sequence[int]) -> None:
        super().__init__()
        if beyond := [chemical_symbols[z] for z in elements if z > len(CHARGE)]:
            raise ValueError(f"GFN2-xTB has no repulsion of {', '.join(beyond)}: set `model.repulsion: false`")
        for name, values in (("charge", CHARGE), ("alpha", ALPHA)):
            self.register_buffer(name, torch.tensor([values[z - 1] for z in elements]), persistent=False)
        self.register_buffer("light", torch.tensor([z <= 2 for z in elements]), persistent=False)
        self.register_buffer("bond", torch.zeros(len(elements), len(elements)))
        self.register_buffer("start", torch.zeros(len(elements), len(elements)))
        self.register_buffer("taken", torch.zeros(3, len(elements), len(elements)))

    def only_inside(self, start: Tensor, cutoff: float) -> None:
        """Let R act below a distance of each pair of elements alone, (n, n) [Å], and there without its quadratic part.

        What begins so has no effect, no slope and no curvature at the start, and is a wall all the same.
        """
        places = torch.arange(len(start), device=start.device)
        with torch.enable_grad():
            r = start.detach().double().clone().requires_grad_(True)
            value = self.double().parts(r, places[:, None], places, cutoff)[0]
            (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), r)
        found = torch.stack([value, slope, 0.5 * bend]).detach()
        self.to(start.dtype)
        self.start, self.taken, self.bond = start.clone(), found.to(start), torch.zeros_like(start)

    def parts(self, r: Tensor, own: Tensor, other: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
        """Return R [eV] and its root [√eV], both faded out, at distances ``r`` [Å]; arguments as of ``pair``."""
        x = r / Bohr
        power = torch.where(self.light[own] & self.light[other], x, x * x.sqrt())
        strength = (self.alpha[own] * self.alpha[other]).sqrt()
        root = (Hartree * self.charge[own] * self.charge[other] / x).sqrt() * torch.exp(-0.5 * strength * power)
        there = 1 - smooth_step(2 * r / cutoff - 1)
        wall, start = root * root * there, self.start[own, other]
        beyond, (c0, c1, c2) = r - start, (c[own, other] for c in self.taken)
        inside = torch.where(beyond < 0, wall - (c0 + beyond * (c1 + beyond * c2)), torch.zeros_like(wall))
        return torch.where(start > 0, inside, wall), root * there

    def pair(self, r: Tensor, own: Tensor, other: Tensor, cutoff: float) -> Tensor:
        """Return the energy of pairs [eV]; see the base."""
        wall, root = self.parts(r, own, other, cutoff)
        return wall + self.bond[own, other] * root


class ZBLRepulsion(Repulsion):
    r"""The universal repulsion of Ziegler, Biersack & Littmark (1985), switched off at the sum of the covalent radii.

    :math:`E = \frac{e^2 Z_i Z_j}{r} \phi(r/a)\, u(r/r_c)`, a = 0.8854 a₀ / (Z_i^0.23 + Z_j^0.23), r_c = covalent radius of i
    + that of j, u the polynomial cutoff.
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

    def pair(self, r: Tensor, own: Tensor, other: Tensor, cutoff: float) -> Tensor:
        """Return the energy of pairs [eV]; see the base."""
        z_i, z_j = self.charges[own], self.charges[other]
        reach = (self.radii[own] + self.radii[other]).clamp(max=cutoff)
        length = 0.8854 * Bohr / (z_i**0.23 + z_j**0.23)
        screening = (self.coefficients * torch.exp(-self.exponents * (r / length)[..., None])).sum(-1)
        return Hartree * Bohr * z_i * z_j / r * screening * polynomial_cutoff(r / reach)


# fmt: off
CHARGE = (
    1.105388, 1.094283, 1.289367, 4.221216, 7.192431, 4.231078, 5.242592, 5.784415, 7.021486, 11.041068,
    5.244917, 18.083164, 17.867328, 40.001111, 19.683502, 14.99509, 17.353134, 7.266606, 10.439482, 14.786701,
    8.004267, 12.036336, 15.677873, 19.517914, 18.760605, 20.360089, 27.127744, 10.533269, 9.913846, 22.099503,
    31.14675, 42.100144, 39.147587, 27.426779, 32.845361, 17.363803, 44.338211, 34.365525, 17.326237,
    24.263093, 30.562732, 48.312796, 44.779882, 28.070247, 38.035941, 28.6747, 6.493286, 26.226628, 63.85424,
    80.053438, 77.05756, 48.614745, 63.319176, 51.188398, 67.249039, 46.984607, 50.927529, 48.676714,
    47.669448, 46.662183, 45.654917, 44.647651, 43.640385, 42.63312, 41.625854, 40.618588, 39.611322,
    38.604057, 37.596791, 36.589525, 35.582259, 40.186772, 54.666156, 55.899801, 80.410086, 62.809871,
    56.045639, 53.881425, 14.711475, 51.577544, 58.801614, 102.368258, 132.896832, 52.301232, 81.771063,
    128.13358,
)
"""Effective nuclear charges of H to Rn in GFN2-xTB (source above)."""

ALPHA = (
    2.213717, 3.60467, 0.475307, 0.939696, 1.373856, 1.247655, 1.682689, 2.165712, 2.421394, 3.318479,
    0.572728, 0.917975, 0.876623, 1.187323, 1.143343, 1.214553, 1.577144, 0.896198, 0.482206, 0.683051,
    0.574299, 0.723104, 0.928532, 0.966993, 1.0711, 1.113422, 1.241717, 1.077516, 0.998768, 1.160262, 1.122923,
    1.222349, 1.249372, 1.230284, 1.296174, 0.908074, 0.574054, 0.697345, 0.706172, 0.681106, 0.865552,
    1.034519, 1.019565, 1.031669, 1.094599, 1.092745, 0.678344, 0.936236, 1.024007, 1.139959, 1.122937,
    1.000712, 1.017946, 1.012036, 0.585257, 0.716259, 0.737643, 0.72995, 0.734624, 0.739299, 0.743973,
    0.748648, 0.753322, 0.757996, 0.762671, 0.767345, 0.77202, 0.776694, 0.781368, 0.786043, 0.790717,
    0.852852, 0.990234, 1.018805, 1.170412, 1.221937, 1.197148, 1.204081, 0.91921, 1.13736, 1.399312, 1.179922,
    1.13086, 0.957939, 0.963878, 0.965577,
)
"""Exponents of H to Rn in GFN2-xTB (source above)."""
# fmt: on
