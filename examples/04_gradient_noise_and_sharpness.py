"""Gradient noise and sharpness: how much noise do masks put on gradients, and are the minima that they lead to flatter?

One should see:

1. A mask makes the variance of a gradient that does not depend on it (Var g + p·E[g]²)/(1−p), exactly. In a trained network the
   gradient that comes back to a unit does depend a little on that unit's mask: its variance is below the law, by a sixth at
   width 8, and nears it with width.
2. Networks of 32 units that fit 100 noisy examples, trained to the end with and without dropout. The *plain* loss (masks off) and
   the *regularised* one (mean over masks), whose minimum training with dropout looks for, are different surfaces.

   - Along filter-normalised random directions both rise much less around the networks trained with dropout, for ReLU and tanh.
   - By the largest Hessian eigenvalue that is so for ReLU, by a factor of about ten, on both losses. For tanh it hardly is: 12 to
     25 % less, without a trend in p. Whether dropout "finds flatter minima" depends on the measure and on the network.
   - Most of it comes with the first p = 0.1. (Without dropout the noise is fitted too: the training error is 0.)
   - Where training with dropout ends is no minimum of the plain loss: its gradient there (last column) is not 0.
   - Flatter is not better: from p = 0.1 to 0.5 profiles go on to flatten while the test error grows.
"""

from __future__ import annotations

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
from forcedrop.dropout.theory import gradient_variance, largest_hessian_eigenvalue, perturbation_profile

EXAMPLES, WIDTH, NOISE = 100, 32, 0.3
MASKS = 64
"""Function samples whose mean is the regularised loss."""
RADII = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
SHOWN = RADII.index(0.3)
"""The radius whose rise is in the table."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "tanh": nn.Tanh}
LOSSES = ("plain", "regularised")


class Minimum(NamedTuple):
    """What is measured where one training ends; ``eigenvalue`` and ``profile`` for the plain and the regularised loss.

    ``profile`` is the mean rise of the loss over ``RADII``, shape (2, len(RADII)); ``gradient`` the norm of the plain loss's.
    """

    train: float
    regularised: float
    test: float
    eigenvalue: tuple[float, float]
    profile: Tensor
    gradient: float


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Check the variance, then measure minima over the rate."""
    rates, widths, seeds = ([0.5], [8, 64], range(2)) if fast else ([0.1, 0.3, 0.5], [8, 32, 128], range(5))
    noise = noise_ratios(rates, widths, range(2 if fast else 4), 100 if fast else 300)
    rows = [(name, p, *mean_and_error(ratio)) for (name, p), ratio in noise.items()]
    gallery.table("variance of the gradient, measured / law", ("gradient", "p", "ratio", "s.e."), rows)

    minima = {
        (name, p): [minimum(name, p, seed, 200 if fast else 800) for seed in seeds]
        for name in ACTIVATIONS
        for p in [0.0, *rates]
    }
    header = ("unit", "p", "train", "regularised", "test", "λ plain", "λ reg.", "rise plain", "rise reg.", "|∇ plain|")
    rows = [(name, p, *means(results)) for (name, p), results in minima.items()]
    gallery.table(
        f"mean of {len(seeds)} seeds: mean squared errors, largest eigenvalue λ, rise at radius {RADII[SHOWN]}",
        header,
        rows,
    )
    changes = {
        (name, p, loss): change(results, minima[name, 0.0], LOSSES.index(loss))
        for (name, p), results in minima.items()
        for loss in LOSSES
        if p
    }
    rows = [(*key, *values) for key, values in changes.items()]
    header = ("unit", "p", "loss", "λ / λ(p = 0)", "× or ÷", "rise / rise(p = 0)", "× or ÷")
    gallery.table("geometric mean over seeds, and the factor of its standard error", header, rows)
    gallery.save(draw(noise, minima), figure)
    return {
        "independent": mean_and_error(noise["independent", 0.5])[0],
        "independent_error": mean_and_error(noise["independent", 0.5])[1],
        "narrow": mean_and_error(noise[f"width {widths[0]}", 0.5])[0],
        "wide": mean_and_error(noise[f"width {widths[-1]}", 0.5])[0],
    } | {f"{name}_{loss}_rise": changes[name, 0.5, loss][2] for name in ACTIVATIONS for loss in LOSSES}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


# the networks


def data(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (n, 4) and noiseless targets (n, 1)."""
    x = torch.randn(n, 4, generator=generator)
    return x, (2 * x[:, :1]).sin() + 0.5 * x[:, 1:2] * x[:, 2:3]


def noisy_data(seed: int) -> tuple[Tensor, Tensor]:
    """Return the examples to fit, (EXAMPLES, 4) and (EXAMPLES, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data(EXAMPLES, generator)
    return x, y + NOISE * torch.randn(y.shape, generator=generator)


def trained(activation: str, width: int, p: float, seed: int, steps: int) -> nn.Sequential:
    """Return a network of two hidden layers, dropout after each, trained on all examples by Adam with a cosine schedule."""
    x, y = noisy_data(seed)
    unit = ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = (nn.Linear(4, width), unit(), Dropout(p), nn.Linear(width, width), unit(), Dropout(p))
        net = nn.Sequential(*hidden, nn.Linear(width, 1))
        optimiser = torch.optim.Adam(net.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            optimiser.zero_grad()
            functional.mse_loss(net(x), y).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


# gradient noise


def noise_ratios(rates: list[float], widths: list[int], seeds: range, steps: int) -> dict[tuple[str, float], Tensor]:
    """Return variance / law, shape (seeds,), for a gradient without dependence and for networks of several widths."""
    ratios = {("independent", p): torch.tensor([independent_ratio(p, seed) for seed in seeds]) for p in rates}
    for width in widths:
        for p in rates:
            nets = [trained("ReLU", width, p, seed, steps) for seed in seeds]
            values = [network_ratio(net, seed) for seed, net in enumerate(nets)]
            ratios[f"width {width}", p] = torch.tensor(values)
    return ratios


def independent_ratio(p: float, seed: int) -> float:
    """Back-propagate gradients of mean 1 and variance 1/4 through a layer."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.zeros(100_000, dtype=torch.float64, requires_grad=True)
    incoming = 1 + 0.5 * torch.randn(h.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(Dropout(p)(h, generator=generator), h, incoming)
    return float(gradient.var()) / gradient_variance(1.0, 0.25, p)


def network_ratio(net: nn.Sequential, seed: int, masks: int = 1000) -> float:
    """Return the variance over masks of the gradient before the first dropout layer / the law for the gradient behind it."""
    x, y = (tensor[:20] for tensor in noisy_data(seed))
    generator = torch.Generator().manual_seed(seed)
    first, second = net[2], net[5]
    before = net[:2](x).detach().repeat(masks, 1, 1).requires_grad_()
    behind = first(before, first.mask(before, generator))
    hidden = net[3:5](behind)
    outputs = net[6](second(hidden, second.mask(hidden, generator)))
    outgoing, incoming = torch.autograd.grad((outputs - y).square().sum(), (before, behind))
    law = gradient_variance(incoming.mean(0), incoming.var(0), first.p)
    return float(outgoing.var(0).sum() / law.sum())


# sharpness


def minimum(activation: str, p: float, seed: int, steps: int) -> Minimum:
    """Train, and measure both losses where training ends."""
    net = trained(activation, WIDTH, p, seed, steps)
    x, y = noisy_data(seed)
    params = list(net.parameters())

    def plain() -> Tensor:
        return functional.mse_loss(net(x), y)

    def regularised() -> Tensor:
        return functional.mse_loss(mc_samples(net, x, MASKS), y.expand(MASKS, -1, -1)) if p else plain()

    def eigenvalue(loss: Callable[[], Tensor]) -> float:
        return largest_hessian_eigenvalue(loss, params, 40, torch.Generator().manual_seed(seed)).value

    def profile(loss: Callable[[], Tensor]) -> Tensor:
        losses = perturbation_profile(loss, params, RADII, 10, torch.Generator().manual_seed(seed))
        return (losses - losses[:, :1]).mean(0)

    gradients = torch.autograd.grad(plain(), params)
    test_x, test_y = data(2000, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        errors = (plain(), regularised(), functional.mse_loss(net(test_x), test_y))
    return Minimum(
        *(float(error) for error in errors),
        eigenvalue=(eigenvalue(plain), eigenvalue(regularised)),
        profile=torch.stack([profile(plain), profile(regularised)]),
        gradient=float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()),
    )


def means(results: list[Minimum]) -> list[float]:
    """Return a row of the table of minima."""
    rows = [(*r[:3], *r.eigenvalue, *r.profile[:, SHOWN].tolist(), r.gradient) for r in results]
    return torch.tensor(rows).mean(0).tolist()


def change(results: list[Minimum], without: list[Minimum], loss: int) -> tuple[float, float, float, float]:
    """Return by which factor eigenvalue and rise differ from those without dropout, each with the factor of its error."""
    pairs = zip(results, without, strict=True)
    logs = torch.tensor(
        [(a.eigenvalue[loss] / b.eigenvalue[loss], a.profile[loss, SHOWN] / b.profile[loss, SHOWN]) for a, b in pairs]
    ).log()
    factors, errors = logs.mean(0).exp(), (logs.std(0) / len(results) ** 0.5).exp()
    return float(factors[0]), float(errors[0]), float(factors[1]), float(errors[1])


# the figure


def draw(noise: dict[tuple[str, float], Tensor], minima: dict[tuple[str, float], list[Minimum]]) -> Figure:
    """Variance against the law, eigenvalues over the rate, one profile per activation."""
    figure, (variance, eigenvalues, *profiles) = gallery.panels(2, 2, (4.3, 3.3))
    for name in dict.fromkeys(name for name, _ in noise):
        points = [(p, *mean_and_error(ratio)) for (other, p), ratio in noise.items() if other == name]
        p, height, error = zip(*points, strict=True)
        label = "independent of the mask" if name == "independent" else f"trained network, {name}"
        variance.errorbar(p, height, error, fmt="o-", ms=4, capsize=3, label=label)
    variance.axhline(1, color="grey", lw=0.8)
    variance.set(title="Gradient noise of masks", xlabel="rate p", ylabel="variance / law", ylim=(0.6, 1.05))

    for colour, name in enumerate(ACTIVATIONS):
        for loss, style in enumerate(("o-", "s--")):
            rates = [p for other, p in minima if other == name]
            logs = [torch.tensor([r.eigenvalue[loss] for r in minima[name, p]]).log() for p in rates]
            heights = torch.stack([values.mean() for values in logs]).exp()
            factors = torch.stack([(values.std() / len(values) ** 0.5).exp() for values in logs])
            bars = torch.stack([heights - heights / factors, heights * factors - heights])
            label = f"{name}, {LOSSES[loss]} loss"
            eigenvalues.errorbar(rates, heights, bars, fmt=style, ms=4, capsize=3, color=f"C{colour}", label=label)
    eigenvalues.set(title="Largest Hessian eigenvalue", xlabel="rate p", ylabel="λ, geometric mean", yscale="log")
    eigenvalues.set(yticks=[5, 10, 20, 50], yticklabels=["5", "10", "20", "50"])
    eigenvalues.minorticks_off()
    for axes, name in zip(profiles, ACTIVATIONS, strict=True):
        draw_profile(axes, name, minima)
    for axes, place in zip(
        (variance, eigenvalues, *profiles), ("lower left", "best", "lower right", "lower right"), strict=True
    ):
        axes.legend(fontsize=8, loc=place)
    return figure


def draw_profile(axes: Axes, name: str, minima: dict[tuple[str, float], list[Minimum]]) -> None:
    """Show the rise of both losses over the radius, mean and standard error over seeds."""
    for colour, p in enumerate(p for other, p in minima if other == name):
        rises = torch.stack([result.profile for result in minima[name, p]])
        for loss, style in enumerate(("o-", "s--")):
            if p == 0 and loss == 1:  # the same one
                continue
            error = rises[:, loss].std(0) / len(rises) ** 0.5
            label = f"p = {p:g}, {LOSSES[loss] if p else 'plain = regularised'}"
            axes.errorbar(
                RADII[1:], rises[:, loss].mean(0)[1:], error[1:], fmt=style, ms=3, color=f"C{colour}", label=label
            )
    axes.set(title=f"Around the minima, {name}", xlabel="radius / norm of the filters", ylabel="rise of the loss")
    axes.set(yscale="log", ylim=(1e-4, 5), xlim=(0, None))


if __name__ == "__main__":
    gallery.run(main)
