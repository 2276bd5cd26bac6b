"""Functions that are trained: masks of the dropout sites within the network, heads that learn, or none at all.

Trained masks are Monte-Carlo dropout as usual (Gal & Ghahramani, ICML 2016, arXiv 1506.02142) with masks that are functions: each
structure of a step takes one of a fixed set, of which inference uses the first. With fewer masks than channels a network finds
weights that no mask can change, and the spread dies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.method import Labels, Method


@dataclass(frozen=True)
class TrainedMasks(Method):
    """The masks that the network was trained with, rates as in the training file's ``dropout``.

    Attributes:
        functions: how many masks are trained.
    """

    name = "masks"
    keeps_masks = True
    learns = True

    functions: int = 256

    def training_functions(self, rates: Sequence[float]) -> int | None:
        """Return the number of masks.

        Raises:
            ValueError: if all rates are 0.
        """
        if not any(rates):
            raise ValueError(
                "`uncertainty.method: masks` needs a rate above 0 in `dropout`: there is nothing to sample"
            )
        return self.functions

    def fill(self, potential: EnergyModel, labels: Labels) -> dict[str, Any]:
        """Leave the network as it is: its masks are its functions."""
        return {}


@dataclass(frozen=True)
class Heads(Method):
    """A shallow ensemble: K sets of weights of the features that learn side by side, each structure of a step with one of them.

    Source: Kellner & Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006 (2024), whose heads minimise a likelihood together.

    Attributes:
        functions: K.
    """

    name = "heads"
    learns = True

    functions: int = 16

    def prepare(self, potential: EnergyModel) -> None:
        """Give the network heads with random weights.

        Raises:
            ValueError: if it has no features.
        """
        site = potential.correction
        if site is None:
            raise ValueError(
                f"`uncertainty.method: heads` needs features, a network of kind {potential.kind!r} has none"
            )
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn((self.functions, *site.weight.shape), generator=generator)
        bank = (0.1 / math.sqrt(potential.n_features) * noise).to(site.weight)
        del site.bank
        site.bank = nn.Parameter(bank)

    def training_functions(self, rates: Sequence[float]) -> int | None:
        """Return the number of heads."""
        return self.functions

    def fill(self, potential: EnergyModel, labels: Labels) -> dict[str, Any]:
        """Take the heads' mean for the plain network, and each head's deviation from it for a function."""
        site: Any = potential.correction
        learned = site.bank.detach()
        del site.bank
        site.register_buffer("bank", learned[:0])
        potential.set_functions(learned.mean(0), learned - learned.mean(0))
        return {}


@dataclass(frozen=True)
class Plain(Method):
    """No functions: a force field without error bars."""

    name = "none"
    gives_error_bars = False

    functions: int = 0

    def fill(self, potential: EnergyModel, labels: Labels) -> dict[str, Any]:
        """Do nothing."""
        return {}
