"""The Gaussian posterior of the weights that energies are read from: each function is a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from forcedrop.dropout import normal_noise
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.equations import Equations, refit, solve_equations
from forcedrop.uncertainty.method import Labels, Method

SITE = "readout.shift"
"""Name of the draws' site: what these were called before there was a bank, so that old models keep their draws."""


@dataclass(frozen=True)
class Posterior(Method):
    """Draws from the posterior of the weights, precision H + τ; see ``equations.py``.

    Attributes:
        frames: most training frames that the equations are summed over.
    """

    name = "posterior"

    frames: int = 1000

    def fill(self, potential: EnergyModel, labels: Labels, equations: Equations | None = None) -> dict[str, Any]:
        """Draw the functions about the regression's mean; ``equations`` are the network's, if they are known already."""
        if equations is None:
            equations = solve_equations(potential, labels, frames=self.frames, held=False)
        mean = refit(potential, labels, equations)
        values, vectors = torch.linalg.eigh(equations.precision)
        root = (
            vectors / (values.clamp(min=0) + equations.prior).sqrt()
        ) @ vectors.T  # symmetric: no sign left to chance
        site: Any = potential.correction
        shape = site.weight.shape
        potential.set_functions(mean.reshape(shape), draws(root, self.functions, self.seed).unflatten(1, shape))
        return {"frames": equations.frames, "refit": bool(mean.any())}


def draws(root: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Return n draws R ε about their own mean, shape (n, F), float64, of a covariance R Rᵀ."""
    noise = normal_noise(len(root), seed=seed, samples=n, site=SITE, dtype=torch.float64)
    return (noise - noise.mean(0)) @ root.double().cpu().T
