r"""Real spherical harmonics and quadrature on the sphere.

Normalisation: the mean of :math:`Y_{lm}^2` over the sphere is 1, so :math:`Y_{00} = 1`. Order within one l: m = −l … l.
"""

from __future__ import annotations

import math

import torch
from scipy.integrate import lebedev_rule
from torch import Tensor


def spherical_harmonics(unit: Tensor, l_max: int) -> Tensor:
    r"""Return :math:`Y_{lm}` of unit vectors for l ≤ ``l_max``, shape (…, (l_max+1)²), from vectors of shape (…, 3).

    Polynomials in x, y, z from the recurrences of the associated Legendre functions without the factor sin^m θ
    (Abramowitz & Stegun 8.5.3), times the real and imaginary parts of (x + iy)^m; no Condon-Shortley phase.
    """
    x, y, z = unit.unbind(-1)
    one = torch.ones_like(z)
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(l_max + 1):
        legendre[m, m] = one * float(math.prod(range(1, 2 * m, 2)))
        if m < l_max:
            legendre[m + 1, m] = (2 * m + 1) * z * legendre[m, m]
        for l in range(m + 2, l_max + 1):  # noqa: E741
            legendre[l, m] = ((2 * l - 1) * z * legendre[l - 1, m] - (l + m - 1) * legendre[l - 2, m]) / (l - m)
    cos, sin = [one], [torch.zeros_like(z)]
    for _ in range(l_max):
        cos, sin = [*cos, x * cos[-1] - y * sin[-1]], [*sin, x * sin[-1] + y * cos[-1]]
    columns = []
    for l in range(l_max + 1):  # noqa: E741
        for m in range(-l, l + 1):
            a = abs(m)
            norm = math.sqrt((2 * l + 1) * (2 if m else 1) * math.factorial(l - a) / math.factorial(l + a))
            columns.append(norm * legendre[l, a] * (sin[a] if m < 0 else cos[a]))
    return torch.stack(columns, dim=-1)


def quadrature(degree: int) -> tuple[Tensor, Tensor]:
    r"""Return a Lebedev rule: points (G, 3) and weights (G,), float64, that average polynomials up to ``degree`` exactly.

    The weights sum to 1 (the mean over the sphere). Source: Lebedev & Laikov, Dokl. Math. 59, 477 (1999), as in SciPy.
    """
    odd = degree if degree % 2 else degree + 1
    points, weights = lebedev_rule(odd)
    return torch.tensor(points.T.copy()), torch.tensor(weights / (4 * math.pi))


def degree_index(l_max: int) -> Tensor:
    """Return the l of every component, shape ((l_max+1)²,)."""
    return torch.tensor([l for l in range(l_max + 1) for _ in range(2 * l + 1)])  # noqa: E741
