import math

import torch

from forcedrop.potential.radial import BesselBasis, polynomial_cutoff


def test_envelope_ends_with_two_zero_derivatives() -> None:
    x = torch.tensor([1e-9, 1 - 1e-9, 1.0, 1.3], dtype=torch.float64, requires_grad=True)
    u = polynomial_cutoff(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(u.detach(), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(first.detach().abs().max()) < 1e-7
    assert float(second.abs().max()) < 1e-6


def test_bessel_closed_form() -> None:
    basis = BesselBasis(3, 5.0).double()
    r = torch.tensor([0.7, 2.0, 4.9], dtype=torch.float64)
    wave = basis(r)
    for k in range(3):
        for i, d in enumerate(r.tolist()):
            x = d / 5
            envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
            expected = math.sqrt(2 / 5) * math.sin((k + 1) * math.pi * d / 5) / d * envelope
            assert abs(float(wave[i, k]) - expected) < 1e-6
    assert not bool(basis(torch.tensor([5.0, 10.0], dtype=torch.float64)).any())
