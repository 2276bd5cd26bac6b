"""ReLU, dropout and depth: which initialisation keeps a signal alive over 50 layers, and what becomes of gradients?

One should see, at p = 0.5 (the second moment is the mean square of all activations, in training):

1. Inverted dropout multiplies it by 1/(1−p) a layer. Weights of variance 2(1−p)/fan-in keep it; plain Kaiming grows by (1−p)^−50;
   the rule "inversely proportional to 1−p", which is right for classic dropout, by (1−p)^−100. In evaluation, without masks, the
   well-initialised network shrinks by 1−p a layer: the price.
2. Classic dropout multiplies it by 1−p. Now 2/((1−p)·fan-in) keeps it, and plain Kaiming loses it. "Keeps" is a statement on the
   mean: single networks of this width wander by a factor of a few, and the median one ends somewhat lower.
3. A residual network whose branches share the growth (``branches=50``) ends near e, whatever p is, and forgives a forgotten p
   (e² at p = 0.5); without ``branches`` it grows by 2^50. With dropout on the stream in place of the branch the mean grows by
   more than 2^50 too, but hardly any network shows it: that mean is carried by rare units that all masks have kept.
4. ReLU followed by dropout passes a gradient whose mean over masks does not depend on p, if what follows is linear; its second
   moment grows by 1/(1−p). Through several such layers the mean does depend on p, since masks switch later units on and off: in
   networks at initialisation its component along the weight-scaled gradient falls with depth, and with the rate until noise hides
   it; in a residual network of as many blocks, much less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from forcedrop.dropout import ClassicDropout, Dropout, DropoutSite, dropout_kaiming_normal_

DEPTH, WIDTH, BATCH, P = 50, 128, 32, 0.5


class Layer(nn.Module):
    """Linear, ReLU, dropout; the weight's variance knows of a rate ``init_p`` under ``scheme``."""

    def __init__(self, dropout: DropoutSite, scheme: str, init_p: float) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.empty(WIDTH, WIDTH)), dropout
        dropout_kaiming_normal_(self.weight, init_p, scheme=scheme)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, WIDTH) to itself."""
        return self.dropout(torch.relu(x @ self.weight.T))


class Block(nn.Module):
    """A stream to which a branch of two layers is added, with dropout in the branch or on the stream."""

    def __init__(self, init_p: float, branches: int | None, on_stream: bool = False, p: float = P) -> None:
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(2))
        self.dropout, self.on_stream = Dropout(p), on_stream
        dropout_kaiming_normal_(self.first, 0.0, nonlinearity="linear")
        dropout_kaiming_normal_(self.last, init_p, branches=branches)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, WIDTH) to itself."""
        hidden = torch.relu(x @ self.first.T)
        if self.on_stream:
            return self.dropout(x + hidden @ self.last.T)
        return x + self.dropout(hidden) @ self.last.T


class Case(NamedTuple):
    """A kind of network: its group (a panel), a name, what makes a layer, and the growth per layer that is expected."""

    group: str
    name: str
    make: Callable[[], nn.Module]
    growth: float
    training: bool = True


INVERTED, CLASSIC, RESIDUAL = "inverted dropout", "classic dropout", "residual, inverted dropout"
CASES = [
    Case(INVERTED, "variance ∝ 1−p", lambda: Layer(Dropout(P), "inverted", P), 1.0),
    Case(INVERTED, "plain Kaiming", lambda: Layer(Dropout(P), "inverted", 0.0), 1 / (1 - P)),
    Case(INVERTED, "variance ∝ 1/(1−p)", lambda: Layer(Dropout(P), "classic", P), (1 - P) ** -2),
    Case(INVERTED, "∝ 1−p, evaluation", lambda: Layer(Dropout(P), "inverted", P), 1 - P, training=False),
    Case(CLASSIC, "variance ∝ 1/(1−p)", lambda: Layer(ClassicDropout(P), "classic", P), 1.0),
    Case(CLASSIC, "plain Kaiming", lambda: Layer(ClassicDropout(P), "classic", 0.0), 1 - P),
    Case(CLASSIC, "variance ∝ 1−p", lambda: Layer(ClassicDropout(P), "inverted", P), (1 - P) ** 2),
    Case(RESIDUAL, "1−p and branches", lambda: Block(P, DEPTH), 1 + 1 / DEPTH),
    Case(RESIDUAL, "branches, p forgotten", lambda: Block(0.0, DEPTH), 1 + 1 / (1 - P) / DEPTH),
    Case(RESIDUAL, "1−p, branches forgotten", lambda: Block(P, None), 2.0),
    Case(RESIDUAL, "branches, dropout on stream", lambda: Block(0.0, DEPTH, True), (1 + 1 / DEPTH) / (1 - P)),
]


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Follow second moments through networks, then mean gradients over the rate."""
    moments = {case: second_moments(case, 6 if fast else 80) for case in CASES}
    header = ("network", "initialisation", "expected", "measured", "× or ÷", "median network", "from", "to")
    rows = [(case.group, case.name, case.growth**DEPTH, *growth(m), *spread(m)) for case, m in moments.items()]
    gallery.table(f"growth of the second moment over {DEPTH} layers, p = {P}", header, rows)

    rates, depths = ([0.2, 0.5], [1, 4]) if fast else ([0.05, 0.1, 0.2, 0.35, 0.5], [1, 2, 4, 8])
    masks = 500 if fast else 4000
    gradients = {(f"{depth} ReLU layers", p): mean_gradient(layers(depth), p, masks) for depth in depths for p in rates}
    gradients |= {(f"{depths[-1]} residual blocks", p): mean_gradient(blocks(depths[-1]), p, masks) for p in rates}
    header = ("network", "p", "mean / weight-scaled", "s.e.", "second moment / weight-scaled")
    rows = [(*key, *values) for key, values in gradients.items()]
    gallery.table("gradient in the input, over masks", header, rows)
    gallery.save(draw(moments, gradients), figure)
    numbers = {f"{case.group}, {case.name}": growth(m)[0] / case.growth**DEPTH for case, m in moments.items()}
    numbers |= {f"{case.group}, {case.name}, error": growth(m)[1] for case, m in moments.items()}
    one_layer = [values for (name, _), values in gradients.items() if name == "1 ReLU layers"]
    worst = max(abs(mean - 1) / error for mean, error, _ in one_layer)
    return numbers | {"one_layer_z": worst, "deep_mean": gradients[f"{depths[-1]} ReLU layers", P][0]}


# initialisation


def second_moments(case: Case, networks: int) -> Tensor:
    """Return the second moment before the first and after each layer, relative to the first, shape (networks, DEPTH + 1)."""
    rows = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in range(networks):
            torch.manual_seed(seed)
            x = torch.randn(BATCH, WIDTH)
            row = [x.square().mean()]
            for _ in range(DEPTH):
                x = case.make().train(case.training)(x)
                row.append(x.square().mean())
            rows.append(torch.stack(row) / row[0])
    return torch.stack(rows).double()


def growth(moments: Tensor) -> tuple[float, float]:
    """Return the growth of the mean over all layers, and the factor of its standard error.

    The mean ratio of a layer is the same whatever comes in, so it is estimated from all layers of all networks. The mean of the
    products themselves is carried by a few networks and would need far more of them.
    """
    ratios = (moments[:, 1:] / moments[:, :-1]).ravel()
    error = float(ratios.std() / ratios.mean()) / len(ratios) ** 0.5
    return float(ratios.mean()) ** DEPTH, math.exp(DEPTH * error)


def spread(moments: Tensor) -> tuple[float, float, float]:
    """Return median, smallest and largest growth of single networks."""
    last = moments[:, -1]
    return float(last.median()), float(last.min()), float(last.max())


# gradients


def layers(depth: int) -> Callable[[float], nn.Sequential]:
    """Return what makes a plain network for a rate."""
    return lambda p: nn.Sequential(*(Layer(Dropout(p), "inverted", 0.0) for _ in range(depth)))


def blocks(depth: int) -> Callable[[float], nn.Sequential]:
    """Return what makes a residual network for a rate."""
    return lambda p: nn.Sequential(*(Block(0.0, depth, p=p) for _ in range(depth)))


def mean_gradient(make: Callable[[float], nn.Sequential], p: float, masks: int) -> tuple[float, float, float]:
    """Compare gradients over masks with that of the weight-scaled pass, in the input of a network with a linear readout.

    Returns:
        The component of the mean gradient along the weight-scaled one, relative to that; its standard error over masks; and the
        second moment of the gradient, relative to that of the weight-scaled one. All are means of four networks.
    """
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(4):
            torch.manual_seed(seed)
            net = make(p)
            readout, x = torch.randn(WIDTH) / WIDTH**0.5, torch.randn(1, WIDTH)
            scaled = input_gradient(net.eval(), x, readout)[0]
            drawn = input_gradient(net.train(), x.expand(masks, -1), readout)
            size = scaled.square().sum()
            component = drawn @ scaled / size
            results.append((component.mean(), component.var() / masks, drawn.square().sum(1).mean() / size))
    component, variance, second = torch.tensor(results).mean(0).tolist()
    return component, (variance / len(results)) ** 0.5, second


def input_gradient(net: nn.Module, x: Tensor, readout: Tensor) -> Tensor:
    """Return the gradient of a linear readout in the input, shape of ``x``."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net(x) @ readout).sum(), x)
    return gradient


# the figure


def draw(moments: dict[Case, Tensor], gradients: dict[tuple[str, float], tuple[float, float, float]]) -> Figure:
    """Second moments over depth for three kinds of networks, and mean gradients over the rate."""
    figure, (*networks, gradient) = gallery.panels(2, 2, (4.5, 3.5))
    for axes, group in zip(networks, (INVERTED, CLASSIC, RESIDUAL), strict=True):
        draw_moments(axes, {case: m for case, m in moments.items() if case.group == group})
        axes.set(title=f"{group.capitalize()}, p = {P}", xlabel="layer", ylabel="second moment / that of the input")
        axes.legend(fontsize=8)
    for name in dict.fromkeys(name for name, _ in gradients):
        points = [(p, mean, 2 * error) for (other, p), (mean, error, _) in gradients.items() if other == name]
        p, height, bar = zip(*points, strict=True)
        gradient.errorbar(
            p, height, bar, fmt="o-", ms=4, capsize=3, label=name.replace("1 ReLU layers", "1 ReLU layer")
        )
    gradient.axhline(1, color="grey", lw=0.8)
    gradient.set(title="Mean gradient over masks, ± 2 s.e.", xlabel="rate p", ylabel="mean / weight-scaled gradient")
    gradient.set_ylim(-0.25, 1.1)
    gradient.legend(fontsize=8, ncols=2, loc="lower left")
    return figure


def draw_moments(axes: Axes, moments: dict[Case, Tensor]) -> None:
    """Show the law, the median network and the range of networks."""
    layers = torch.arange(DEPTH + 1)
    for colour, (case, values) in enumerate(moments.items()):
        low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 0)
        axes.fill_between(layers, low, high, color=f"C{colour}", alpha=0.2, lw=0)
        axes.plot(layers, middle, color=f"C{colour}", label=case.name)
        axes.plot(layers, case.growth ** layers.double(), color=f"C{colour}", ls="--", lw=0.9)
    axes.plot([], [], color="grey", ls="--", lw=0.9, label="expected mean")
    axes.fill_between([], [], [], color="grey", alpha=0.2, label="80 % of networks")
    axes.set_yscale("log")


if __name__ == "__main__":
    gallery.run(main)
