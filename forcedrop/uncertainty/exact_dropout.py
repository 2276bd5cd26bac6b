r"""Exact dropout: every function drops some of what energies are read from, and reads the rest with weights of its own.

A mask m keeps each of the R·F weights with probability 1 − p; what it keeps is solved for in closed form from the normal
equations (``forcedrop.dropout.exact_weights``): the posterior's mean on condition that the dropped weights are zero. On top a
draw from the posterior given the mask: masks alone fit the energies of one kind of structure all alike, and then say nothing
about those of another. A function is a mask *and* a draw: together they sample the mixture of the posteriors of subnetworks.
The bank is centred about the plain network, whose weights were refitted by regression.

**One rule for p, λ and the ratio of the draw**, whatever the recipe: p = 0.3, λ = 1, ratio 1, unless others give the held-out
frames a higher likelihood, of force components plus energies, by more than twice the standard error of the gain over the
frames (with one, a dozen candidates nearly always hold one that is better by chance). Both likelihoods with one factor for σ,
which the forces fix: energies have to be honest with the same factor.

**Edge dropout at inference** (``cuts`` > 0): that many sets of cut radii of pairs of elements are drawn, the equations are solved
for each, and function k belongs to set k mod ``cuts``. Each set costs a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from forcedrop.dropout import exact_masks, exact_weights, frozen, normal_noise
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.equations import Equations, HeldOut, refit, solve_equations
from forcedrop.uncertainty.method import Labels, Method

RATES = (0.3, 0.1, 0.5)
PRIORS = (1.0, 0.1, 10.0)
RATIOS = (1.0, 0.0, 3.0)
"""What is tried; the first of each is the default."""
SURE = 2.0
"""Standard errors by which another setting must be better than the default."""
NOISE = "exact.draw"
"""Name under which the draws' noise is drawn."""


class Choice(NamedTuple):
    """Settings of the masks.

    Attributes:
        rate: p.
        prior: λ, in units of the precision τ of the readouts' prior.
        draw: ratio of the draw given the mask.
    """

    rate: float
    prior: float
    draw: float


@dataclass(frozen=True)
class ExactDropout(Method):
    """Masks with weights of their own; see the module's page.

    Attributes:
        rate: p; chosen on held-out frames if None.
        prior: λ; chosen if None.
        draw: ratio of the draw; chosen if None.
        frames: most training frames that the equations are summed over.
        cuts: sets of cut radii of edge dropout at inference; 0 for none.
        cut_rate: of a pair of elements to be cut in a set.
    """

    name = "exact_dropout"

    rate: float | None = None
    prior: float | None = None
    draw: float | None = None
    frames: int = 1000
    cuts: int = 0
    cut_rate: float = 0.3

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: naming what is out of range.
        """
        super().__post_init__()
        if self.functions > 512:
            raise ValueError(f"`functions` must be at most 512, got {self.functions}")
        for name in ("rate", "cut_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {value}")
        if self.prior is not None and not self.prior > 0:
            raise ValueError(f"`prior` must be positive, got {self.prior}")
        if self.draw is not None and not self.draw >= 0:
            raise ValueError(f"`draw` must not be negative, got {self.draw}")
        if not 0 <= self.cuts <= self.functions or self.frames < 1:
            raise ValueError(
                f"`cuts` must lie in [0, functions] and `frames` be positive, got {self.cuts}, {self.frames}"
            )

    def fill(self, potential: EnergyModel, labels: Labels, equations: Equations | None = None) -> dict[str, Any]:
        """Choose what is not given, solve for every mask, and say what was chosen.

        ``equations`` are the network's, if they are known already.
        """
        if equations is None:
            chosen = [x is not None for x in (self.rate, self.prior, self.draw)]
            equations = solve_equations(potential, labels, frames=self.frames, held=not all(chosen))
        mean = refit(potential, labels, equations)
        choice = self._choose(equations, mean, quiet=labels.quiet)
        site: Any = potential.correction
        if self.cuts:
            self._fill_cuts(potential, labels, mean, choice)
        else:
            weights = solutions(equations, choice, self.functions, self.seed)
            bank = (weights - weights.mean(0)).unflatten(1, site.weight.shape)
            potential.set_functions(mean.reshape(site.weight.shape), bank)
        return {
            **choice._asdict(), "frames": equations.frames, "refit": bool(mean.any()), "cuts": self.cuts,
            "weights": len(mean), "sets": len(site.weight),
        }  # fmt: skip

    def _choose(self, equations: Equations, mean: Tensor, *, quiet: bool) -> Choice:
        """Return the default, or what held-out frames find better than it, one setting after the other."""
        rates = RATES if self.rate is None else (self.rate,)
        priors = PRIORS if self.prior is None else (self.prior,)
        ratios = RATIOS if self.draw is None else (self.draw,)
        default = Choice(rates[0], priors[0], ratios[0])
        if not len(equations.held.rows) or int(equations.held.frame.max()) < 1:  # one frame decides nothing
            return default
        error = equations.held.residual - equations.held.rows @ mean
        stages = [
            [Choice(rate, priors[0], ratio) for rate in rates for ratio in ratios],
            [Choice(0.0, prior, 0.0) for prior in priors],
        ]
        best, scores = default, self._scores(equations, error, default)
        bar = tqdm(total=sum(map(len, stages)), desc="rate, prior and draw", leave=False, disable=quiet)
        for number, stage in enumerate(stages):
            start = best
            for trial in stage:
                candidate = trial if number == 0 else start._replace(prior=trial.prior)
                bar.update()
                if candidate == best:
                    continue
                own = self._scores(equations, error, candidate)
                gain = scores - own
                if float(gain.mean()) > SURE * float(gain.std() / len(gain) ** 0.5):
                    best, scores = candidate, own
        bar.close()
        return best

    def _scores(self, equations: Equations, error: Tensor, choice: Choice) -> Tensor:
        """Return every held-out frame's negative log-likelihood."""
        weights = solutions(equations, choice, self.functions, self.seed)
        return frame_scores(equations.held, error, weights - weights.mean(0))

    def _fill_cuts(self, potential: EnergyModel, labels: Labels, mean: Tensor, choice: Choice) -> None:
        """Solve the equations once more for each set of cut radii, with the features that it leaves.

        Raises:
            ValueError: if the network has no edge dropout.
        """
        edges, site = potential.edges, potential.correction
        if edges is None or site is None:
            raise ValueError(f"a network of kind {potential.kind!r} has no edge dropout to sample")
        shape = site.weight.shape
        edges.p = self.cut_rate
        with frozen(potential, self.seed, torch.arange(self.cuts, device=potential.device)):
            radii = edges.radii(site.weight)
        edges.bank = radii
        bank = site.weight.new_empty(self.functions, *shape)
        for number in range(self.cuts):
            with frozen(potential, self.seed, number):
                equations = solve_equations(potential, labels, frames=self.frames, held=False)
            own = slice(number, None, self.cuts)
            weights = solutions(equations, choice, self.functions, self.seed, own)
            bank[own] = (weights - equations.weights - mean).unflatten(1, shape).to(bank)
        edges.bank = radii[torch.arange(self.functions) % self.cuts]
        potential.set_functions(mean.reshape(shape), bank)


def solutions(equations: Equations, choice: Choice, n: int, seed: int, only: slice = slice(None)) -> Tensor:
    """Return the weights of n masks, shape (n, R·F), float64, or of some of them ``only``."""
    strength = choice.prior * equations.prior
    precision = equations.precision + strength * torch.eye(len(equations.pull), dtype=torch.float64)
    pull = precision @ equations.weights + equations.pull
    keep = exact_masks(n, len(pull), choice.rate, seed=seed)[only]
    samples = range(n)[only]
    noise = None
    if choice.draw:
        noise = normal_noise(len(pull), seed=seed, samples=samples, site=NOISE, dtype=torch.float64)
    return exact_weights(precision, pull, keep, draw=choice.draw, noise=noise)


def frame_scores(held: HeldOut, error: Tensor, bank: Tensor) -> Tensor:
    """Return the negative log-likelihood of every frame: mean over its force components, plus that of its energy.

    Args:
        held: derivatives of the held-out labels.
        error: of the mean, in units of σ, a row a label.
        bank: deviations of the functions' weights, shape (K, R·F).
    """
    variance = (held.rows @ bank.T).var(dim=1, correction=1).clamp(min=1e-12)
    ruling = ~held.is_energy if bool((~held.is_energy).any()) else held.is_energy
    factor = (error.square() / variance)[ruling].mean()
    score = 0.5 * (error.square() / (factor * variance) + (factor * variance).log())
    n = int(held.frame.max()) + 1
    total = score.new_zeros(n)
    for kind in (held.is_energy, ~held.is_energy):
        count = torch.bincount(held.frame[kind], minlength=n)
        total = total + score.new_zeros(n).index_add(0, held.frame[kind], score[kind]) / count.clamp(min=1)
    return total
