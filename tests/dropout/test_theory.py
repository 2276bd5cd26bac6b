"""Formulas against masks: enumerated, drawn, or trained with."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout.elementwise import ClassicDropout, Dropout
from forcedrop.dropout.theory import (
    dropout_ridge,
    filter_normalised_direction,
    gradient_variance,
    jensen_gap,
    largest_hessian_eigenvalue,
    perturbation_profile,
    ridge_penalty,
    second_moment_growth,
)

RATES = [0.0, 0.2, 0.5, 0.9]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_masks(units: int, p: float) -> tuple[Tensor, Tensor]:
    """Every keep mask, shape (2^units, units), of zeros and ones, and its probability."""
    keep = torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)
    return keep, (p ** (1 - keep) * (1 - p) ** keep).prod(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ridge


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("outputs", [None, 3])
def test_penalty_is_what_all_masks_together_add(p: float, outputs: int | None) -> None:
    x, weight = normal(7, 5), normal(5) if outputs is None else normal(outputs, 5)
    y = normal(7, seed=1) if outputs is None else normal(7, outputs, seed=1)
    keep, probability = all_masks(5, p)
    losses = (functional.linear(x * keep[:, None] / (1 - p), weight) - y).square().flatten(1).sum(1) / 7
    plain = (functional.linear(x, weight) - y).square().sum() / 7
    penalty = ridge_penalty(weight, x.square().mean(0), p)
    # the seven examples have masks of their own, but their losses add, so that one mask for all has the same mean
    torch.testing.assert_close((probability * losses).sum(), plain + penalty, rtol=1e-12, atol=1e-12)


def test_penalty_of_standardised_inputs_is_the_plain_one() -> None:
    weight = normal(2, 4)
    assert ridge_penalty(weight, torch.ones(4), 0.3).item() == pytest.approx(0.3 / 0.7 * float(weight.square().sum()))


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("outputs", [None, 3])
def test_closed_form_is_a_stationary_point(p: float, outputs: int | None) -> None:
    x, y = (
        normal(30, 5) * torch.tensor([1e-3, 0.1, 1, 10, 1e3]),
        normal(30, *(() if outputs is None else (outputs,)), seed=1),
    )
    weight = dropout_ridge(x, y, p).requires_grad_()
    assert weight.shape == ((5,) if outputs is None else (outputs, 5))
    loss = (functional.linear(x, weight) - y).square().sum() / 30 + ridge_penalty(weight, x.square().mean(0), p)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert (gradient.abs() / x.square().mean(0).sqrt()).max() < 1e-12
    if p == 0:
        solution = torch.linalg.lstsq(x, y.reshape(30, -1)).solution.mT
        torch.testing.assert_close(weight.reshape(-1, 5), solution)


def test_gradient_descent_with_masks_finds_the_ridge_solution() -> None:
    """The mean of the iterates of a linear model is exact at any step size; it is met within 5 standard errors of block means."""
    p, blocks = 0.4, 40
    x = normal(60, 4) * torch.tensor([0.5, 1.0, 1.5, 2.0]) + torch.tensor([0.0, 0.5, 0.0, 1.0])
    y = x @ torch.tensor([1.0, -2.0, 0.5, 1.0]).double() + 0.1 * normal(60, seed=1)
    layer, random = Dropout(p).train(), generator(9)
    weight, iterates = torch.zeros(4, dtype=torch.float64), []
    for _ in range(8200):
        masked = layer(x, generator=random)
        weight = weight - 0.02 * masked.T @ (masked @ weight - y) / 60
        iterates.append(weight)
    means = torch.stack(iterates[200:]).reshape(blocks, -1, 4).mean(1)
    error = means.std(0) / blocks**0.5
    assert ((means.mean(0) - dropout_ridge(x, y, p)).abs() < 5 * error).all()
    assert ((dropout_ridge(x, y, 0.0) - dropout_ridge(x, y, p)).abs() > 20 * error).all()


def test_ridge_refusals() -> None:
    x = normal(6, 3)
    with pytest.raises(ValueError, match=r"must have the shape .* got \(3,\) and \(4,\)"):
        ridge_penalty(torch.ones(3), torch.ones(4), 0.1)
    with pytest.raises(ValueError, match=r"must not be negative, got -1\.0"):
        ridge_penalty(torch.ones(2), torch.tensor([1.0, -1.0]), 0.1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        dropout_ridge(x, x[:, 0], 1.0)
    with pytest.raises(ValueError, match=r"must have the shape .* got \(6, 3\) and \(5,\)"):
        dropout_ridge(x, x[:5, 0], 0.1)
    with pytest.raises(TypeError, match="floating-point"):
        dropout_ridge(x, torch.arange(6), 0.1)
    twins = torch.cat([x, x[:, :1]], 1)
    with pytest.raises(ValueError, match="not unique"):
        dropout_ridge(twins, x[:, 0], 0.0)
    assert torch.isfinite(dropout_ridge(twins, x[:, 0], 0.1)).all()
    with pytest.raises(ValueError, match="not unique"):
        dropout_ridge(x * torch.tensor([1.0, 0.0, 1.0]), x[:, 0], 0.1)


# moments


@pytest.mark.parametrize("p", RATES)
def test_gradient_variance_of_a_discrete_gradient(p: float) -> None:
    """A gradient with 9 equally likely values, kept or dropped: 18 cases, added up."""
    g = normal(9) + 1
    cases, weights = torch.cat([0 * g, g / (1 - p)]), torch.tensor([p] * 9 + [1 - p] * 9) / 9
    mean = (weights * cases).sum()
    exact = (weights * cases.square()).sum() - mean**2
    torch.testing.assert_close(mean, g.mean())
    torch.testing.assert_close(gradient_variance(g.mean(), g.var(correction=0), p), exact)
    assert gradient_variance(float(g.mean()), float(g.var(correction=0)), p) == pytest.approx(float(exact))


def test_gradient_variance_of_back_propagation() -> None:
    """Gradients through a layer, of mean μ and variance σ², drawn; within 5 standard errors."""
    p, n, mu, sigma = 0.3, 200_000, 0.8, 0.5
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    Dropout(p)(x, generator=generator(9)).backward(mu + sigma * normal(n))
    square = (x.grad - mu).square()
    assert abs(square.mean() - gradient_variance(mu, sigma**2, p)) < 5 * square.std() / n**0.5


def test_moment_refusals() -> None:
    assert second_moment_growth(0.5, 10) == 1024
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        gradient_variance(0.0, -0.1, 0.5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        gradient_variance(0.0, 0.1, 1.0)
    with pytest.raises(ValueError, match="`layers` must not be negative"):
        second_moment_growth(0.5, -1)


class Bent(nn.Module):
    """Seven units that drop, in front of something nonlinear."""

    def __init__(self, layer: nn.Module, *, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop = layer
        self.net = nn.Sequential(nn.Linear(7, 5), nn.Identity() if linear else nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


@pytest.mark.parametrize("layer", [Dropout, ClassicDropout])
def test_jensen_gap_against_all_masks(layer: type[nn.Module]) -> None:
    p, n, x = 0.4, 4000, 2 * normal(3, 7)
    model = Bent(layer(p))
    keep, probability = all_masks(7, p)
    values = torch.stack([model.net(x * mask / ((1 - p) if layer is Dropout else 1)) for mask in keep]).detach()
    mean = torch.tensordot(probability, values, 1)
    scaled = model.net(x * ((1 - p) if layer is ClassicDropout else 1)).detach()
    result = jensen_gap(model, x, n, seed=1)
    assert torch.equal(result.scaled, scaled)
    assert torch.equal(result.gap, result.mean - result.scaled)
    assert ((result.gap - (mean - scaled)).abs() < 5 * result.standard_error).all()
    assert ((mean - scaled).abs() > 5 * result.standard_error).any()
    exact_error = torch.tensordot(probability, (values - mean).square(), 1).sqrt() / n**0.5
    torch.testing.assert_close(result.standard_error, exact_error, rtol=0.1, atol=0)


def test_no_jensen_gap_in_a_linear_network() -> None:
    model = Bent(nn.Dropout(0.5), linear=True).train()
    result = jensen_gap(model, normal(3, 7), 500, chunk=100)
    assert (result.gap.abs() < 5 * result.standard_error).all()
    assert (result.standard_error > 0).all()
    assert model.training
    assert not result.gap.requires_grad


def test_jensen_gap_refusals() -> None:
    class Pair(Bent):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    with pytest.raises(ValueError, match="2 samples or more, got n=1"):
        jensen_gap(Bent(Dropout(0.5)), normal(3, 7), 1)
    with pytest.raises(TypeError, match="return a tensor, got tuple"):
        jensen_gap(Pair(Dropout(0.5)), normal(3, 7), 10)


# sharpness


class Loss:
    """A small network's loss, its parameters and its whole Hessian."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.params = list(self.net.parameters())
        self.x, self.y = normal(20, 3), normal(20, 2, seed=1)

    def __call__(self) -> Tensor:
        return functional.mse_loss(self.net(self.x), self.y)

    def eigenvalues(self) -> Tensor:
        def of_vector(vector: Tensor) -> Tensor:
            parts = vector.split([param.numel() for param in self.params])
            named = {
                name: part.reshape(param.shape)
                for (name, param), part in zip(self.net.named_parameters(), parts, strict=True)
            }
            return functional.mse_loss(torch.func.functional_call(self.net, named, self.x), self.y)

        vector = torch.cat([param.detach().reshape(-1) for param in self.params])
        return torch.linalg.eigvalsh(torch.func.hessian(of_vector)(vector))


@pytest.mark.parametrize("seed", [0, 1])
def test_largest_eigenvalue_against_the_whole_hessian(seed: int) -> None:
    loss = Loss(seed)
    exact = loss.eigenvalues()
    assert len(exact) == 26
    found = largest_hessian_eigenvalue(loss, loss.params, 100, generator())
    assert found.value == pytest.approx(float(exact[-1]), rel=1e-10)
    assert found.residual < 1e-6
    assert all(param.grad is None for param in loss.params)


def test_few_iterations_come_with_an_honest_residual() -> None:
    loss = Loss()
    exact = loss.eigenvalues()
    for iterations in range(1, 26):
        value, residual = largest_hessian_eigenvalue(loss, loss.params, iterations, generator(iterations))
        assert value <= exact[-1] + 1e-12
        assert (exact - value).abs().min() <= residual + 1e-12


def test_largest_means_most_positive() -> None:
    x = torch.zeros(3, requires_grad=True)
    curvatures = torch.tensor([-9.0, -4.0, -1.0])
    found = largest_hessian_eigenvalue(lambda: (curvatures * x.square()).sum() / 2, [x], generator=generator())
    assert found.value == pytest.approx(-1.0, rel=1e-5)
    flat = largest_hessian_eigenvalue(lambda: (curvatures * x).sum(), [x])
    assert flat == (0.0, 0.0)


def test_parameters_that_the_loss_does_not_read() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(5, requires_grad=True)
    assert largest_hessian_eigenvalue(lambda: x.pow(4).sum(), [unused, x]).value == pytest.approx(12.0, rel=1e-5)


def test_profile_of_a_quadratic_loss() -> None:
    """|W|²/2 along d is |W|²(1 + r²)/2 + r W·d, since d has the norm of W, filter by filter."""
    weight, bias, radii = normal(4, 3, 2, 2), normal(4, seed=1), [-1.0, 0.0, 0.5]
    before = weight.clone()
    losses = perturbation_profile(lambda: weight.square().sum() / 2, [weight, bias], radii, 3, generator(2))
    assert torch.equal(weight, before)
    random = generator(2)
    for row in losses:
        step, still = filter_normalised_direction([weight, bias], random)
        torch.testing.assert_close(step.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        assert not still.any()
        r = torch.tensor(radii, dtype=torch.float64)
        torch.testing.assert_close(row, weight.square().sum() * (1 + r**2) / 2 + r * (weight * step).sum())


def test_profile_does_not_see_rescaled_layers() -> None:
    """Factors c and 1/c on two layers around a ReLU change every curvature but not the network, nor its profile."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False)).double()
    x, y = normal(20, 3), normal(20, 1, seed=1)

    def measure() -> tuple[Tensor, float]:
        def loss() -> Tensor:
            return functional.mse_loss(net(x), y)

        profile = perturbation_profile(loss, net.parameters(), [0.1, 1.0], 4, generator())
        return profile, largest_hessian_eigenvalue(loss, net.parameters(), generator=generator()).value

    profile, curvature = measure()
    with torch.no_grad():
        net[0].weight *= 10
        net[2].weight /= 10
    rescaled, rescaled_curvature = measure()
    torch.testing.assert_close(rescaled, profile)
    assert abs(rescaled_curvature - curvature) > curvature


def test_profile_restores_after_an_error() -> None:
    weight = normal(2, 3)
    before, calls = weight.clone(), iter([1.0, math.nan])

    with pytest.raises(StopIteration):
        perturbation_profile(lambda: next(calls), [weight], [0.5, 1.0, 2.0])
    assert torch.equal(weight, before)


def test_sharpness_refusals() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="require a gradient"):
        largest_hessian_eigenvalue(lambda: x.sum(), [torch.ones(2)])
    with pytest.raises(ValueError, match="require a gradient"):
        largest_hessian_eigenvalue(lambda: x.sum(), [])
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\)"):
        largest_hessian_eigenvalue(lambda: x.square(), [x])
    with pytest.raises(ValueError, match="`iterations` must be at least 1, got 0"):
        largest_hessian_eigenvalue(lambda: x.square().sum(), [x], 0)
    with pytest.raises(ValueError, match=r"2 axes or more to be moved, got shapes \[\(2,\)\]"):
        perturbation_profile(lambda: 0.0, [x], [1.0])
    with pytest.raises(ValueError, match="`directions` must be at least 1, got 0"):
        perturbation_profile(lambda: 0.0, [torch.ones(2, 2)], [1.0], 0)
