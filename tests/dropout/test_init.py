"""Initialisation: the variance of the weights, and what it does to activations and gradients over depth."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from forcedrop.dropout.elementwise import ClassicDropout, Dropout
from forcedrop.dropout.init import dropout_kaiming_normal_, dropout_kaiming_uniform_
from forcedrop.dropout.theory import second_moment_growth

FILLS = [dropout_kaiming_normal_, dropout_kaiming_uniform_]
DEPTH, WIDTH, BATCH, RUNS = 50, 64, 256, 28
LOG_ERROR = 0.05
"""Largest standard error of the logarithm of a growth below: a deviation of 20 % is then almost 4 of them."""


def growth(step: Callable[[Tensor], Tensor]) -> float:
    """Return the growth of the second moment over 50 steps: the mean ratio of a step, over steps and runs, to the power of 50.

    Weights are new in every step, so that a step has the same mean ratio whatever comes in, and the growth of the mean is the
    product of the mean ratios; the products themselves have tails too heavy for their mean to be measured. For the same reason
    units may change their signs between steps, each entry's on its own: then the entries of a batch are nearly independent.
    """
    ratios = torch.empty(RUNS, DEPTH, dtype=torch.float64)
    for run in ratios:
        h = torch.randn(BATCH, WIDTH)
        for layer in range(DEPTH):
            new = step(h)
            run[layer] = (new.square().sum(1) / h.square().sum(1)).double().mean()
            h = new / new.square().mean().sqrt() * (torch.randint(0, 2, new.shape) * 2 - 1)
    error = DEPTH * (ratios.mean(1) / ratios.mean()).std() / RUNS**0.5
    assert error < LOG_ERROR, f"standard error {error}"
    return float(ratios.mean()) ** DEPTH


def weight(**settings: object) -> Tensor:
    return dropout_kaiming_normal_(torch.empty(WIDTH, WIDTH), **settings)


def forward_step(p: float, scheme: str = "inverted", init_p: float | None = None) -> Callable[[Tensor], Tensor]:
    layer = {"inverted": Dropout, "classic": ClassicDropout}[scheme](p).train()
    return lambda h: layer(torch.relu(h @ weight(p=p if init_p is None else init_p, scheme=scheme).T))


@pytest.mark.parametrize("scheme", ["inverted", "classic"])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_second_moment_over_50_layers(p: float, scheme: str) -> None:
    torch.manual_seed(0)
    assert growth(forward_step(p, scheme)) == pytest.approx(1, abs=0.2)


def test_a_deep_network_as_users_build_it() -> None:
    """One network of 50 layers: its own growth scatters by factors, but not by 2^50."""
    p, ratios = 0.5, []
    for init_p in (p, 0.0):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(part for _ in range(DEPTH) for part in (nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Dropout(p)))
        )
        for layer in net[::3]:
            dropout_kaiming_normal_(layer.weight, init_p)
        x = torch.randn(64, 256)
        ratios.append(float(net(x).detach().square().mean() / x.square().mean()))
    assert 1 / 30 < ratios[0] < 30
    assert ratios[1] / ratios[0] == pytest.approx(second_moment_growth(p, DEPTH), rel=1e-3)


def test_weights_that_forget_dropout() -> None:
    """Plain Kaiming grows by (1−p)^−50, the rule of the classic scheme under inverted dropout by (1−p)^−100."""
    torch.manual_seed(0)
    p = 0.5
    expected = second_moment_growth(p, DEPTH)
    assert growth(forward_step(p, init_p=0.0)) / expected == pytest.approx(1, abs=0.2)
    wrong = Dropout(p).train()
    grown = growth(lambda h: wrong(torch.relu(h @ weight(p=p, scheme="classic").T)))
    assert grown / expected**2 == pytest.approx(1, abs=0.2)


def test_gradients_with_the_fan_out() -> None:
    """Back through ReLU, dropout and a layer of 64 inputs and 192 outputs, within 5 standard errors; the fan-in gives 3."""
    torch.manual_seed(0)
    p, draws = 0.4, 200
    layer = Dropout(p).train()
    for mode, expected in (("fan_out", 1.0), ("fan_in", 3.0)):
        ratios = torch.empty(draws)
        for draw in range(draws):
            h, gradient = torch.randn(BATCH, 64, requires_grad=True), torch.randn(BATCH, 192)
            out = layer(torch.relu(h)) @ dropout_kaiming_normal_(torch.empty(192, 64), p, mode=mode).T
            (back,) = torch.autograd.grad(out, h, gradient)
            ratios[draw] = back.square().mean() / gradient.square().mean()
        error = ratios.std() / draws**0.5
        assert error < 0.01 * expected
        assert abs(ratios.mean() - expected) < 5 * error


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_residual_networks_stay_bounded(p: float) -> None:
    """Each of 50 branches adds 1/50: (1 + 1/50)^50 = 2.69; without ``branches`` it is 2^50."""
    torch.manual_seed(0)
    layer = Dropout(p).train()

    def block(branches: int | None) -> Callable[[Tensor], Tensor]:
        def step(x: Tensor) -> Tensor:
            hidden = torch.relu(x @ weight(p=0.0, nonlinearity="linear").T)
            return x + layer(hidden) @ weight(p=p, branches=branches).T

        return step

    assert growth(block(DEPTH)) == pytest.approx((1 + 1 / DEPTH) ** DEPTH, rel=0.2)
    assert growth(block(None)) / 2**DEPTH == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("shape", "settings", "variance"),
    [
        ((300, 200), {"p": 0.3}, 2 * 0.7 / 200),
        ((300, 200), {"p": 0.3, "scheme": "classic"}, 2 / (0.7 * 200)),
        ((300, 200), {"p": 0.3, "mode": "fan_out"}, 2 * 0.7 / 300),
        ((300, 200), {"p": 0.3, "nonlinearity": "linear"}, 0.7 / 200),
        ((300, 200), {"p": 0.3, "branches": 8}, 2 * 0.7 / 1600),
        ((300, 200), {"p": 0.3, "nonlinearity": "leaky_relu", "a": 0.5}, 1.6 * 0.7 / 200),
        ((40, 30, 5, 5), {"p": 0.5}, 2 * 0.5 / (30 * 25)),
        ((40, 30, 5, 5), {"p": 0.5, "mode": "fan_out"}, 2 * 0.5 / (40 * 25)),
    ],
)
def test_variance(
    fill: Callable[..., Tensor], shape: tuple[int, ...], settings: dict[str, object], variance: float
) -> None:
    tensor = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    assert fill(tensor, **settings, generator=torch.Generator().manual_seed(0)) is tensor
    square = tensor.detach().square()
    assert abs(square.mean() - variance) < 5 * square.std() / square.numel() ** 0.5
    assert abs(tensor.detach().mean()) < 5 * (variance / square.numel()) ** 0.5
    if fill is dropout_kaiming_uniform_:
        assert tensor.abs().max() <= math.sqrt(3 * variance)


@pytest.mark.parametrize("fill", FILLS)
def test_without_dropout_it_is_that_of_torch(fill: Callable[..., Tensor]) -> None:
    theirs = {dropout_kaiming_normal_: nn.init.kaiming_normal_, dropout_kaiming_uniform_: nn.init.kaiming_uniform_}[
        fill
    ]
    torch.manual_seed(0)
    ours = fill(torch.empty(20, 10), 0.0)
    torch.manual_seed(0)
    assert torch.equal(ours, theirs(torch.empty(20, 10), nonlinearity="relu"))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3, 3), {"p": 1.0}, r"must lie in \[0, 1\), got 1"),
        ((3,), {"p": 0.5}, r"2 axes or more to have a fan, got shape \(3,\)"),
        ((3, 3), {"p": 0.5, "scheme": "inverse"}, "'inverted' or 'classic', got 'inverse'"),
        ((3, 3), {"p": 0.5, "mode": "fan"}, "'fan_in' or 'fan_out', got 'fan'"),
        ((3, 3), {"p": 0.5, "branches": 0}, "`branches` must be at least 1, got 0"),
        ((3, 3), {"p": 0.5, "nonlinearity": "gulp"}, "gulp"),
    ],
)
def test_refusals(
    fill: Callable[..., Tensor], shape: tuple[int, ...], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fill(torch.empty(shape), **settings)
