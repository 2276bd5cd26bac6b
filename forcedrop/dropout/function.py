"""One function out of an ensemble of subnetworks: every random number of every site, fixed by (seed, sample)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forcedrop.dropout.masks import UNIFORM_BITS, kept, random_bits, site_key


@dataclass(frozen=True)
class FunctionSample:
    """Random numbers as pure functions of (seed, sample, site, unit): the same bits in any process, batch or order.

    Attributes:
        seed: the user's seed.
        sample: the sample's index; an int, or an int64 tensor without axes (which ``torch.func.vmap`` may run over).
    """

    seed: int
    sample: int | Tensor

    def bits(self, site: str, units: Tensor) -> Tensor:
        """Return uniform integers in [0, 2³¹), of the shape of ``units`` (int64), one for each identity in it."""
        sample = torch.as_tensor(self.sample, dtype=torch.int64, device=units.device)
        return random_bits(site_key(self.seed, site), sample.reshape(1), units.reshape(-1))[0].reshape(units.shape)

    def uniform(self, site: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uniform numbers in (0, 1): the centres of 2³¹ equal intervals, so never 0 and never 1 in float64."""
        units = torch.arange(math.prod(shape), device=device)
        bits = self.bits(site, units).to(torch.float64)
        return ((bits + 0.5) * 2.0**-UNIFORM_BITS).to(dtype).reshape(tuple(shape))

    def keep(self, site: str, p: float, shape: Sequence[int], *, device: torch.device) -> Tensor:
        """Return which units are kept, boolean; each is dropped with probability ``p``.

        Raises:
            ValueError: if ``p`` is not in [0, 1).
        """
        units = torch.arange(math.prod(shape), device=device)
        return kept(self.bits(site, units), p).reshape(tuple(shape))

    def normal(self, site: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return standard normal numbers, by the inverse of the error function."""
        u = self.uniform(site, shape, dtype=torch.float64, device=device)
        return (math.sqrt(2.0) * torch.erfinv(2 * u - 1)).to(dtype)
