"""Draws from the posterior: their covariance, their mean, and what they make of energies and forces."""

from __future__ import annotations

import pytest
import torch

from forcedrop.derive import derive
from forcedrop.graph import batch_graphs
from forcedrop.uncertainty.equations import jacobian, refit, solve_equations
from forcedrop.uncertainty.posterior import Posterior, draws
from forcedrop.uncertainty.sampling import predict
from tests.uncertainty.test_equations import copper, graphs, labels


def test_draws_are_about_their_mean_and_of_the_covariance_of_their_root() -> None:
    root = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = draws(root, 20000, seed=0)
    torch.testing.assert_close(found.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.cov(found.T), root @ root.T, rtol=0, atol=0.05 * float((root @ root.T).abs().max())
    )
    assert not torch.equal(draws(root, 5, seed=1), draws(root, 5, seed=0))
    # but for the mean, draw k does not depend on how many there are
    few, many = draws(root, 5, 0), draws(root, 50, 0)
    torch.testing.assert_close(few[1:] - few[:1], many[1:5] - many[:1], rtol=0, atol=1e-12)


def test_the_bank_is_drawn_from_the_precision_plus_the_prior() -> None:
    potential, some = copper(), labels()
    equations = solve_equations(potential, some)
    mean = refit(potential, some, equations)
    said = Posterior(functions=5, seed=2).fill(potential, some)
    precision = equations.precision + equations.prior * torch.eye(len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(precision)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    expected = draws(root, 5, 2)
    found = potential.correction.bank.flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(potential.correction.weight.flatten(), mean, rtol=1e-6, atol=1e-9)
    assert said == {"frames": 4, "refit": bool(mean.any())}
    again = copper()
    Posterior(functions=5, seed=2).fill(again, some, equations)  # equations that are known already
    torch.testing.assert_close(again.correction.bank, potential.correction.bank, rtol=1e-9, atol=1e-12)


def test_samples_have_the_spread_of_the_covariance() -> None:
    potential, batch = copper(), batch_graphs(graphs(1, seed=0))
    n = potential.n_features
    root = 1e-3 * torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    potential.set_functions(None, draws(root, 1000, 0)[:, None])
    found = predict(potential, batch, n_samples=1000)
    energy, forces, _ = jacobian(potential, batch)
    covariance = root @ root.T
    exact = torch.einsum("fnc,fg,gnc->nc", forces, covariance, forces).sqrt()
    torch.testing.assert_close(found.std.forces / exact, torch.ones_like(exact), rtol=0, atol=0.12)
    assert float(found.std.energy / (energy.T @ covariance @ energy).sqrt()) == pytest.approx(1.0, abs=0.12)


def test_draws_leave_the_mean_where_the_plain_network_has_it_whatever_fits_at_once() -> None:
    potential, batch = copper(), batch_graphs(graphs(1, seed=0))
    Posterior(functions=5).fill(potential, labels())
    found, plain = predict(potential, batch, n_samples=5, max_memory=1e-9), derive(potential, batch)
    for a, b, c in zip(found.mean, found.samples, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-10)
        torch.testing.assert_close(b.mean(0), c, rtol=0, atol=1e-9)
    assert float(found.std.forces.min()) > 0
    again = predict(potential, batch, n_samples=5)
    torch.testing.assert_close(again.samples.forces, found.samples.forces, rtol=0, atol=1e-10)
