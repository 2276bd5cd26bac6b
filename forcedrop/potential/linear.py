r"""Linear maps, stored norms and weights by element; each with its way back beside it.

Layouts: per-atom scalars (N, C); tensors (S, N, C) with S = (l_max+1)² components first, so that every map over channels and
every sum over components is one large matrix product. On the way back K functions share a pass: (S, N, K, C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from forcedrop.potential.sphere import degree_index


class Linear(nn.Module):
    """A linear map of the last axis without bias; weights start with variance ``gain``²/fan-in."""

    def __init__(self, n_in: int, n_out: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * (gain / math.sqrt(n_in)))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        return x @ self.weight

    def back(self, gradient: Tensor) -> Tensor:
        """Return the gradient by the input from that by the output."""
        return gradient @ self.weight.T


class TensorLinear(nn.Module):
    """One linear map over channels per l, shape (S, N, C_in) → (S, N, C_out); no mixing of components: equivariant."""

    def __init__(self, n_in: list[int], n_out: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(Linear(n, n_out) for n in n_in)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Map ``parts[l]`` of shape (2l+1, N, C_in[l]) and join them."""
        return torch.cat([linear(part) for linear, part in zip(self.maps, parts, strict=True)])

    def back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradients by the parts."""
        return [part @ m.weight.T for part, m in zip(by_degree(gradient), self.maps, strict=True)]  # type: ignore[operator]


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

    def back(self, parts: list[Tensor]) -> Tensor:
        """Return the gradient by the input with the atoms first, (N, S, K, C), from that by each l's, (2l+1, N, K, C)."""
        return torch.cat([part.transpose(0, 1) / norm for norm, part in zip(self.rms, parts, strict=True)], dim=1)


class SpeciesWeights(nn.Module):
    """Elementwise weights that depend on the chemical element of the atom, all 1 at the start."""

    def __init__(self, n_species: int, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_species, n_channels))

    def forward(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """Weight ``x`` (…, N, C) by the element of each atom, ``one_hot`` (N, n_species)."""
        return x * (one_hot @ self.weight)


def by_degree(x: Tensor, dim: int = 0) -> list[Tensor]:
    """Split the S components along ``dim`` into one tensor of 2l+1 components for each l."""
    return list(x.split([2 * l + 1 for l in range(math.isqrt(x.shape[dim]))], dim))  # noqa: E741
