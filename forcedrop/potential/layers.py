r"""The pieces of the network: linear maps, stored norms, messages, and products on the sphere.

Layouts: per-atom scalars (N, C); tensors (S, N, C) with S = (l_max+1)² components first, so that every map over channels and
every sum over components is one large matrix product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.potential.neighbours import gather_neighbours
from forcedrop.potential.sphere import degree_index, quadrature, spherical_harmonics


class Linear(nn.Module):
    """A linear map of the last axis without bias; weights start with variance ``gain``²/fan-in."""

    def __init__(self, n_in: int, n_out: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * (gain / math.sqrt(n_in)))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        return x @ self.weight


class TensorLinear(nn.Module):
    """One linear map over channels per l, shape (S, N, C_in) → (S, N, C_out); no mixing of components: equivariant."""

    def __init__(self, n_in: list[int], n_out: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(Linear(n, n_out) for n in n_in)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Map ``parts[l]`` of shape (2l+1, N, C_in[l]) and join them."""
        return torch.cat([linear(part) for linear, part in zip(self.maps, parts, strict=True)])


class SphereNorm(nn.Module):
    """Division of each l by a root mean square that was measured once on data and stored; a plain scaling ever after."""

    rms: Tensor
    index: Tensor

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.register_buffer("rms", torch.ones(l_max + 1))
        self.register_buffer("index", degree_index(l_max), persistent=False)
        self.measuring = False

    def forward(self, x: Tensor) -> Tensor:
        """Scale a tensor (S, N, C)."""
        if self.measuring:
            square = torch.zeros_like(self.rms).index_add(0, self.index, x.square().mean(dim=(1, 2)))
            mean = square / torch.bincount(self.index)
            self.rms.copy_(torch.where(mean > 1e-24, mean.sqrt(), torch.ones_like(mean)))
        return x / self.rms[self.index][:, None, None]


class PairGeometry(NamedTuple):
    """All that the network knows of the geometry, shared by all samples and layers.

    Attributes:
        sphere: Y_lm of the directions, shape (N, S, M).
        radial: radial functions of the distances, shape (N, M, n).
    """

    sphere: Tensor
    radial: Tensor


class PairFunctions(nn.Module):
    """Radial functions and spherical harmonics of every pair."""

    def __init__(self, radial: nn.Module, l_max: int) -> None:
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


class SphereProducts(nn.Module):
    r"""Pointwise products of two and three fields on the sphere, integrated against :math:`Y_{lm}`, l ≤ ``l_out``.

    The fields are :math:`f_a(\hat s) = \sum_{lm} F_{a,lm} Y_{lm}(\hat s)`; the result is
    :math:`\langle f_1 f_2\, Y_{lm}\rangle` and :math:`\langle f_1 f_2 f_3\, Y_{lm}\rangle`, exactly, by a Lebedev rule of
    degree 3·l_max + l_out: the Gaunt tensor product (Luo, Chen & Krishnapriyan, ICLR 2024, arXiv 2401.10216) in real space.
    """

    to_grid: Tensor
    from_grid: Tensor

    def __init__(self, l_max: int, l_out: int) -> None:
        super().__init__()
        points, weights = quadrature(3 * l_max + l_out)
        basis = spherical_harmonics(points, max(l_max, l_out))
        project = (basis[:, : (l_out + 1) ** 2] * weights[:, None]).T.contiguous()
        self._exact = {"to_grid": basis[:, : (l_max + 1) ** 2].contiguous(), "from_grid": project}
        for name, matrix in self._exact.items():
            self.register_buffer(name, matrix.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> SphereProducts:
        """Move or cast; after a cast to float64 the rule is exact again, not float32's rounding of it."""
        super()._apply(fn, recurse)
        for name, matrix in self._exact.items():
            setattr(self, name, matrix.to(getattr(self, name)))
        return self

    def forward(self, one: Tensor, two: Tensor, three: Tensor) -> tuple[Tensor, Tensor]:
        """Return products of the first two and of all three fields, each (S_out, N, C), from fields (S, N, C)."""
        shape = (-1, *one.shape[1:])
        one, two, three = (self.to_grid @ field.reshape(field.shape[0], -1) for field in (one, two, three))
        pair = one * two
        return (self.from_grid @ pair).reshape(shape), (self.from_grid @ (pair * three)).reshape(shape)


class SpeciesWeights(nn.Module):
    """Elementwise weights that depend on the chemical element of the atom, all 1 at the start."""

    def __init__(self, n_species: int, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_species, n_channels))

    def forward(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """Weight ``x`` (…, N, C) by the element of each atom, ``one_hot`` (N, n_species)."""
        return x * (one_hot @ self.weight)


class CentredMask(nn.Module):
    """A mask m on what an atom has beyond the typical value c of its element: x → x + (m − 1)(x − c).

    The mean over masks is x. About 0 instead of c, a dropped channel would shift the energies of all atoms of an element alike,
    and with them the energy of a large system by far more than the potential is uncertain. c is the mean over the atoms of an
    element in training data, measured from time to time while weights change, a constant ever after.
    """

    centre: Tensor

    def __init__(self, n_species: int, n_channels: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(n_species, n_channels))
        self.measuring = False

    def forward(self, x: Tensor, one_hot: Tensor, mask: Tensor | None) -> Tensor:
        """Mask ``x`` (N, C) with (C,) or (N, C); None changes nothing."""
        if self.measuring:
            count = one_hot.sum(0)[:, None]
            self.centre.copy_(torch.where(count > 0, one_hot.T @ x / count.clamp(min=1), self.centre))
        return x if mask is None else x + (mask - 1) * (x - one_hot @ self.centre)


class Update(nn.Module):
    """From three fields per channel to the branch that is added to an atom's features."""

    def __init__(self, n_species: int, n_channels: int, l_max: int, l_out: int) -> None:
        super().__init__()
        self.l_out = l_out
        self.products = SphereProducts(l_max, l_out)
        self.norms = nn.ModuleList(SphereNorm(l_out) for _ in range(3))
        self.species = SpeciesWeights(n_species, 3 * n_channels)
        self.mix = TensorLinear([3 * n_channels] * (l_out + 1), n_channels)

    def forward(self, fields: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Return the branch, shape ((l_out+1)², N, C), and the invariants it is made of, (N, 3C), from fields (S, N, 3C)."""
        one, two, three = fields.unflatten(2, (3, -1)).unbind(2)
        second, third = self.products(one, two, three)
        first = one[: (self.l_out + 1) ** 2]
        terms = [norm(x) for norm, x in zip(self.norms, (first, second, third), strict=True)]
        every = self.species(torch.cat(terms, dim=-1), one_hot)
        return self.mix(by_degree(every)), every[0]


class Message(nn.Module):
    r"""Features of the neighbours, carried to the centre by R(r) Y_lm(r̂).

    What neighbour j sends are tensors :math:`x^{l'}_{m'}`, l' ≤ L. Along the pair each is a number,
    :math:`a^{l'} = \sum_{m'} x^{l'}_{m'} Y_{l'm'}(\hat r_{ij}) / \sqrt{2l'+1}`, and
    :math:`A_{lm} = \sum_j Y_{lm}(\hat r_{ij}) \sum_{l'} R_{l'l}(r_{ij})\, a^{l'}_j`, for 1 ≤ l ≤ L also
    :math:`\sum_j R'_l(r_{ij})\, x^l_{m,j}`; every channel has radial functions of its own, R = Σ_n W_n B_n.
    """

    index: Tensor

    def __init__(self, n_channels: int, n_radial: int, l_max: int, l_in: int) -> None:
        super().__init__()
        self.l_max, self.l_in = l_max, l_in
        self.send = TensorLinear([n_channels] * (l_in + 1), n_channels)
        self.radial = nn.Parameter(
            torch.randn(n_radial, (l_in + 1) * (l_max + 1) * n_channels) / math.sqrt((l_in + 1) * n_radial)
        )
        self.radial_plain = nn.Parameter(torch.randn(n_radial, l_in * n_channels) / math.sqrt(n_radial))
        self.norm = SphereNorm(l_max)
        self.register_buffer("index", degree_index(l_in), persistent=False)

    def forward(self, x: Tensor, pairs: PairGeometry, nbr: Tensor, reverse: Tensor, mask: Tensor | None) -> Tensor:
        """Return A, shape (S, N, C), from features ((L+1)², N, C) and the geometry of the pairs.

        ``mask`` (…, (L+1)C), if given, multiplies what is sent: a channel of one l each.
        """
        c = x.shape[-1]
        x = self.send(by_degree(x))
        if mask is not None:
            x = x * spread_mask(mask, self.index, c)
        return self.carry(x.transpose(0, 1), pairs, nbr, reverse)

    def carry(self, sent: Tensor, pairs: PairGeometry, nbr: Tensor, reverse: Tensor) -> Tensor:
        """Return A, shape (S, N, C), from what every atom sends, (all atoms, (L+1)², C), and the geometry of N atoms' pairs."""
        c = sent.shape[-1]
        moved = gather_neighbours(sent.flatten(1), nbr, reverse)
        along = self.along(moved.unflatten(2, (-1, c)), pairs.sphere)
        radial = (pairs.radial @ self.radial).unflatten(2, (self.l_in + 1, self.l_max + 1, c))
        carried = (along[:, :, :, None] * radial).sum(2).unbind(2)
        a = [y @ f for y, f in zip(by_degree(pairs.sphere, dim=1), carried, strict=True)]
        plain = (pairs.radial.transpose(1, 2) @ moved[..., c:]).unflatten(2, (-1, c))
        sizes = [2 * l + 1 for l in range(1, self.l_in + 1)]  # noqa: E741
        for l, tensor in enumerate((plain * self.plain_weights).sum(1).split(sizes, dim=1), start=1):  # noqa: E741
            a[l] = a[l] + tensor
        return self.norm(torch.cat(a, dim=1).transpose(0, 1))

    @property
    def plain_weights(self) -> Tensor:
        """Weights of the radial functions R'_l for each component with l ≥ 1, shape (n, (L+1)² − 1, C)."""
        n_channels = self.radial.shape[1] // ((self.l_in + 1) * (self.l_max + 1))
        return self.radial_plain.unflatten(1, (self.l_in, n_channels))[:, self.index[1:] - 1]

    def along(self, moved: Tensor, sphere: Tensor) -> Tensor:
        """Return each l's component along the pair, (N, M, L+1, C), from the neighbours' (N, M, (L+1)², C) and Y (N, S, M)."""
        direction = sphere[:, : len(self.index)] * (2 * self.index + 1).to(sphere.dtype).rsqrt()[:, None]
        parts = by_degree(moved * direction.transpose(1, 2)[..., None], dim=2)
        return torch.stack([part.sum(2) for part in parts], dim=2)


def spread_mask(mask: Tensor, index: Tensor, n_channels: int) -> Tensor:
    """Return a mask (…, (L+1)C) of one bit per channel and l for all components, shape ((L+1)², 1 or N, C)."""
    by_l = mask.unflatten(-1, (-1, n_channels)).movedim(-2, 0)
    return (by_l if mask.dim() > 1 else by_l[:, None])[index]


def by_degree(x: Tensor, dim: int = 0) -> list[Tensor]:
    """Split the S components along ``dim`` into one tensor of 2l+1 components for each l."""
    return list(x.split([2 * l + 1 for l in range(math.isqrt(x.shape[dim]))], dim))  # noqa: E741
