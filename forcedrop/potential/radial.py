r"""Radial functions: Bessel functions times a smooth cutoff, entering the network linearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def polynomial_cutoff(x: Tensor, p: int = 6) -> Tensor:
    r"""Return the envelope u(x), x = r/r_cut: 1 at 0, and 0 with zero first and second derivatives at and beyond x = 1.

    Source: Gasteiger, Groß & Günnemann, ICLR 2020 (DimeNet), eq. 8.
    """
    u = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    return torch.where(x < 1, u, torch.zeros_like(u))


def polynomial_cutoff_slope(x: Tensor, p: int = 6) -> Tensor:
    """Return du/dx of :func:`polynomial_cutoff`: −p(p+1)(p+2)/2 · x^(p−1) (1−x)², 0 beyond the cutoff."""
    slope = -(p * (p + 1) * (p + 2) / 2) * x ** (p - 1) * (1 - x) ** 2
    return torch.where(x < 1, slope, torch.zeros_like(slope))


class BesselBasis(nn.Module):
    r"""Spherical Bessel functions of order 0 times the cutoff: √(2/r_cut)·sin(nπr/r_cut)/r · u(r/r_cut), n = 1 … n_radial.

    Source: Gasteiger et al. (DimeNet), eq. 7.

    Args:
        n_radial: number of functions.
        cutoff: r_cut [Å].
        power: p of the cutoff function; a lower one gives near neighbours more weight.
    """

    wave: Tensor

    def __init__(self, n_radial: int, cutoff: float, power: int = 6) -> None:
        super().__init__()
        self.cutoff, self.power = cutoff, power
        self.register_buffer("wave", torch.arange(1, n_radial + 1) * (math.pi / cutoff), persistent=False)

    def forward(self, r: Tensor) -> Tensor:
        """Return the basis at distances ``r`` [Å], shape (…, n_radial)."""
        r = r[..., None]
        envelope = polynomial_cutoff(r / self.cutoff, self.power)
        return math.sqrt(2.0 / self.cutoff) * torch.sin(r * self.wave) / r * envelope

    def with_slope(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the basis at distances ``r`` [Å] and its derivative by r [1/Å], each of shape (…, n_radial)."""
        r = r[..., None]
        x, phase = r / self.cutoff, r * self.wave
        envelope, falling = polynomial_cutoff(x, self.power), polynomial_cutoff_slope(x, self.power) / self.cutoff
        factor, sine = math.sqrt(2.0 / self.cutoff) / r, torch.sin(phase)
        value = factor * sine * envelope
        return value, factor * (self.wave * torch.cos(phase) * envelope + sine * falling) - value / r


def smooth_step(x: Tensor) -> Tensor:
    """Return a step from 0 at and below x = 0 to 1 at and above 1, with zero first and second derivatives at both."""
    x = x.clamp(0, 1)
    return x * x * x * (10 + x * (6 * x - 15))
