"""Dropout is ridge: does gradient descent with real masks find the solution of a penalty?

Inverted dropout on the inputs of a linear model adds p/(1−p)·Σ_j E[x_j²]·w_j² to the mean squared error, in expectation. One
should see:

1. The masked loss, averaged over masks, equals the plain loss plus ``ridge_penalty``, at any weights.
2. Gradient descent with a fresh mask per example and step: the weights do not settle, but their mean goes to the closed form
   ``dropout_ridge``, not to the least-squares solution, and agrees with it within a few standard errors.
3. Shrinkage paths over p. Because each feature's penalty carries its own second moment, the predictions do not depend on the
   features' units, unlike those of plain ridge.
4. On 40 noisy examples of 20 features, a rate between 0 and 1 predicts best, and masks get there without anybody writing a
   penalty down.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from forcedrop.dropout import Dropout
from forcedrop.dropout.theory import dropout_ridge, ridge_penalty

EXAMPLES, FEATURES, NOISE = 40, 20, 1.5
SHOWN = (0, 1, 2, 4, 5)
"""Features drawn in the figure."""


class Descent(NamedTuple):
    """Weights of independent chains: one chain over steps, their mean over steps, and each one's mean over the second half.

    Shapes (steps, F), (steps, F) and (chains, F).
    """

    one: Tensor
    mean: Tensor
    settled: Tensor

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Return the mean weights and their standard error, each of shape (F,)."""
        return self.settled.mean(0), self.settled.std(0) / self.settled.shape[0] ** 0.5


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Compare the loss, the descent, the solutions and the test errors with the closed form."""
    x, y, truth = data(0)
    rates = [0.3, 0.5] if fast else [0.05, 0.1, 0.2, 0.35, 0.5, 0.7]
    chains, steps = (16, 600) if fast else (64, 1500)
    losses = [(p, *masked_loss(x, y, p, 2000 if fast else 20_000)) for p in rates]
    header = ("p", "plain loss + penalty", "mean over masks", "s.e.", "plain loss")
    gallery.table("mean squared error at the least-squares weights", header, losses)

    runs = {p: descend(x, y, p, chains, steps) for p in rates}
    rows = [(p, *comparison(run, x, y, p)) for p, run in runs.items()]
    gallery.table(
        f"descent with masks, mean of {chains} chains; |w| of least squares {float(dropout_ridge(x, y, 0.0).norm()):.3f}",
        ("p", "|w| of ridge", "|mean − ridge|", "largest |z| of 20", "mean z²", "|mean − least squares|"),
        rows,
    )
    dropout, ridge = change_of_units(x, y, 0.5)
    print(
        f"\nfeatures in other units change the predictions by {dropout:.1e} (dropout), {100 * ridge:.0f} % (plain ridge)"
    )
    dense = torch.linspace(0, 0.9, 46)
    risks = torch.stack([risk_curve(seed, dense) for seed in range(20 if fast else 200)])
    best = int(risks.mean(0).argmin())
    print(
        f"lowest mean excess risk over {len(risks)} data sets at p = {dense[best]:.2f}: {risks.mean(0)[best]:.3f}",
        end=" ",
    )
    print(f"± {risks[:, best].std() / len(risks) ** 0.5:.3f}; least squares {risks.mean(0)[0]:.3f}")
    gallery.save(draw(runs, dense, risks, truth), figure)
    names = ("loss_law", "loss", "loss_error", "plain_loss")
    return dict(zip(names, losses[-1][1:], strict=True)) | {
        "largest_z": max(row[3] for row in rows),
        "to_ridge": rows[-1][2],
        "to_least_squares": rows[-1][5],
        "dropout_units": dropout,
        "ridge_units": ridge,
    }


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return correlated inputs (N, F) of several scales, noisy targets (N,), and the true weights (F,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64) @ mixing()
    truth = torch.linspace(1, -1, FEATURES, dtype=torch.float64).roll(3)
    noise = torch.randn(EXAMPLES, generator=generator, dtype=torch.float64)
    return x, x @ truth + NOISE * noise, truth


def mixing() -> Tensor:
    """Return the matrix that correlates neighbouring features and scales them, (F, F); the covariance is its square."""
    scales = torch.linspace(0.7, 1.4, FEATURES, dtype=torch.float64)
    return (torch.eye(FEATURES, dtype=torch.float64) + torch.diag(torch.full((FEATURES - 1,), 0.4), 1)) * scales


def masked_loss(x: Tensor, y: Tensor, p: float, masks: int) -> tuple[float, float, float, float]:
    """Return, at the least-squares weights: plain loss + penalty, mean loss over masks with standard error, plain loss."""
    weight, layer, generator = dropout_ridge(x, y, 0.0), Dropout(p), torch.Generator().manual_seed(1)
    batches = [layer(x.expand(500, -1, -1), generator=generator) @ weight - y for _ in range(masks // 500)]
    losses = torch.cat(batches).square().mean(1)
    plain = (x @ weight - y).square().mean()
    law = plain + ridge_penalty(weight, x.square().mean(0), p)
    return float(law), float(losses.mean()), float(losses.std()) / masks**0.5, float(plain)


def descend(x: Tensor, y: Tensor, p: float, chains: int, steps: int) -> Descent:
    """Run independent chains of gradient descent on the masked loss, from 0, a fresh mask per chain, example and step.

    The mean iterate of a linear model follows the mean gradient exactly, at any step size that is stable.
    """
    layer, generator = Dropout(p), torch.Generator().manual_seed(round(1000 * p))
    step = 0.6 * (1 - p) / float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    weight, iterates = torch.zeros(chains, FEATURES, dtype=torch.float64), []
    for _ in range(steps):
        masked = layer(x.expand(chains, -1, -1), generator=generator)
        residual = torch.einsum("cnf,cf->cn", masked, weight) - y
        weight = weight - step * torch.einsum("cnf,cn->cf", masked, residual) / len(x)
        iterates.append(weight)
    path = torch.stack(iterates)
    return Descent(path[:, 0], path.mean(1), path[steps // 2 :].mean(0))


def comparison(run: Descent, x: Tensor, y: Tensor, p: float) -> tuple[float, ...]:
    """Return the row of the table that compares where chains settle with the closed form."""
    exact, (mean, error) = dropout_ridge(x, y, p), run.estimate()
    z = (mean - exact) / error
    to_least_squares = (mean - dropout_ridge(x, y, 0.0)).norm()
    values = (exact.norm(), (mean - exact).norm(), z.abs().max(), z.square().mean(), to_least_squares)
    return tuple(float(value) for value in values)


def change_of_units(x: Tensor, y: Tensor, p: float) -> tuple[float, float]:
    """Return by how much, relatively, predictions change if each feature is measured in another unit: dropout, plain ridge."""
    units = 10 ** torch.linspace(-1, 1, FEATURES, dtype=torch.float64)
    penalty = p / (1 - p) * len(x) * torch.eye(FEATURES, dtype=torch.float64)

    def plain_ridge(x: Tensor) -> Tensor:
        return x @ torch.linalg.solve(x.T @ x + penalty, x.T @ y)

    def dropped(x: Tensor) -> Tensor:
        return x @ dropout_ridge(x, y, p)

    changes = ((f(x * units) - f(x)).norm() / f(x).norm() for f in (dropped, plain_ridge))
    dropout, ridge = (float(change) for change in changes)
    return dropout, ridge


def risk(weight: Tensor, truth: Tensor) -> float:
    """Return the mean squared error on new examples beyond the noise, relative to the variance of the noiseless target."""
    return float((mixing() @ (weight - truth)).square().sum() / (mixing() @ truth).square().sum())


def risk_curve(seed: int, rates: Tensor) -> Tensor:
    """Return the risk of the closed form on one data set, shape of ``rates``."""
    x, y, truth = data(seed)
    return torch.tensor([risk(dropout_ridge(x, y, float(p)), truth) for p in rates])


def draw(runs: dict[float, Descent], dense: Tensor, risks: Tensor, truth: Tensor) -> Figure:
    """Weights over steps at p = 0.5, shrinkage paths, test errors."""
    figure, (steps, shrinkage, error) = gallery.panels(3, 1, (4.2, 3.9))
    x, y, _ = data(0)
    draw_steps(steps, runs[0.5], dropout_ridge(x, y, 0.5), dropout_ridge(x, y, 0.0))

    exact = torch.stack([dropout_ridge(x, y, float(p)) for p in dense])
    for colour, feature in enumerate(SHOWN):
        shrinkage.plot(dense, exact[:, feature], color=f"C{colour}")
        estimates = [run.estimate() for run in runs.values()]
        points = [(float(mean[feature]), 5 * float(spread[feature])) for mean, spread in estimates]
        heights, bars = zip(*points, strict=True)
        shrinkage.errorbar(list(runs), heights, bars, fmt="o", ms=4, capsize=2, color=f"C{colour}")
    shrinkage.plot([], [], color="grey", label="ridge, closed form")
    shrinkage.errorbar([], [], [], fmt="o", ms=4, color="grey", label="descent with masks ± 5 s.e.")
    shrinkage.set(title="Shrinkage", xlabel="rate p", ylabel="weight")

    mean, spread = risks.mean(0), risks.std(0) / len(risks) ** 0.5
    error.plot(dense, mean, color="grey", label=f"ridge, mean of {len(risks)} data sets")
    error.fill_between(dense, mean - 2 * spread, mean + 2 * spread, color="lightgrey", label="± 2 s.e.")
    error.plot(dense, risks[0], color="tab:blue", label="ridge, this data set")
    risk_of_masks = [risk(run.estimate()[0], truth) for run in runs.values()]
    error.plot(list(runs), risk_of_masks, "o", color="tab:blue", label="descent with masks")
    error.set(title="New examples", xlabel="rate p", ylabel="excess squared error / Var(x·w)", ylim=(0, None))
    for axes in (steps, shrinkage, error):
        axes.legend(fontsize=8)
    return figure


def draw_steps(axes: Axes, run: Descent, ridge: Tensor, least_squares: Tensor) -> None:
    """Show the weights of a few features over the steps of descent."""
    number = torch.arange(1, len(run.one) + 1)
    for colour, feature in enumerate(SHOWN[:3]):
        labels = ("one chain", "mean of chains", "ridge", "least squares") if colour == 0 else (None,) * 4
        axes.plot(number, run.one[:, feature], color=f"C{colour}", lw=0.5, alpha=0.5, label=labels[0])
        axes.plot(number, run.mean[:, feature], color=f"C{colour}", label=labels[1])
        axes.axhline(ridge[feature], color=f"C{colour}", ls="--", label=labels[2])
        axes.axhline(least_squares[feature], color=f"C{colour}", ls=":", label=labels[3])
    axes.set(title="Descent, three weights, p = 0.5", xlabel="step", ylabel="weight", ylim=(-2.6, 1.7))


if __name__ == "__main__":
    gallery.run(main)
