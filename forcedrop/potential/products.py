r"""Products on the sphere: from three fields per channel to invariants and to what a layer adds; and the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.potential.linear import SpeciesWeights, SphereNorm, TensorLinear, by_degree
from forcedrop.potential.sphere import quadrature, spherical_harmonics


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

    def on_grid(self, fields: Tensor) -> Tensor:
        """Return the values of fields (S, N, …) at the points of the rule, (G, N, …)."""
        return (self.to_grid @ fields.flatten(1)).unflatten(1, fields.shape[1:])

    def project(self, values: Tensor) -> Tensor:
        """Integrate values (G, N, …) against the harmonics, (S_out, N, …)."""
        return (self.from_grid @ values.flatten(1)).unflatten(1, values.shape[1:])

    def forward(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return products of the first two and of all three fields, each (S_out, N, C), from values (G, N, 3, C)."""
        one, two, three = grid.unbind(2)
        pair = one * two
        return self.project(pair), self.project(pair * three)


class Tape(NamedTuple):
    """What an update leaves for the way back.

    Attributes:
        fields: shape (S, N, 3, C).
        grid: the fields on the grid, shape (G, N, 3, C).
    """

    fields: Tensor
    grid: Tensor

    def of(self, block: slice) -> Tape:
        """Return that of a block of atoms."""
        return Tape(self.fields[:, block], self.grid[:, block])


class Update(nn.Module):
    """From three fields per channel to the branch that is added to an atom's features."""

    def __init__(self, n_species: int, n_channels: int, l_max: int, l_out: int) -> None:
        super().__init__()
        self.l_out = l_out
        self.products = SphereProducts(l_max, l_out)
        self.norms = nn.ModuleList(SphereNorm(l_out) for _ in range(3))
        self.species = SpeciesWeights(n_species, 3 * n_channels)
        self.mix = TensorLinear([3 * n_channels] * (l_out + 1), n_channels)

    def forward(self, fields: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor, Tape]:
        """Return the branch, ((l_out+1)², N, C), the invariants it is made of, (N, 3C), and the tape, from fields (S, N, 3C)."""
        fields = fields.unflatten(2, (3, -1))
        grid = self.products.on_grid(fields)
        second, third = self.products(grid)
        first = fields[: (self.l_out + 1) ** 2, :, 0]
        terms = [norm(x) for norm, x in zip(self.norms, (first, second, third), strict=True)]
        every = self.species(torch.cat(terms, dim=-1), one_hot)
        return self.mix(by_degree(every)), every[0], Tape(fields, grid)

    def back(self, tape: Tape, gradient: Tensor, weights: Tensor, one_hot: Tensor) -> Tensor:
        """Return the gradient by the fields, (S, N, K, 3C).

        Args:
            tape: of the way there.
            gradient: by the branch, (S_out, N, K, C).
            weights: that by the invariants themselves, (N, K, 3C).
            one_hot: elements, (N, n_species).
        """
        by_every = self.mix.back(gradient)
        by_every[0] = by_every[0] + weights
        own = one_hot @ self.species.weight
        norms: Any = self.norms
        c = gradient.shape[-1]
        terms = []
        for l, part in enumerate(by_every):  # noqa: E741
            scale = torch.cat([(1 / norm.rms[l]).expand(c) for norm in norms])
            terms.append((part * (own * scale)[:, None]).unflatten(-1, (3, c)))
        joined = torch.cat(terms)  # (S_out, N, K, 3, C)
        return (self._scalars_back if self.l_out == 0 else self._tensors_back)(tape, joined).flatten(3)

    def _scalars_back(self, tape: Tape, joined: Tensor) -> Tensor:
        """Of scalars the way back is one number per channel times what is common to all functions."""
        products, grid, fields = self.products, tape.grid, tape.fields
        first, second, third = joined.unbind(3)
        pairs = ((1, 2), (0, 2), (0, 1))
        on_grid = torch.stack([grid[:, :, a] * grid[:, :, b] for a, b in pairs], dim=2)
        on_grid = products.from_grid[0][:, None, None, None] * on_grid
        common = (products.to_grid.T @ on_grid.flatten(1)).unflatten(1, on_grid.shape[1:])  # (S, N, 3, C)
        result = common[:, :, None] * third[0][:, :, None]
        result[..., 0, :].addcmul_(fields[:, :, None, 1], second[0])
        result[..., 1, :].addcmul_(fields[:, :, None, 0], second[0])
        result[0, ..., 0, :] += first[0]
        return result

    def _tensors_back(self, tape: Tape, joined: Tensor) -> Tensor:
        products = self.products
        first = joined[..., 0, :]
        one, two, three = tape.grid[:, :, None].unbind(3)
        on_grid = (products.from_grid.T @ joined[..., 1:, :].flatten(1)).unflatten(1, joined[..., 1:, :].shape[1:])
        by_pair, by_triple = on_grid.unbind(3)
        by_pair = by_pair + by_triple * three
        by_grid = torch.stack([by_pair * two, by_pair * one, by_triple * (one * two)], dim=3)
        result = (products.to_grid.T @ by_grid.flatten(1)).unflatten(1, by_grid.shape[1:])
        result[: len(first), ..., 0, :] += first
        return result
