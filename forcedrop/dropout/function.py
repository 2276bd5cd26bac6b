"""One function out of an ensemble of subnetworks: every random number of every site, fixed by (seed, sample)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcedrop.dropout.checks import check_integer, shown
from forcedrop.dropout.masks import UNIFORM_BITS, kept, random_bits, row_bits, site_key


@dataclass(frozen=True)
class FunctionSample:
    """Random numbers as pure functions of (seed, sample, site, unit): the same bits in any process, batch or order.

    Attributes:
        seed: the user's seed.
        sample: the sample's index: an int, or an int64 tensor without axes (which ``torch.func.vmap`` may run over); or one of
            shape (n,), a function for each of the n rows of a batch.

    Raises:
        TypeError: if one of them is no integer, or the samples have more than one axis.
    """

    seed: int
    sample: int | Tensor

    def __post_init__(self) -> None:
        check_integer(self.seed, "seed")
        sample = self.sample
        if not isinstance(sample, Tensor):
            check_integer(sample, "sample")
        elif sample.dim() > 1 or sample.is_floating_point() or sample.is_complex() or sample.dtype == torch.bool:
            raise TypeError(f"sample must be an integer, or integers of shape (n,), one a row, got {shown(sample)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionSample:
        """Return itself: it is a value, and the index that ``torch.func.vmap`` runs over cannot be copied."""
        return self

    @property
    def by_row(self) -> bool:
        """Whether every row of a batch has a function of its own."""
        return isinstance(self.sample, Tensor) and self.sample.dim() == 1

    def bits(self, site: str, units: Tensor) -> Tensor:
        """Return uniform integers in [0, 2³¹), one for each identity in ``units`` (int64), and of its shape.

        Where every row has its own function, ``units`` has the n rows on its first axis, or 1 that stands for each of them.

        Raises:
            ValueError: if there is another number of rows.
        """
        sample = torch.as_tensor(self.sample, dtype=torch.int64, device=units.device)
        if not self.by_row:
            return random_bits(site_key(self.seed, site), sample.reshape(1), units.reshape(-1))[0].reshape(units.shape)
        # not `in (1, len(sample))`, which would fix the number of rows for whoever traces this
        if units.dim() == 0 or (units.shape[0] != 1 and units.shape[0] != sample.shape[0]):
            raise ValueError(f"{len(sample)} functions, one a row, do not fit a mask of shape {tuple(units.shape)}")
        return row_bits(site_key(self.seed, site), sample, units)

    def uniform(self, site: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uniform numbers in (0, 1): the centres of 2³¹ equal intervals, so never 0 and never 1 in float64."""
        bits = self.bits(site, _units(shape, device)).to(torch.float64)
        return ((bits + 0.5) * 2.0**-UNIFORM_BITS).to(dtype)

    def keep(self, site: str, p: float, shape: Sequence[int], *, device: torch.device) -> Tensor:
        """Return which units are kept, boolean; each is dropped with probability ``p``.

        Raises:
            ValueError: if ``p`` is not in [0, 1).
        """
        return kept(self.bits(site, _units(shape, device)), p)

    def normal(self, site: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return standard normal numbers, by the inverse of the error function."""
        u = self.uniform(site, shape, dtype=torch.float64, device=device)
        return (math.sqrt(2.0) * torch.erfinv(2 * u - 1)).to(dtype)


def _units(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a number for every entry of a shape."""
    return torch.arange(math.prod(shape), device=device).reshape(tuple(shape))
