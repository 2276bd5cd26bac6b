r"""Real spherical harmonics and quadrature on the sphere.

Normalisation: the mean of :math:`Y_{lm}^2` over the sphere is 1, so :math:`Y_{00} = 1`. Order within one l: m = −l … l.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
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


def harmonics_and_gradients(unit: Tensor, r: Tensor, l_max: int) -> tuple[Tensor, Tensor]:
    """Return :math:`Y_{lm}`, shape (…, S), and their gradients by the vector itself [1/Å], shape (3, …, S).

    The same polynomials as :func:`spherical_harmonics`, values and derivatives in one matrix product with the monomials.

    Args:
        unit: directions, shape (…, 3).
        r: lengths of the vectors [Å], shape (…).
        l_max: highest l.
    """
    monomials = _monomials(unit, l_max)
    table = _polynomial_table(l_max).to(unit)
    values, *partial = (monomials @ table.flatten(0, 1).T).unflatten(-1, table.shape[:2]).unbind(-2)
    slopes = torch.stack(partial)
    radial = (slopes * unit.movedim(-1, 0)[..., None]).sum(0)
    return values, (slopes - unit.movedim(-1, 0)[..., None] * radial) / r[..., None]


def _monomials(unit: Tensor, degree: int) -> Tensor:
    """Return all products x^a y^b z^c of a degree up to ``degree``, shape (…, P)."""
    powers = [torch.ones_like(unit), unit]
    for _ in range(2, degree + 1):
        powers.append(powers[-1] * unit)
    table = torch.stack(powers[: degree + 1], dim=-1)  # (…, 3, degree + 1)
    a, b, c = torch.tensor(_exponents(degree), device=unit.device).T
    return table[..., 0, a] * table[..., 1, b] * table[..., 2, c]


def _exponents(degree: int) -> list[tuple[int, int, int]]:
    every = itertools.product(range(degree + 1), repeat=3)
    return [(a, b, c) for a, b, c in every if a + b + c <= degree]


@functools.cache
def _polynomial_table(l_max: int) -> Tensor:
    """Return what each monomial gives to Y_lm and to its derivatives by x, y, z, shape (4, S, P), float64.

    Found by interpolation: the values of polynomials at as many points in general position as they have coefficients fix them.
    """
    exponents = _exponents(l_max)
    nodes = torch.cos(torch.arange(l_max + 1, dtype=torch.float64) * 1.3 + 0.4)
    points = torch.stack([nodes[list(e)] for e in exponents])  # a simplex of a grid: unisolvent
    table = torch.linalg.solve(_monomials(points, l_max), spherical_harmonics(points, l_max))
    place = {e: i for i, e in enumerate(exponents)}
    rows = [table]
    for axis in range(3):
        slope = torch.zeros_like(table)
        for e, i in place.items():
            if e[axis]:
                lower = tuple(n - (k == axis) for k, n in enumerate(e))
                slope[place[lower]] += e[axis] * table[i]  # type: ignore[index]
        rows.append(slope)
    return torch.stack([row.T for row in rows])


def quadrature(degree: int) -> tuple[Tensor, Tensor]:
    r"""Return a Lebedev rule: points (G, 3) and weights (G,), float64, that average polynomials up to ``degree`` exactly.

    The weights sum to 1 (the mean over the sphere). Source: Lebedev & Laikov, Dokl. Math. 59, 477 (1999), as in SciPy.
    """
    from scipy.integrate import lebedev_rule  # a third of a second, which the import of a calculator need not wait for

    odd = degree if degree % 2 else degree + 1
    points, weights = lebedev_rule(odd)
    return torch.tensor(points.T.copy()), torch.tensor(weights / (4 * math.pi))


def degree_index(l_max: int) -> Tensor:
    """Return the l of every component, shape ((l_max+1)²,)."""
    return torch.tensor([l for l in range(l_max + 1) for _ in range(2 * l + 1)])  # noqa: E741
