"""Exact dropout: what do error bars say where there are no data, if every mask has the best weights for it?

Sixty noisy points of a curve in two clumps, a gap between them and nothing outside. Small networks (two hidden layers of tanh, 64
units each), and three ways to many functions:

- Monte-Carlo dropout as usual: trained with dropout behind both layers, 256 masks of the same rate afterwards;
- exact dropout: one network trained without dropout, and 256 masks of its last features, each with weights that are solved for
  it in closed form (``ExactDropout``): no training at all;
- a deep ensemble: five networks trained like that one, from different random weights.

One should see:

1. Monte-Carlo dropout has about the same σ everywhere: wide at the data, where it is the noise of masks that one set of weights
   cannot serve all at once, and much too narrow elsewhere. It fits worse, too.
2. All functions of exact dropout fit the data, and they go apart where there are none, for the price of one network.
3. The members of a deep ensemble do so as well, at five times the training. Their mean is better in the gap, and so is their
   likelihood; at the data they are surer of themselves than they should be, more so than exact dropout.
4. Masks alone leave σ too small at the data; a draw from the posterior on top of each mask (``draw=1``) mends that. Here the
   posterior without masks does as well as both together: with more weights than labels, it leaves much open by itself.

Nobody is honest outside, where all go on as the features of the data suggest. Means ± one standard error over data sets and
initialisations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.figure import Figure
from torch import Tensor, nn

from forcedrop.dropout import Dropout, ExactDropout, mc_samples

WIDTH, NOISE, MEMBERS, FUNCTIONS = 64, 0.1, 5, 256
USUAL, EXACT, ENSEMBLE = "Monte-Carlo dropout", "exact dropout", "deep ensemble"
DRAWN, POSTERIOR = "exact dropout with draws", "posterior, no masks"
COLOURS = {USUAL: "tab:orange", EXACT: "tab:blue", ENSEMBLE: "tab:green"}
GRID = torch.linspace(-2.6, 2.6, 261)[:, None]
REGIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "at data": lambda x: (x.abs() > 0.8) & (x.abs() < 2),
    "in the gap": lambda x: x.abs() <= 0.8,
    "outside": lambda x: x.abs() >= 2,
}


class Trial(NamedTuple):
    """One data set, (60, 1) each, and functions on ``GRID`` by each method, shape (K, G, 1)."""

    x: Tensor
    y: Tensor
    functions: dict[str, Tensor]


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Make functions in every way on several data sets, and print σ, errors, coverage and log-likelihood by region."""
    n_trials, n_steps = (3, 400) if fast else (8, 1000)
    trials = [run_trial(seed, n_steps) for seed in range(n_trials)]
    numbers: Numbers = {}
    for region in REGIONS:
        rows = []
        for method in trials[0].functions:
            scores = torch.tensor([judge(trial.functions[method], region) for trial in trials])
            rows.append((method, *(pm(column) for column in scores.unbind(1))))
            names = ("sigma", "error", "coverage", "nll")
            numbers |= {f"{method}, {region}, {n}": float(v) for n, v in zip(names, scores.mean(0), strict=True)}
        header = ("functions", "σ (r.m.s.)", "error of the mean (r.m.s.)", "truth within 2σ", "NLL of labels")
        gallery.table(f"{region}, {n_trials} data sets", header, rows)
    gallery.save(draw(trials[0]), figure)
    return numbers


def truth(x: Tensor) -> Tensor:
    """Return the curve."""
    return 0.8 * torch.sin(3 * x) + 0.4 * x


def network(p: float, readout: nn.Module) -> nn.Sequential:
    """Return a perceptron; ``p`` is the rate of the usual dropout behind its hidden layers."""
    first, second = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(first, nn.Tanh(), Dropout(p), second, nn.Tanh(), Dropout(p), readout)


def fit(model: nn.Sequential, x: Tensor, y: Tensor, n_steps: int) -> nn.Sequential:
    """Train by Adam on all points, while the learning rate falls to 0."""
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    model.train()
    for _ in range(n_steps):
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def run_trial(seed: int, n_steps: int) -> Trial:
    """Draw points, train, and ask all functions."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.8 + 1.2 * torch.rand(60, 1, generator=generator)
    x[:30] *= -1
    y = truth(x) + NOISE * torch.randn(x.shape, generator=generator)
    torch.manual_seed(seed)
    usual = fit(network(0.1, nn.Linear(WIDTH, 1)), x, y, n_steps)
    # the rate is 0 while it is trained
    members = [fit(network(0.0, ExactDropout(WIDTH, p=0.0)), x, y, n_steps) for _ in range(MEMBERS)]
    with torch.no_grad():
        return Trial(
            x,
            y,
            {
                USUAL: mc_samples(usual, GRID, FUNCTIONS),
                EXACT: exact(members[0], x, y, p=0.3),
                ENSEMBLE: torch.stack([member(GRID) for member in members]),
                DRAWN: exact(members[0], x, y, p=0.3, ratio=1.0),
                POSTERIOR: exact(members[0], x, y, p=0.0, ratio=1.0),
            },
        )


def exact(trained: nn.Sequential, x: Tensor, y: Tensor, *, p: float, ratio: float = 0.0) -> Tensor:
    """Return functions of a copy of a trained network whose last layer is solved for each mask."""
    model = copy.deepcopy(trained)
    trunk, readout = model[:-1], model[-1]
    readout.p = p
    readout.solve(trunk(x), y, FUNCTIONS, prior=1.0, sigma=NOISE, draw=ratio)
    return mc_samples(model, GRID, FUNCTIONS)


def judge(functions: Tensor, region: str) -> tuple[float, float, float, float]:
    """Return σ, error, the share of places where the truth is within 2σ of the mean, and the mean NLL of noisy labels."""
    inside = REGIONS[region](GRID)
    sigma, error = functions.std(0)[inside], (functions.mean(0) - truth(GRID))[inside]
    variance = sigma.square() + NOISE**2
    # the mean over the labels' noise, exactly
    nll = 0.5 * ((2 * math.pi * variance).log() + (error.square() + NOISE**2) / variance)
    within = (error.abs() < 2 * sigma).double()
    return (
        float(sigma.square().mean().sqrt()),
        float(error.square().mean().sqrt()),
        float(within.mean()),
        float(nll.mean()),
    )


def pm(values: Tensor) -> str:
    """Return mean ± standard error over the trials as text."""
    return f"{values.double().mean():.3f} ± {values.double().std() / len(values) ** 0.5:.3f}"


def draw(trial: Trial) -> Figure:
    """Show the functions of three methods for one data set."""
    figure, axes = gallery.panels(3, size=(4.4, 3.8))
    for axis, (method, colour) in zip(axes, COLOURS.items(), strict=True):
        draw_functions(axis, trial, method, colour)
    axes[0].set_ylabel("y")
    axes[0].legend(fontsize=7, loc="upper left")
    return figure


def draw_functions(axis: Any, trial: Trial, method: str, colour: str) -> None:
    """Show mean, ±2σ and five functions of a method."""
    x, functions = GRID[:, 0], trial.functions[method][..., 0]
    mean, sigma = functions.mean(0), functions.std(0)
    for factor in (2, 1):
        label = "mean ± 1σ and ± 2σ" if factor == 1 else None
        low, high = mean - factor * sigma, mean + factor * sigma
        axis.fill_between(x, low, high, color=colour, alpha=0.22, lw=0, label=label)
    for k, function in enumerate(functions[:MEMBERS]):
        axis.plot(x, function, color=colour, lw=0.7, alpha=0.8, label="five functions" if k == 0 else None)
    axis.plot(x, mean, color=colour, lw=2)
    axis.plot(x, truth(x), "k--", lw=1.2, label="truth")
    axis.plot(trial.x[:, 0], trial.y[:, 0], "k.", ms=4, label="data")
    share = judge(trial.functions[method], "in the gap")[2]
    axis.set(
        title=f"{method}\nhere the truth is within 2σ in {share:.0%} of the gap",
        xlabel="x",
        xlim=(-2.6, 2.6),
        ylim=(-2.2, 2.2),
    )


if __name__ == "__main__":
    gallery.run(main)
