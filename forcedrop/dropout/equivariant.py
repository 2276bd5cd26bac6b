r"""Dropout of equivariant features: a channel's tensor lives or dies as a whole, and rotations commute.

Three layouts: spherical, the components of many irreducible tensors one after another on the last axis, as e3nn has them
(:class:`IrrepsDropout`); one tensor per channel with its components on trailing axes of their own, Cartesian (…, C,
3, 3) or spherical (…, C, 2l+1) (:class:`TensorDropout`); and spherical ones up to some l with the components first,
((L+1)², rows, C) (:class:`SphericalDropout`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from forcedrop.dropout.checks import LARGEST, check_flag, check_floating, check_integer, check_mask, shown
from forcedrop.dropout.site import DropoutSite, inverted

MOST_COMPONENTS = 2**24
"""Of irreps, what the last axis of an input may hold."""

_TERM = re.compile(r"(?:(\d+)x)?(\d+)([eo]?)")


def _parse_term(term: str) -> tuple[int, int]:
    match = _TERM.fullmatch(term.strip())
    if match is None:
        raise ValueError(f"irreps are written such as '16x0e + 8x1o', got the term {shown(term)}")
    if len(term) > 40:  # more digits than any size has; Python refuses thousands with an error of its own
        raise ValueError(f"`irreps` have more components than the {MOST_COMPONENTS} that are possible: {shown(term)}")
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
    if not isinstance(irreps, str) and not isinstance(irreps, Iterable):
        raise TypeError(f"irreps must be a string or blocks (multiplicity, l), got {shown(irreps)}")
    if isinstance(irreps, str):
        return [_parse_term(term) for term in irreps.split("+")] if irreps.strip() else []
    blocks = []
    for block in irreps:
        if not isinstance(block, list | tuple):
            raise TypeError(f"a block of irreps is (multiplicity, l) or (multiplicity, l, parity), got {shown(block)}")
        if not block:
            raise ValueError("a block of irreps is (multiplicity, l) or (multiplicity, l, parity), got an empty one")
        multiplicity, *irrep = block
        if len(irrep) == 1 and isinstance(irrep[0], tuple):
            degree, _parity = irrep[0]  # an e3nn Irrep is a tuple that refuses to tell its length
            irrep = [degree]
        if len(irrep) not in (1, 2):
            raise ValueError(f"a block of irreps is (multiplicity, l) or (multiplicity, l, parity), got {block!r}")
        if not (isinstance(multiplicity, int) and isinstance(irrep[0], int)):
            raise TypeError(f"multiplicity and l are integers, got {shown(block)}")
        if multiplicity < 0 or irrep[0] < 0:
            raise ValueError(f"multiplicity and l are not negative, got {block!r}")
        blocks.append((multiplicity, irrep[0]))
    return blocks


def _check_tensor_rank(rank: Any, name: str) -> int:
    if check_integer(rank, name) < 0:
        raise ValueError(f"`{name}` must not be negative, got {rank}")
    return check_integer(rank, name, 0, 64)  # torch's tensors have no more axes


class _ChannelSite(DropoutSite):
    """A site with one bit per channel, for every row alike or for each entry of the first axis."""

    settings = DropoutSite.settings | {"shared": check_flag}

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
    fixed = frozenset({"irreps", "channels"})

    def __init__(self, irreps: str | Iterable[Any], p: float = 0.5, *, shared: bool) -> None:
        super().__init__(p, shared=shared)
        self.irreps = parse_irreps(irreps)
        size = sum(multiplicity * (2 * degree + 1) for multiplicity, degree in self.irreps)
        if size > MOST_COMPONENTS:
            raise ValueError(f"`irreps` have {size} components, at most {MOST_COMPONENTS} are possible")
        self.channels = sum(multiplicity for multiplicity, _ in self.irreps)
        multiplicities, degrees = torch.tensor(self.irreps, dtype=torch.int64).reshape(-1, 2).unbind(1)
        widths = torch.repeat_interleave(2 * degrees + 1, multiplicities)
        channel_of = torch.repeat_interleave(torch.arange(self.channels), widths)
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
            return x * check_mask(mask, x)
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

    settings = _ChannelSite.settings | {"rank": _check_tensor_rank}

    def __init__(self, rank: int, p: float = 0.5, *, shared: bool) -> None:
        super().__init__(p, shared=shared)
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
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"rank={self.rank}, p={self.p}, shared={self.shared}"


class SphericalDropout(DropoutSite):
    r"""Inverted dropout of spherical tensors with components first: input ((L+1)², rows, C), each l's 2l+1 after those of l − 1.

    One bit per channel and l, for all rows alike, also in fresh draws; functions by row have a mask each. Scalars may be masked
    about a centre c of each row's kind, such as an atom's element, :math:`x \to x + (m - 1)(x - c)`: about 0 a dropped channel
    would shift all rows of a kind alike, and with them a sum over rows by far more than a mask is meant to.

    Args:
        l_max: L, the highest l.
        channels: C.
        p: the rate, in [0, 1).
        kinds: of rows, each with a centre of its own for its scalars (0 until :meth:`centre_on` finds it); 0 masks about 0.

    Raises:
        ValueError: if ``p`` is not in [0, 1), or ``l_max``, ``channels`` or ``kinds`` is negative.
    """

    fixed = frozenset({"l_max", "channels"})
    degree: Tensor
    centre: Tensor | None

    def __init__(self, l_max: int, channels: int, p: float = 0.5, *, kinds: int = 0) -> None:
        super().__init__(p)
        sizes = (("l_max", l_max), ("channels", channels), ("kinds", kinds))
        l_max, channels, kinds = (check_integer(value, name, high=LARGEST) for name, value in sizes)
        if min(l_max, channels, kinds) < 0:
            raise ValueError(f"`l_max`, `channels` and `kinds` must not be negative, got {l_max}, {channels}, {kinds}")
        if (l_max + 1) ** 2 * max(channels, 1) > LARGEST or kinds * channels > LARGEST:
            raise ValueError(
                f"{l_max}, {channels} and {kinds} are too large: a tensor has at most {LARGEST} components"
            )
        self.l_max, self.channels = l_max, channels
        degree = torch.repeat_interleave(torch.arange(l_max + 1), 2 * torch.arange(l_max + 1) + 1)
        self.register_buffer("degree", degree, persistent=False)
        self.register_buffer("centre", torch.zeros(kinds, channels) if kinds else None)

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape ((L+1)², 1 or rows, C).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it does not have the layer's shape.
        """
        self._check(x)
        degrees = self.l_max + 1
        keep = self.keep(x, (1, degrees * self.channels), generator).unflatten(1, (degrees, self.channels))
        return inverted(keep, self.p, x.dtype).transpose(0, 1).index_select(0, self.degree)

    def forward(
        self,
        x: Tensor,
        kind: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Drop channels of ``x``, shape ((L+1)², rows, C).

        Args:
            x: the input.
            kind: of each row, one-hot, shape (rows, kinds); needed if there are centres.
            mask: to be used as it is.
            generator: for a fresh draw.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it does not have the layer's shape, kinds are missing, or ``mask`` does not fit.
        """
        self._check(x)
        if mask is not None:
            mask = check_mask(mask, x)
        elif self.active:
            mask = self.mask(x, generator)
        else:
            return x
        if self.centre is None:
            return x * mask
        if kind is None:
            raise ValueError("SphericalDropout with centres needs the kind of each row")
        self._check_kind(kind, x)
        if mask.dim() != 3 or mask.shape[0] != x.shape[0]:
            mask = mask.broadcast_to(x.shape)
        scalars = x[:1] + (mask[:1] - 1) * (x[:1] - kind @ self.centre)
        return torch.cat([scalars, x[1:] * mask[1:]])

    def centre_on(self, x: Tensor, kind: Tensor) -> None:
        """Take the mean scalars of each kind's rows as its centre; kinds without rows keep theirs.

        Raises:
            ValueError: if the layer has no centres.
        """
        if self.centre is None:
            raise ValueError("this SphericalDropout has no centres: it was made with kinds=0")
        self._check(x)
        self._check_kind(kind, x)
        count = kind.sum(0)[:, None]
        self.centre.copy_(torch.where(count > 0, kind.T @ x[0] / count.clamp(min=1), self.centre))

    def _check_kind(self, kind: Tensor, x: Tensor) -> None:
        check_floating(kind, "the `kind` of SphericalDropout, one-hot,")
        wanted = (x.shape[1], 0 if self.centre is None else self.centre.shape[0])
        if kind.shape != wanted:
            raise ValueError(f"`kind` must be one-hot, shape {tuple(wanted)}, got {tuple(kind.shape)}")

    def _check(self, x: Tensor) -> None:
        check_floating(x, "SphericalDropout")
        if x.dim() != 3 or x.shape[0] != (self.l_max + 1) ** 2 or x.shape[2] != self.channels:
            wanted = f"({(self.l_max + 1) ** 2}, rows, {self.channels})"
            raise ValueError(f"SphericalDropout needs an input of shape {wanted}, got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        """Say the settings."""
        kinds = 0 if self.centre is None else len(self.centre)
        return f"l_max={self.l_max}, {self.channels}, p={self.p}, kinds={kinds}"


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
    check_floating(x, "irreps_dropout")
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
