r"""The pieces of the network: linear maps, stored norms, messages, and products on the sphere.

Layouts: per-atom scalars (N, C); tensors (S, N, C) with S = (l_max+1)² components first, so that every map over channels and
every sum over components is one large matrix product.
"""

from __future__ import annotations

import math
from typing import Any

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


class PairTensors(nn.Module):
    r"""B_n(r)·Y_lm(r̂) of every pair: the only thing the network knows of the geometry, shared by all samples and layers."""

    def __init__(self, radial: nn.Module, l_max: int) -> None:
        super().__init__()
        self.radial = radial
        self.l_max = l_max

    def forward(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensors (N, n·S, M), radial function outermost, and the directions (N, M, 3), from vectors [Å].

        The directions have their components in the order of Y_1m, which is y, z, x; so do all vector features.
        """
        r = vec.square().sum(-1).sqrt()
        unit = vec / r[..., None]
        radial = self.radial(r)
        sphere = spherical_harmonics(unit, self.l_max)
        pairs = radial[..., :, None] * sphere[..., None, :]
        return pairs.flatten(2).transpose(1, 2), unit[..., [1, 2, 0]]


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

    def forward(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Return products of two and of three fields, each (S_out, N, C), from three fields (S, N, 3C)."""
        s, n, c3 = fields.shape
        grid = (self.to_grid @ fields.reshape(s, n * c3)).reshape(-1, n, c3)
        one, two, three = grid.chunk(3, dim=-1)
        pair = one * two
        both = torch.cat([pair, pair * three], dim=-1)
        out = (self.from_grid @ both.flatten(1)).reshape(self.from_grid.shape[0], n, -1)
        second, third = out.chunk(2, dim=-1)
        return second, third


class SpeciesWeights(nn.Module):
    """Elementwise weights that depend on the chemical element of the atom, all 1 at the start."""

    def __init__(self, n_species: int, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_species, n_channels))

    def forward(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """Weight ``x`` (…, N, C) by the element of each atom, ``one_hot`` (N, n_species)."""
        return x * (one_hot @ self.weight)


class Update(nn.Module):
    """From three fields per channel to the branch that is added to an atom's scalars and vectors."""

    def __init__(self, n_species: int, n_channels: int, l_max: int, vectors: bool) -> None:
        super().__init__()
        self.l_out = 1 if vectors else 0
        self.products = SphereProducts(l_max, self.l_out)
        self.norms = nn.ModuleList(SphereNorm(self.l_out) for _ in range(3))
        self.species = SpeciesWeights(n_species, 3 * n_channels)
        self.mix = TensorLinear([3 * n_channels] * (self.l_out + 1), n_channels)

    def forward(self, fields: Tensor, one_hot: Tensor) -> Tensor:
        """Return the branch, shape (1 or 4, N, C): scalars, and with ``vectors`` also vectors, from fields (S, N, 3C)."""
        second, third = self.products(fields)
        first = fields[: (self.l_out + 1) ** 2].chunk(3, dim=-1)[0]
        terms = [norm(x) for norm, x in zip(self.norms, (first, second, third), strict=True)]
        joined = self.species(torch.cat(terms, dim=-1), one_hot)
        return self.mix([joined[l * l : (l + 1) ** 2] for l in range(self.l_out + 1)])  # noqa: E741


class Message(nn.Module):
    r"""Scalars and vectors of the neighbours, carried to the centre by B_n(r) Y_lm(r̂).

    :math:`A_{lm} = \sum_j \sum_n B_n(r_{ij}) Y_{lm}(\hat r_{ij}) (W_{nl} s_j + W'_{nl}\, v_j·\hat r_{ij})`, and for l = 1 also
    :math:`\sum_j \sum_n B_n W''_n v_j`. Because B_n enters linearly, the weights act once per atom, not once per pair.
    """

    index: Tensor

    def __init__(self, n_channels: int, n_radial: int, l_max: int) -> None:
        super().__init__()
        self.n_radial, self.l_max = n_radial, l_max
        self.scalars = Linear(n_channels, n_channels)
        self.vectors = Linear(n_channels, n_channels)
        self.radial = nn.Parameter(torch.randn(n_radial, l_max + 1, 2 * n_channels) / math.sqrt(2 * n_radial))
        self.radial_plain = nn.Parameter(torch.randn(n_radial, n_channels) / math.sqrt(n_radial))
        self.register_buffer("index", degree_index(l_max), persistent=False)
        self.norm = SphereNorm(l_max)

    def forward(
        self,
        h: Tensor,
        v: Tensor,
        pairs: Tensor,
        unit: Tensor,
        nbr: Tensor,
        reverse: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Return A, shape (S, N, C), from scalars (N, C), vectors (3, N, C) and the pairs (N, n·S, M).

        ``mask`` (…, 2C), if given, multiplies what is sent: a channel of scalars or of whole vectors each.
        """
        c = h.shape[1]
        s, v = self.scalars(h), self.vectors(v)
        if mask is not None:
            s, v = s * mask[..., :c], v * mask[..., c:]
        sent = gather_neighbours(torch.cat([s[None], v]).permute(1, 0, 2).flatten(1), nbr, reverse)
        sent = sent.unflatten(2, (4, c))
        along = (sent[:, :, 1:] * unit[..., None]).sum(2)
        carried = pairs @ torch.cat([sent[:, :, 0], along], dim=-1)
        carried = carried.unflatten(1, (self.n_radial, -1))
        a = (carried * self.radial[:, self.index]).sum(1)
        a = (a[..., :c] + a[..., c:]).transpose(0, 1)
        plain = pairs.unflatten(1, (self.n_radial, -1))[:, :, 0] @ sent[:, :, 1:].flatten(2)
        plain = (plain.unflatten(2, (3, c)) * self.radial_plain[:, None]).sum(1).transpose(0, 1)
        a = torch.cat([a[:1], a[1:4] + plain, a[4:]])
        return self.norm(a)
