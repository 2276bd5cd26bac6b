import numpy as np
import pytest
import torch
from e3nn import o3

from forcedrop.potential.products import SphereProducts
from forcedrop.potential.sphere import quadrature, spherical_harmonics


def unit_vectors(n: int = 50) -> torch.Tensor:
    v = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return v / v.norm(dim=1, keepdim=True)


def test_harmonics_against_e3nn() -> None:
    """e3nn's polar axis is y: its (x, y, z) are our (y, z, x); its 'component' norm is ours."""
    v = unit_vectors()
    ours = spherical_harmonics(v, 4)
    theirs = o3.spherical_harmonics(list(range(5)), v[:, [1, 2, 0]], normalize=True, normalization="component")
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=1e-12)


def test_harmonics_are_orthonormal_over_the_sphere() -> None:
    points, weights = quadrature(8)
    y = spherical_harmonics(points, 4)
    torch.testing.assert_close((y.T * weights) @ y, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-12)


def test_degree_one_is_y_z_x() -> None:
    v = unit_vectors()
    torch.testing.assert_close(spherical_harmonics(v, 1)[:, 1:], np.sqrt(3) * v[:, [1, 2, 0]])


@pytest.mark.parametrize("degree", [3, 6, 9, 10, 11])
def test_quadrature_averages_monomials(degree: int) -> None:
    """The mean of x^a y^b z^c over the sphere, all even: (a-1)!!(b-1)!!(c-1)!!/(a+b+c+1)!!"""
    points, weights = quadrature(degree)
    even = degree - degree % 2
    assert float((weights * points[:, 2] ** even).sum()) == pytest.approx(1 / (even + 1), abs=1e-13)
    assert float((weights * points[:, 0] ** 2).sum()) == pytest.approx(1 / 3, abs=1e-13)


@pytest.mark.parametrize(("l_max", "l_out"), [(2, 0), (3, 1), (3, 2)])
def test_products_against_a_finer_rule(l_max: int, l_out: int) -> None:
    """The products are polynomials, so a rule of much higher degree must give the same integrals."""
    torch.set_default_dtype(torch.float64)
    try:
        module = SphereProducts(l_max, l_out)
        fields = torch.randn((l_max + 1) ** 2, 5, 3, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    second, third = module(module.on_grid(fields[..., None]))
    points, weights = quadrature(31)
    y = spherical_harmonics(points, max(l_max, l_out))
    one, two, three = (torch.einsum("gs,sn->gn", y[:, : (l_max + 1) ** 2], fields[..., k]) for k in range(3))
    project = (y[:, : (l_out + 1) ** 2] * weights[:, None]).T
    torch.testing.assert_close(second[..., 0], project @ (one * two), rtol=0, atol=1e-12)
    torch.testing.assert_close(third[..., 0], project @ (one * two * three), rtol=0, atol=1e-12)
