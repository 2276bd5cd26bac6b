r"""Dropout of equivariant features: a channel's tensor lives or dies as a whole, and rotations commute.

Two layouts: spherical, the components of many irreducible tensors one after another on the last axis, as e3nn has them
(:class:`IrrepsDropout`); and one tensor per channel with its components on trailing axes of their own, Cartesian (…, C,
3, 3) or spherical (…, C, 2l+1) (:class:`TensorDropout`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from forcedrop.dropout.site import DropoutSite, check_floating, inverted

_TERM = re.compile(r"(?:(\d+)x)?(\d+)([eo]?)")


def _parse_term(term: str) -> tuple[int, int]:
    match = _TERM.fullmatch(term.strip())
    if match is None:
        raise ValueError(f"irreps are written such as '16x0e + 8x1o', got the term {term!r}")
    return int(match[1] or 1), int(match[2])


def parse_irreps(irreps: str | Iterable[Any]) -> list[tuple[int, int]]:
    """Return the (multiplicity, l) of each block of irreducible tensors, in order. Parity is read and not needed.

    Args:
        irreps: a string such as ``"16x0e + 8x1o"``; or pairs (multiplicity, l), triples (multiplicity, l, parity), or
            pairs (multiplicity, (l, parity)), which is what an ``e3nn.o3.Irreps`` holds.

    Raises:
        ValueError: if a block is written otherwise, or a multiplicity or an l is negative.
        TypeError: if a block is neither a tuple nor a list, or a multiplicity or an l is not an integer.
    """
    if isinstance(irreps, str):
        return [_parse_term(term) for term in irreps.split("+")] if irreps.strip() else []
    blocks = []
    for block in irreps:
        if not isinstance(block, list | tuple):
            raise TypeError(f"a block of irreps is (multiplicity, l) or (multiplicity, l, parity), got {block!r}")
        multiplicity, *irrep = block
        if len(irrep) == 1 and isinstance(irrep[0], tuple):
            degree, _parity = irrep[0]  # an e3nn Irrep is a tuple that refuses to tell its length
            irrep = [degree]
        if len(irrep) not in (1, 2):
            raise ValueError(f"a block of irreps is (multiplicity, l) or (multiplicity, l, parity), got {block!r}")
        if not (isinstance(multiplicity, int) and isinstance(irrep[0], int)):
            raise TypeError(f"multiplicity and l are integers, got {block!r}")
        if multiplicity < 0 or irrep[0] < 0:
            raise ValueError(f"multiplicity and l are not negative, got {block!r}")
        blocks.append((multiplicity, irrep[0]))
    return blocks


class _ChannelSite(DropoutSite):
    """A site with one bit per channel, for every row alike or for each entry of the first axis."""

    def __init__(self, p: float, *, shared: bool) -> None:
        super().__init__(p)
        self.shared = shared

    def keep_channels(self, x: Tensor, channels: int, generator: torch.Generator | None) -> Tensor:
        """Return which channels are kept, boolean, shape (1, C), or (rows, C) for fresh draws that are not shared."""
        return self.keep(x, (1 if self.shared else x.shape[0], channels), generator)


class IrrepsDropout(_ChannelSite):
    r"""Inverted dropout of whole irreducible tensors: input (rows, …, dim), dim = Σ multiplicity·(2l+1).

    The mask is constant over the 2l+1 components of a channel, so :math:`m \odot D(R)x = D(R)(m \odot x)` for every
    rotation and inversion, with the same mask on both sides. Scalars are dropped as well.

    Source: the layer of this name in e3nn, Geiger & Smidt, arXiv 2207.09453; shared bits make each mask one equivariant
    and permutation-invariant function of a structure, whatever its size.

    Args:
        irreps: what is on the last axis, see :func:`parse_irreps`.
        p: the rate, in [0, 1).
        shared: one bit per channel for every row (atom) alike, or, if false, one per channel and entry of the first axis,
            as ``e3nn.nn.Dropout`` does. A frozen function sample has one bit per channel in either case.

    Raises:
        ValueError: if ``p`` is not in [0, 1), or the irreps cannot be read.
    """

    channel_of: Tensor

    def __init__(self, irreps: str | Iterable[Any], p: float = 0.5, *, shared: bool) -> None:
        super().__init__(p, shared=shared)
        self.irreps = parse_irreps(irreps)
        widths = [2 * degree + 1 for multiplicity, degree in self.irreps for _ in range(multiplicity)]
        self.channels = len(widths)
        channel_of = torch.repeat_interleave(torch.arange(self.channels), torch.tensor(widths, dtype=torch.int64))
        self.register_buffer("channel_of", channel_of, persistent=False)

    def _check(self, x: Tensor) -> None:
        check_floating(x, "IrrepsDropout")
        dim = self.channel_of.shape[0]
        if x.dim() < 2 or x.shape[-1] != dim:
            raise ValueError(f"IrrepsDropout needs an input of shape (rows, …, {dim}), got {tuple(x.shape)}")

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape (1 or rows, 1, …, dim) with as many axes as ``x``.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if its last axis does not hold the irreps, or it has no axis of rows.
        """
        self._check(x)
        channels = inverted(self.keep_channels(x, self.channels, generator), self.p, x.dtype)
        mask = channels.index_select(1, self.channel_of)
        return mask.reshape(mask.shape[0], *[1] * (x.dim() - 2), mask.shape[1])

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop channels of ``x``, shape (rows, …, dim).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if its last axis does not hold the irreps, or it has no axis of rows.
        """
        self._check(x)
        if mask is not None:
            return x * mask
        return x * self.mask(x, generator) if self.active else x

    def extra_repr(self) -> str:
        """Say the settings."""
        irreps = " + ".join(f"{multiplicity}x{degree}" for multiplicity, degree in self.irreps)
        return f"{irreps}, p={self.p}, shared={self.shared}"


class TensorDropout(_ChannelSite):
    r"""Inverted dropout of whole tensors, one per channel: input (rows, …, C, d_1, …, d_rank).

    The mask is constant over the trailing ``rank`` axes, so it commutes with every linear map of the components:
    rotations of Cartesian tensors, (atoms, C, 3, 3) with rank 2; Wigner matrices of spherical ones, (atoms, C, 2l+1) with
    rank 1. Rank 0 are scalar channels (rows, …, C). For Cartesian networks see Simeon & De Fabritiis, NeurIPS 2023
    (arXiv 2306.06482).

    Args:
        rank: number of axes of one channel's tensor.
        p: the rate, in [0, 1).
        shared: one bit per channel for every row (atom) alike, or, if false, one per channel and entry of the first axis.
            A frozen function sample has one bit per channel in either case.

    Raises:
        ValueError: if ``p`` is not in [0, 1), or ``rank`` is negative.
    """

    def __init__(self, rank: int, p: float = 0.5, *, shared: bool) -> None:
        super().__init__(p, shared=shared)
        if rank < 0:
            raise ValueError(f"`rank` must not be negative, got {rank}")
        self.rank = rank

    def _check(self, x: Tensor) -> None:
        check_floating(x, "TensorDropout")
        if x.dim() < self.rank + 2:
            raise ValueError(
                f"TensorDropout of rank {self.rank} needs an input of at least {self.rank + 2} axes "
                f"(rows, …, channels and {self.rank} of the tensor), got shape {tuple(x.shape)}"
            )

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape (1 or rows, 1, …, C, 1, …) with as many axes as ``x``.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it has too few axes.
        """
        self._check(x)
        mask = inverted(self.keep_channels(x, x.shape[-1 - self.rank], generator), self.p, x.dtype)
        return mask.reshape(mask.shape[0], *[1] * (x.dim() - 2 - self.rank), mask.shape[1], *[1] * self.rank)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop channels of ``x``, shape (rows, …, C, d_1, …, d_rank).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it has too few axes.
        """
        self._check(x)
        if mask is not None:
            return x * mask
        return x * self.mask(x, generator) if self.active else x

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"rank={self.rank}, p={self.p}, shared={self.shared}"


def irreps_dropout(
    x: Tensor,
    irreps: str | Iterable[Any],
    p: float = 0.5,
    training: bool = True,
    *,
    shared: bool,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`IrrepsDropout`."""
    return IrrepsDropout(irreps, p, shared=shared).to(x.device).train(training)(x, mask, generator)


def tensor_dropout(
    x: Tensor,
    rank: int,
    p: float = 0.5,
    training: bool = True,
    *,
    shared: bool,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`TensorDropout`."""
    return TensorDropout(rank, p, shared=shared).train(training)(x, mask, generator)
