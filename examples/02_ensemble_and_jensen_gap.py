"""The ensemble view: how well does one pass without masks stand for the mean of all subnetworks?

A dropout network is an ensemble of 2^units subnetworks that share weights; the pass in evaluation mode ("weight-scaled") is a
guess of their mean, exact for networks that are linear in their masks. What is left is the Jensen gap. One should see:

1. A classifier with ten hidden units: all 1024 subnetworks, added up exactly. Monte-Carlo averages approach their mean as
   1/√n, within the standard error that they state; the weight-scaled pass does not. It is the normalised *geometric* mean,
   exactly (Baldi & Sadowski, NeurIPS 2013: dropout right before the softmax).
2. Trained regression networks: with one site before a linear output the gap is no more than sampling noise, at any rate. With
   more sites it is there and grows with rate and depth, up to about a third of the spread between subnetworks.
3. Whether the mean of the ensemble predicts better than the weight-scaled pass is a question of its own. Here it does not: where
   the two differ by more than two standard errors, the weight-scaled pass is nearer to the truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout import Dropout, mc_samples
from forcedrop.dropout.theory import jensen_gap

UNITS = 10
COUNTS = [4, 16, 64, 256, 1024, 4096]


class Enumeration(NamedTuple):
    """Probabilities of class 1 at one input: of all subnetworks, their two means, and the weight-scaled pass."""

    subnetworks: Tensor
    weights: Tensor
    arithmetic: float
    geometric: float
    scaled: float


class Gap(NamedTuple):
    """One network, root mean squares over inputs [standard deviations of the target].

    ``gap`` and ``spread`` are those between the means and between subnetworks; ``scaled`` and ``mean`` are the errors of the two
    predictions.
    """

    gap: float
    spread: float
    scaled: float
    mean: float


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Enumerate and sample the small layer, then measure gaps by depth and rate."""
    net, x = small_classifier(0.5)
    exact = enumerated(net, x)
    sampled = {n: sampled_errors(net, x, n, exact.arithmetic, 5 if fast else 40) for n in COUNTS[: 4 if fast else 6]}
    rows = [(n, error, stated, abs(exact.scaled - exact.arithmetic)) for n, (error, stated) in sampled.items()]
    gallery.table(
        f"ten units, p = 0.5: mean of all 1024 subnetworks {exact.arithmetic:.4f}, weight-scaled {exact.scaled:.4f}, "
        f"normalised geometric mean {exact.geometric:.4f}",
        ("n", "rms error of the average", "stated standard error", "error of the weight-scaled pass"),
        rows,
    )

    rates, depths = ([0.5], [1, 3]) if fast else ([0.1, 0.3, 0.5], [1, 2, 4])
    seeds, n = range(2 if fast else 5), 256 if fast else 1024
    gaps = {
        (depth, p): torch.tensor([measure(regression(depth, p, seed, fast), n) for seed in seeds])
        for depth in depths
        for p in rates
    }
    gallery.table(
        f"regression, {len(seeds)} seeds [standard deviations of the target]; pure noise is a gap of {n**-0.5:.3f} spreads",
        ("sites", "p", "gap", "spread", "gap / spread", "s.e.", "RMSE scaled", "RMSE mean", "difference", "s.e."),
        [(depth, p, *summary(values)) for (depth, p), values in gaps.items()],
    )
    gallery.save(draw(exact, sampled, gaps, n, regression(max(depths), 0.5, 0, fast)), figure)
    error, stated = sampled[max(sampled)]
    return {
        "arithmetic": exact.arithmetic,
        "geometric": exact.geometric,
        "scaled": exact.scaled,
        "sampled_error": error,
        "stated_error": stated,
        "noise_ratio": n**-0.5,
        "one_site_ratio": ratio(gaps[1, 0.5])[0],
        "deep_ratio": ratio(gaps[max(depths), 0.5])[0],
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def ratio(values: Tensor) -> tuple[float, float]:
    """Return gap / spread with its standard error, of gaps of shape (seeds, 4)."""
    return mean_and_error(values[:, 0] / values[:, 1])


def summary(values: Tensor) -> tuple[float, ...]:
    """Return a row of the table."""
    gap, spread, scaled, mean = values.mean(0).tolist()
    return (gap, spread, *ratio(values), scaled, mean, *mean_and_error(values[:, 2] - values[:, 3]))


# one small layer, all subnetworks


def small_classifier(p: float) -> tuple[nn.Sequential, Tensor]:
    """Return a trained classifier of two half moons with ten hidden units that drop, and an input between them."""
    generator = torch.Generator().manual_seed(0)
    angle, label = torch.pi * torch.rand(200, generator=generator), torch.arange(200) % 2
    x = torch.stack([angle.cos() + label - 0.5, (angle.sin() - 0.25) * (1 - 2 * label)], 1)
    x = x + 0.15 * torch.randn(200, 2, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, UNITS), nn.Tanh(), Dropout(p), nn.Linear(UNITS, 2)).double()
        fit(net, lambda: functional.cross_entropy(net(x.double()), label), 300)
    return net, torch.tensor([[0.6, 0.5]], dtype=torch.float64)


def enumerated(net: nn.Sequential, x: Tensor) -> Enumeration:
    """Add up all masks of the hidden layer, given explicitly."""
    keep = torch.tensor(list(itertools.product([0.0, 1.0], repeat=UNITS)), dtype=torch.float64)
    site: Dropout = net[2]
    weights = (site.p ** (1 - keep) * (1 - site.p) ** keep).prod(1)
    with torch.no_grad():
        hidden = net[:2](x).expand(len(keep), -1)
        probabilities = net[3](site(hidden, mask=keep / (1 - site.p))).softmax(1)
        scaled = net.eval()(x).softmax(1)
    geometric = (weights @ probabilities.log()).softmax(0)  # normalised
    return Enumeration(
        probabilities[:, 1], weights, float(weights @ probabilities[:, 1]), float(geometric[1]), float(scaled[0, 1])
    )


def sampled_errors(net: nn.Module, x: Tensor, n: int, exact: float, repeats: int) -> tuple[float, float]:
    """Return the root mean square error of averages over n samples, and the standard error that they state."""
    with torch.no_grad():
        draws = torch.stack([mc_samples(net, x, n, seed).softmax(-1)[:, 0, 1] for seed in range(repeats)])
    stated = (draws.var(1) / n).mean().sqrt()
    return float((draws.mean(1) - exact).square().mean().sqrt()), float(stated)


# regression networks


def target(x: Tensor) -> Tensor:
    """Return the function to be learned, shape (n, 1)."""
    return (2 * x).sin() + 0.8 * (3 * x + 1).cos() * (-(x**2)).exp()


def regression(depth: int, p: float, seed: int, fast: bool) -> nn.Sequential:
    """Return a perceptron on the line with ``depth`` hidden layers, each followed by dropout, trained on 100 points."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(100, 1, generator=generator) - 2
    y = target(x) + 0.1 * torch.randn(100, 1, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [1] + [64] * depth
        hidden = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.SiLU(), Dropout(p))]
        net = nn.Sequential(*hidden, nn.Linear(64, 1))
        fit(net, lambda: functional.mse_loss(net(x), y), 200 if fast else 600)
    return net


def fit(net: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """Minimise a loss by Adam, with a step size that ends at 0."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()


def measure(net: nn.Module, n: int) -> Gap:
    """Return the gap of a network over inputs from −2 to 2."""
    x = grid()
    gap, error, scaled, mean = jensen_gap(net, x, n)
    values = (gap, error * n**0.5, scaled - target(x), mean - target(x))
    unit = target(x).std()
    return Gap(*(float(value.square().mean().sqrt() / unit) for value in values))


def grid() -> Tensor:
    """Return the inputs at which networks are compared, shape (81, 1)."""
    return torch.linspace(-2, 2, 81)[:, None]


# the figure


def draw(
    exact: Enumeration,
    sampled: dict[int, tuple[float, float]],
    gaps: dict[tuple[int, float], Tensor],
    n: int,
    net: nn.Module,
) -> Figure:
    """Subnetworks of the small layer, sampling against enumeration, subnetworks of a deep network, gaps."""
    figure, (left, right, curves, over_depth) = gallery.panels(2, 2, (4.3, 3.3))
    left.hist(exact.subnetworks, 40, weights=exact.weights, color="lightgrey", label="1024 subnetworks")
    left.axvline(exact.arithmetic, color="tab:blue", label=f"mean {exact.arithmetic:.3f}")
    left.axvline(exact.geometric, color="tab:green", label=f"normalised geometric mean {exact.geometric:.3f}")
    left.axvline(exact.scaled, color="tab:red", ls="--", label=f"weight-scaled {exact.scaled:.3f}")
    left.set(title="Ten units, one input, p = 0.5", xlabel="probability of class 1", ylabel="weight of subnetworks")

    errors, stated = zip(*sampled.values(), strict=True)
    right.loglog(list(sampled), errors, "o", color="tab:blue", label="error of the average, rms")
    right.loglog(list(sampled), stated, color="tab:blue", label="standard error, as stated")
    right.axhline(abs(exact.scaled - exact.arithmetic), color="tab:red", ls="--", label="weight-scaled pass")
    right.set(title="Against the mean of all 1024", xlabel="samples n", ylabel="error of the probability")

    draw_curves(curves, net)
    for depth in sorted({depth for depth, _ in gaps}):
        points = [(p, *ratio(values)) for (sites, p), values in gaps.items() if sites == depth]
        p, height, error = zip(*points, strict=True)
        label = f"{depth} sites" if depth > 1 else "1 site, then linear"
        over_depth.errorbar(p, height, error, fmt="o-", ms=4, capsize=3, label=label)
    over_depth.axhline(n**-0.5, color="grey", ls=":", label=f"noise of {n} samples")
    over_depth.set(title="Jensen gap", xlabel="rate p", ylabel="gap / spread of subnetworks, rms", ylim=(0, None))
    for axes in (left, right, curves, over_depth):
        axes.legend(fontsize=8)
    return figure


def draw_curves(axes: Axes, net: nn.Module) -> None:
    """Show some subnetworks, their mean and the weight-scaled pass."""
    x = grid()
    with torch.no_grad():
        samples = mc_samples(net, x, 512)[..., 0]
        scaled = net.eval()(x)
    for k, sample in enumerate(samples[:12]):
        axes.plot(x, sample, color="lightgrey", lw=0.8, label="12 subnetworks" if k == 0 else None)
    axes.plot(x, target(x), color="black", ls=":", label="truth")
    axes.plot(x, samples.mean(0), color="tab:blue", label="mean of 512")
    axes.plot(x, scaled, color="tab:red", ls="--", label="weight-scaled")
    axes.set(title="Deepest network, p = 0.5", xlabel="x", ylabel="y", ylim=(-1.5, 2.3))


if __name__ == "__main__":
    gallery.run(main)
