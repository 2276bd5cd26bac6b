r"""Dropout of whole structures: channels, contiguous blocks (DropBlock), and residual branches (drop path)."""

from __future__ import annotations

import math
import operator
from collections import Counter
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from forcedrop.dropout.checks import (
    check_flag,
    check_floating,
    check_integer,
    check_mask,
    check_rank,
    check_rate,
    check_size,
)
from forcedrop.dropout.masks import constant_in_graphs
from forcedrop.dropout.site import DropoutSite, inverted


class ChannelDropout(DropoutSite):
    r"""Drop whole channels (feature maps): one bit per channel and sample, kept ones times 1/(1−p).

    As ``torch.nn.Dropout1d``, ``2d`` and ``3d`` on batches. The first two axes are batch and channels, always: an image
    (C, H, W) without a batch axis must be given one.

    Source: Tompson et al., CVPR 2015, arXiv 1411.4280 ("SpatialDropout").

    Args:
        p: the rate, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, shape (N, C, 1, …), or (1, C, 1, …) of a frozen function; it fits any image size."""
        check_rank(x, (3, 4, 5), "ChannelDropout")
        keep = self.keep(x, (*x.shape[:2], *[1] * (x.dim() - 2)), generator)
        return inverted(keep, self.p, x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop channels of ``x``, shape (N, C, L), (N, C, H, W) or (N, C, D, H, W).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if ``x`` has neither 3, 4 nor 5 axes.
        """
        check_floating(x, "ChannelDropout")
        check_rank(x, (3, 4, 5), "ChannelDropout")
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x


def seed_rate(p: float, block_size: int, sizes: tuple[int, ...], exact: bool = True) -> float:
    r"""Return DropBlock's γ, the rate at which blocks are seeded inside an image.

    Ghiasi et al., equation 1: :math:`\gamma = \frac{p}{b^d} \prod_a \frac{n_a}{n_a - b + 1}`. It counts every block as if none
    overlapped (the paper says so), so that less than p is dropped: 0.256 for p = 0.3, b = 3 on 8 × 8. The exact γ solves
    :math:`1 - p = \langle (1 - \gamma)^{s} \rangle`, the mean over the places of the image, s being the number of seeds whose
    block covers a place (fewer at the border).

    Args:
        p: the rate of dropped units, in [0, 1).
        block_size: b, the edge of a block.
        sizes: n, the image's edges.
        exact: solve for the γ that drops p on average; else equation 1.

    Raises:
        ValueError: if ``p`` is not in [0, 1), ``block_size`` is below 1, or a block does not fit into the image.
    """
    check_rate(p)
    block_size = check_integer(block_size, "block_size")
    if block_size < 1 or block_size > min(sizes):
        raise ValueError(f"`block_size` must lie between 1 and the image's smallest edge, got {block_size} for {sizes}")
    return _exact_seed_rate(p, block_size, sizes) if exact else _first_order_seed_rate(p, block_size, sizes)


def _first_order_seed_rate(p: float, block_size: int, sizes: tuple[int, ...]) -> float:
    for n in sizes:
        p *= n / (block_size * (n - block_size + 1))
    return p


@cache
def _exact_seed_rate(p: float, block_size: int, sizes: tuple[int, ...]) -> float:
    covering = Counter({1: 1})  # number of seeds that cover a place → number of such places
    for n in sizes:
        along = Counter(min(i + 1, n - i, block_size, n - block_size + 1) for i in range(n))
        grown: Counter[int] = Counter()
        for seeds, places in covering.items():
            for more_seeds, more_places in along.items():
                grown[seeds * more_seeds] += places * more_places
        covering = grown
    total = covering.total()
    low, high = 0.0, 1.0  # the kept fraction falls from 1 to 0
    for _ in range(60):
        gamma = (low + high) / 2
        kept = sum(places * (1 - gamma) ** seeds for seeds, places in covering.items()) / total
        low, high = (gamma, high) if kept > 1 - p else (low, gamma)
    return (low + high) / 2


@constant_in_graphs
def _constant_seed_rate(p: tuple[int, int], block_size: int, sizes: tuple[int, ...]) -> float:
    """:func:`seed_rate`, a number to torch.compile.

    The compiler makes a symbol of what changes between calls, and a symbol is no constant: hence the ratio for ``p``, and
    ``operator.index`` at the call.
    """
    return seed_rate(p[0] / p[1], block_size, sizes)


class DropBlock(DropoutSite):
    r"""Drop contiguous blocks. Base of :class:`DropBlock1d`, :class:`DropBlock2d` and :class:`DropBlock3d`.

    Blocks are seeded independently, at the rate of :func:`seed_rate`, wherever a whole block fits, so that the border cuts
    none. The mask of a sample is divided by its own kept fraction: its mean is 1 (0 in the rare case that nothing is left).

    ``p`` may be set between steps, see :class:`~forcedrop.dropout.schedule.LinearSchedule`. (torch.compile compiles anew for
    every rate and image size if ``exact``, once if not.)

    Source: Ghiasi, Lin & Le, NeurIPS 2018, arXiv 1810.12890, algorithm 1.

    Args:
        p: the rate of dropped units, in [0, 1).
        block_size: edge of a block, odd or even; 1 is elementwise dropout.
        per_channel: draw blocks for every channel (what the paper finds better), else the same for all.
        exact: drop p on average; else use the paper's γ, which drops somewhat less.

    Raises:
        ValueError: if ``p`` is not in [0, 1) or ``block_size`` is below 1.
    """

    spatial_axes: ClassVar[int]
    settings = DropoutSite.settings | {"block_size": check_size, "per_channel": check_flag, "exact": check_flag}

    def __init__(self, p: float = 0.1, block_size: int = 7, *, per_channel: bool = True, exact: bool = True) -> None:
        super().__init__(p)
        self.block_size = block_size
        self.per_channel = per_channel
        self.exact = exact

    def _gamma(self, sizes: tuple[int, ...]) -> float:
        if self.exact:
            sizes = tuple(map(operator.index, sizes))
            return _constant_seed_rate(self.p.as_integer_ratio(), self.block_size, sizes)
        return seed_rate(self.p, self.block_size, sizes, exact=False)

    def _seeds(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return where blocks begin (their corners of lowest index), boolean, one place fewer per axis than would fit."""
        sizes = tuple(x.shape[2:])
        gamma = self._gamma(sizes)
        region = [n - self.block_size + 1 for n in sizes]
        channels = x.shape[1] if self.per_channel else 1
        return ~self.keep(x, (x.shape[0], channels, *region), generator, p=gamma)

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, of its shape (with 1 for the batch if frozen, 1 for the channels if they share blocks).

        Raises:
            ValueError: if a block does not fit into the image.
        """
        check_rank(x, (2 + self.spatial_axes,), type(self).__name__)
        dropped = self._seeds(x, generator)
        reach = self.block_size - 1
        dropped = functional.pad(dropped, [reach, reach] * self.spatial_axes)
        for axis in range(2, x.dim()):
            dropped = dropped.unfold(axis, self.block_size, 1).any(-1)
        keep = ~dropped
        axes = list(range(1, x.dim()))
        kept = keep.sum(axes, keepdim=True).clamp(min=1)  # nothing left: the mask is 0, not 0/0
        # counts do not fit into half precision
        fraction = kept.to(torch.promote_types(x.dtype, torch.float32)) / math.prod(keep.shape[1:])
        return (keep / fraction).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop blocks of ``x``, shape (N, C, …) with as many further axes as the class's name says.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if ``x`` has another number of axes, or (in training) a block does not fit into the image.
        """
        name = type(self).__name__
        check_floating(x, name)
        check_rank(x, (2 + self.spatial_axes,), name)
        if mask is not None:
            return x * check_mask(mask, x)
        if self.active:
            return x * self.mask(x, generator)
        if self.training:  # p = 0 is where a schedule starts: an impossible block shall not wait for the second step
            self._gamma(tuple(x.shape[2:]))
        return x

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"p={self.p}, block_size={self.block_size}, per_channel={self.per_channel}, exact={self.exact}"


class DropBlock1d(DropBlock):
    """:class:`DropBlock` on sequences (N, C, L)."""

    spatial_axes = 1


class DropBlock2d(DropBlock):
    """:class:`DropBlock` on images (N, C, H, W)."""

    spatial_axes = 2


class DropBlock3d(DropBlock):
    """:class:`DropBlock` on volumes (N, C, D, H, W)."""

    spatial_axes = 3


class DropPath(DropoutSite):
    r"""Stochastic depth: drop a residual branch for a whole sample, :math:`x + \mathrm{path}(f(x))`; kept ones times 1/(1−p).

    The paper scales in evaluation, by 1−p; here training scales, by 1/(1−p), and evaluation is the identity. In a frozen
    function sample the branch is there for every entry of the batch, or for none. The paper's rates for block l of L are
    ``forcedrop.dropout.schedule.linear_rate(l, L, p)`` (equation 4).

    Source: Huang et al., ECCV 2016, arXiv 1603.09382.

    Args:
        p: the rate at which a sample loses the branch, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, shape (N, 1, …), or (1, 1, …) of a frozen function."""
        keep = self.keep(x, (x.shape[0], 1), generator)
        return inverted(keep, self.p, x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop samples of the branch ``x``, shape (N, …).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if ``x`` has no axes.
        """
        check_floating(x, "DropPath")
        if x.dim() == 0:
            raise ValueError("DropPath needs an input with a batch axis, got a scalar")
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x


def channel_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`ChannelDropout`."""
    return ChannelDropout(p).train(training)(x, mask, generator)


def drop_block(
    x: Tensor,
    p: float = 0.1,
    block_size: int = 7,
    training: bool = True,
    *,
    per_channel: bool = True,
    exact: bool = True,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`DropBlock`, 1-, 2- or 3-d as the input, which has 3, 4 or 5 axes."""
    check_floating(x, "drop_block")
    check_rank(x, (3, 4, 5), "drop_block")
    layer = (DropBlock1d, DropBlock2d, DropBlock3d)[x.dim() - 3]
    return layer(p, block_size, per_channel=per_channel, exact=exact).train(training)(x, mask, generator)


def drop_path(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`DropPath`."""
    return DropPath(p).train(training)(x, mask, generator)
