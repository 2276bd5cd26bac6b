"""Inverted against classic dropout: where does the factor 1−p go, and what happens if it is forgotten?

Classic dropout multiplies by 0 or 1 in training and by 1−p in evaluation; inverted dropout multiplies by 0 or 1/(1−p) in training
and does nothing in evaluation. One should see:

1. Each scheme has the same mean in training and in evaluation: (1−p)·h for classic, h for inverted dropout. The variances are
   p(1−p)·h² and p/(1−p)·h².
2. They are one method in two scales: with the same masks, an inverted network with weights W is a classic one with the following
   weights W/(1−p), in training and in evaluation, up to rounding.
3. Classifiers of three spirals, each evaluated as its scheme asks for, and wrongly: classic without the factor ("forgotten":
   logits too large), inverted with it ("scaled twice": too small). The log loss shows it first and by a multiple; the accuracy
   falls later, by up to five per cent. At small rates, too small logits can even help: these networks are too sure.
"""

from __future__ import annotations

from pathlib import Path

import gallery
import torch
from gallery import Numbers
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout import ClassicDropout, Dropout, DropoutSite

SCHEMES: dict[str, type[DropoutSite]] = {"inverted": Dropout, "classic": ClassicDropout}
WRONG = {"inverted": "inverted, scaled twice", "classic": "classic, forgotten"}
COLOURS = {"inverted": "tab:blue", "classic": "tab:orange"}


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Run all three parts; the numbers are those of the largest rate."""
    rates = [0.2, 0.5] if fast else [0.1, 0.2, 0.3, 0.4, 0.5]
    moments = {name: [layer_moments(layer, p) for p in rates] for name, layer in SCHEMES.items()}
    rows = [
        (name, p, m["train"], 1 - p if name == "classic" else 1.0, m["eval"], m["variance"], m["law"])
        for name in SCHEMES
        for p, m in zip(rates, moments[name], strict=True)
    ]
    header = ("scheme", "p", "mean, training", "expected", "mean, evaluation", "variance, training", "expected")
    gallery.table("a unit of value h = 1, 100 000 masks", header, rows)

    same = largest_difference(0.3)
    print(
        f"\ninverted with W against classic with W/(1−p), same masks: largest difference {same:.1e} of outputs around 1"
    )

    scores = {name: [trained_scores(layer, p, fast) for p in rates] for name, layer in SCHEMES.items()}
    rows = []
    for name in SCHEMES:
        for p, (right, wrong) in zip(rates, scores[name], strict=True):
            rows += [(name, p, *mean_and_error(right)), (WRONG[name], p, *mean_and_error(wrong))]
    header = ("evaluation", "p", "log loss [nat]", "s.e.", "accuracy", "s.e.")
    gallery.table(f"three spirals, {scores['classic'][0][0].shape[0]} seeds", header, rows)

    gallery.save(draw(rates, moments, scores), figure)
    return numbers(moments, scores, same)


def layer_moments(layer: type[DropoutSite], p: float) -> Numbers:
    """Return mean and variance of a layer's output for an input of ones."""
    site, ones = layer(p), torch.ones(100_000, dtype=torch.float64)
    draws = site.train()(ones, generator=torch.Generator().manual_seed(0))
    law = p * (1 - p) if layer is ClassicDropout else p / (1 - p)
    return {
        "train": float(draws.mean()),
        "error": float(draws.std()) / len(ones) ** 0.5,
        "eval": float(site.eval()(ones).mean()),
        "variance": float(draws.var()),
        "law": law,
    }


def largest_difference(p: float) -> float:
    """Return how far an inverted layer with weights W is from a classic one with W/(1−p), in training and evaluation."""
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(64, 32, generator=generator), torch.randn(16, 32, generator=generator) / 32**0.5
    inverted, classic = Dropout(p), ClassicDropout(p)
    keep = classic.mask(h, generator)
    pairs = [
        (inverted(h, keep / (1 - p)), classic(h, keep)),
        (inverted.eval()(h), classic.eval()(h)),
    ]
    return max(float((a @ weight.T - b @ (weight / (1 - p)).T).abs().max()) for a, b in pairs)


def spirals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return n points of three noisy spirals, shape (n, 2), and their classes, shape (n,)."""
    label = torch.randint(3, (n,), generator=generator)
    radius = torch.rand(n, generator=generator).sqrt()
    angle = 4 * radius + 2 * torch.pi / 3 * label + 0.45 * torch.randn(n, generator=generator)
    return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


def trained_scores(layer: type[DropoutSite], p: float, fast: bool) -> tuple[Tensor, Tensor]:
    """Train one classifier per seed; return (log loss, accuracy), shape (seeds, 2), evaluated rightly and wrongly."""
    right, wrong = [], []
    other = Dropout if layer is ClassicDropout else ClassicDropout
    for seed in range(2 if fast else 6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = train(layer, p, seed, 150 if fast else 300)
        x, label = spirals(2000, torch.Generator().manual_seed(1000 + seed))
        swapped = nn.Sequential(*(other(p) if isinstance(part, DropoutSite) else part for part in net))
        right.append(score(net, x, label))
        wrong.append(score(swapped, x, label))
    return torch.stack(right), torch.stack(wrong)


def train(layer: type[DropoutSite], p: float, seed: int, steps: int) -> nn.Sequential:
    """Return a perceptron with dropout after both hidden layers, trained on 300 points."""
    net = nn.Sequential(
        *(nn.Linear(2, 64), nn.ReLU(), layer(p), nn.Linear(64, 64), nn.ReLU(), layer(p)), nn.Linear(64, 3)
    )
    x, label = spirals(300, torch.Generator().manual_seed(seed))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        functional.cross_entropy(net(x), label).backward()
        optimiser.step()
    return net


def score(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Return log loss [nat] and accuracy in evaluation mode."""
    with torch.no_grad():
        logits = net.eval()(x)
    return torch.stack([functional.cross_entropy(logits, label), (logits.argmax(1) == label).float().mean()])


def mean_and_error(scores: Tensor) -> tuple[float, float, float, float]:
    """Return mean and standard error over seeds of the log loss, then of the accuracy."""
    mean, error = scores.mean(0), scores.std(0) / scores.shape[0] ** 0.5
    return float(mean[0]), float(error[0]), float(mean[1]), float(error[1])


def numbers(moments: dict[str, list[Numbers]], scores: dict[str, list[tuple[Tensor, Tensor]]], same: float) -> Numbers:
    """Return the numbers of the largest rate by name."""
    result = {"largest_difference": same}
    for name in SCHEMES:
        result |= {f"{name}_{key}": value for key, value in moments[name][-1].items()}
        for kind, values in zip(("right", "wrong"), scores[name][-1], strict=True):
            loss, _, accuracy, _ = mean_and_error(values)
            result |= {f"{name}_{kind}_loss": loss, f"{name}_{kind}_accuracy": accuracy}
    return result


def draw(
    rates: list[float], moments: dict[str, list[Numbers]], scores: dict[str, list[tuple[Tensor, Tensor]]]
) -> Figure:
    """Mean, variance, log loss and accuracy over the rate."""
    figure, (mean, variance, loss, accuracy) = gallery.panels(2, 2, (4.1, 3.2))
    dense = torch.linspace(0, max(rates) + 0.05, 50)
    laws = {"inverted": (dense * 0 + 1, dense / (1 - dense)), "classic": (1 - dense, dense * (1 - dense))}
    for name, colour in COLOURS.items():
        for axes, law, key in ((mean, laws[name][0], "train"), (variance, laws[name][1], "variance")):
            axes.plot(dense, law, color=colour, label=f"{name}, law")
            axes.plot(rates, [m[key] for m in moments[name]], "o", color=colour, label=f"{name}, training")
        mean.plot(rates, [m["eval"] for m in moments[name]], "x", ms=11, color=colour, label=f"{name}, evaluation")
        for column, axes in enumerate((loss, accuracy)):
            for label, style, kind in ((name, "o-", 0), (WRONG[name], "s--", 1)):
                values = [mean_and_error(pair[kind])[2 * column : 2 * column + 2] for pair in scores[name]]
                heights, errors = zip(*values, strict=True)
                axes.errorbar(rates, heights, errors, fmt=style, ms=5, color=colour, capsize=3, label=label)
    mean.set(title="Mean: training equals evaluation", ylabel="mean of the output / h")
    variance.set(title="Variance in training", ylabel="variance of the output / h²")
    loss.set(title="Test log loss: shows a wrong scale first", ylabel="log loss [nat]", ylim=(0, None))
    accuracy.set(title="Test accuracy: shows it later", ylabel="accuracy", ylim=(0.88, 0.98))
    for axes in (mean, variance, loss, accuracy):
        axes.set_xlabel("rate p")
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    gallery.run(main)
