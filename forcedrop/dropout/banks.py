r"""Masksembles: a small bank of fixed masks with controlled overlap, from one network (s = 1) to n.

n binary masks over C features keep m features each; every feature is kept by at least one. The scale s sets the overlap:
s = 1 keeps everything in every mask, large s gives n disjoint masks: an ensemble of thin networks that share an optimiser.

Source: Durasov, Bagautdinov, Baque & Fua, "Masksembles for uncertainty estimation", CVPR 2021 (arXiv 2012.08334).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from forcedrop.dropout.checks import (
    check_flag,
    check_floating,
    check_generator,
    check_integer,
    check_mask,
    check_number,
    check_rate,
    check_tensor,
)
from forcedrop.dropout.masks import random_bits, site_key
from forcedrop.dropout.site import DropoutSite

_MOST_BITS = 2**20
"""Of a bank: they are drawn in Python, a second for the most."""

_DISJOINT = 1e6
"""A scale from which masks are as disjoint as they can be."""


def _covered(m: int, positions: int, n: int) -> float:
    """Return the expected number of positions that n random sets of m cover."""
    return positions * (1 - (1 - m / positions) ** n)


def _sizes(features: int, n: int, scale: float) -> tuple[int, int]:
    """Return the number m of features a mask keeps, and of positions to draw them from to cover about ``features``."""
    # far from 1, 1 − 1/scale is soon 1
    m = round(features / (scale * (1 - (1 - 1 / scale) ** n) if scale < _DISJOINT else n))
    m = min(max(m, -(-features // n)), features)
    # disjoint masks want infinitely many positions; from (nm)² on, most draws are disjoint
    low, high = features, max(features, (n * m) ** 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _covered(m, middle, n) >= features else (middle + 1, high)
    return m, min((low, max(low - 1, features)), key=lambda t: abs(_covered(m, t, n) - features))


def _random_subset(m: int, positions: int, numbers: Iterable[int]) -> list[int]:
    """Return m different positions, each set equally likely: a Fisher–Yates shuffle that stores only what it touched."""
    moved: dict[int, int] = {}
    chosen = []
    for i, number in zip(range(m), numbers, strict=True):
        j = i + number % (positions - i)
        chosen.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return chosen


def masksembles_masks(features: int, n: int = 4, scale: float = 2.0, *, seed: int = 0) -> Tensor:
    r"""Return n masks over C features that keep m each and together all, boolean, shape (n, C).

    m is the integer nearest to :math:`C / \big(s\,(1 - (1-1/s)^n)\big)`, at least C/n. The intersection over union of two
    masks is about 1/(2s−1). As the authors do, n sets of m positions are drawn from about m·s, until exactly C positions
    are in use; the rest are struck out. A pure function of its arguments, the same bits everywhere.

    Args:
        features: C, at least 1.
        n: number of masks, at least 1.
        scale: s, at least 1.
        seed: another one gives other masks.

    Raises:
        TypeError: if ``features`` or ``n`` is no integer, or ``scale`` no number.
        ValueError: if ``features`` or ``n`` is less than 1, n·C over a million, or ``scale`` less than 1 or infinite.
    """
    features, n = check_integer(features, "features"), check_integer(n, "n")
    scale = check_number(scale, "scale")
    if features < 1 or n < 1:
        raise ValueError(f"`features` and `n` must be at least 1, got {features} and {n}")
    if not 1.0 <= scale < float("inf"):
        raise ValueError(f"`scale` must be finite and at least 1, got {scale}")
    if n * features > _MOST_BITS:
        raise ValueError(
            f"a bank of {n} masks of {features} features is too large: at most {_MOST_BITS} bits are possible"
        )
    m, positions = _sizes(features, n, scale)
    key = site_key(seed, "masksembles")
    for attempt in itertools.count():
        high, low = random_bits(key, torch.tensor([2 * attempt, 2 * attempt + 1]), torch.arange(n * m))
        numbers = ((high << 31) | low).reshape(n, m).tolist()
        subsets = [_random_subset(m, positions, row) for row in numbers]
        used = sorted(set().union(*subsets))
        if len(used) == features:
            break
    column = {position: i for i, position in enumerate(used)}
    masks = torch.zeros(n, features, dtype=torch.bool)
    for row, subset in zip(masks, subsets, strict=True):
        row[[column[position] for position in subset]] = True
    return masks


def overlap(masks: Tensor) -> Tensor:
    """Return the intersection over union of every two masks, shape (n, n), for masks (n, C) whose kept units are not 0.

    Raises:
        TypeError: if ``masks`` is no tensor.
        ValueError: if it does not have two axes, or a mask keeps nothing.
    """
    _check_masks(masks)
    if not bool((masks != 0).any(1).all()):
        raise ValueError("`masks` must keep something each, got one that keeps nothing")
    kept = (masks != 0).to(torch.float64)
    both = kept @ kept.T
    sizes = kept.sum(1)
    return both / (sizes[:, None] + sizes[None, :] - both)


def normalised(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return masks (n, C) of kept units with the mean 1 over the n for every feature that any of them keeps."""
    kept = (masks != 0).to(dtype)
    share = kept.mean(0)
    return kept / torch.where(share == 0, 1, share)


def _check_masks(masks: Tensor) -> None:
    check_tensor(masks, "masks")
    if masks.dim() != 2:
        raise ValueError(f"`masks` must have shape (n, C), got {tuple(masks.shape)}")


def _check_dim(dim: Any, name: str = "dim") -> int:
    if check_integer(dim, name) == 0:
        raise ValueError("`dim` is the features' axis, got 0, which is the batch")
    return int(dim)


def _check_features(x: Tensor, features: int, dim: int) -> None:
    check_floating(x, "dropout from a bank of masks")
    if x.dim() < 2 or not -x.dim() < dim < x.dim() or x.shape[dim] != features:
        raise ValueError(
            f"dropout from a bank of masks needs {features} features on axis {dim} and the batch on axis 0, "
            f"got shape {tuple(x.shape)}"
        )


def _along(rows: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return ``rows`` (batch or 1, C) with as many axes as ``x``, to multiply it."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = rows.shape
    return rows.reshape(shape)


def _share(bank: Tensor) -> float:
    """Return the share of features that a mask of a bank drops."""
    return 1.0 - int(bank[0].sum()) / bank.shape[1]


class MaskBankDropout(DropoutSite):
    r"""Dropout from a bank of n fixed masks (Masksembles).

    In training each entry of the batch takes one mask, drawn at random, or, with ``chunks``, by its place: the batch is
    cut into n consecutive parts (the authors' code). Function sample k is mask k modulo n, so n samples are the whole
    ensemble; the sample's seed does not matter. In evaluation otherwise the identity.

    Masks are divided by the share of the bank that keeps the feature, so their mean over the bank is exactly 1 for every
    feature. (The authors do not rescale.) The bank is a buffer, saved with the model. ``p`` is the share of features a
    mask drops.

    Source: Durasov et al., CVPR 2021 (arXiv 2012.08334); see :func:`masksembles_masks`.

    Args:
        features: size of the features' axis.
        n: number of masks.
        scale: overlap setting s ≥ 1; two masks have an intersection over union of about 1/(2s−1).
        seed: of the bank. Layers of equal size want different seeds, unless they are to share masks.
        dim: the features' axis of the input; the batch is axis 0.
        chunks: assign masks by place in the batch.

    Raises:
        ValueError: if ``features`` or ``n`` is less than 1, ``scale`` is less than 1 or infinite, or ``dim`` is 0.
    """

    bank: Tensor
    settings = DropoutSite.settings | {"dim": _check_dim, "chunks": check_flag}
    fixed = frozenset({"scale"})

    def __init__(
        self, features: int, n: int = 4, scale: float = 2.0, *, seed: int = 0, dim: int = 1, chunks: bool = False
    ) -> None:
        bank = masksembles_masks(features, n, scale, seed=seed)
        super().__init__(_share(bank))
        self.register_buffer("bank", bank)
        self.scale = float(scale)
        self.dim = dim
        self.chunks = chunks

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "p" and "bank" in self._buffers:
            share = _share(self.bank)
            if check_rate(value) not in (0.0, share):
                raise ValueError(f"`p` of MaskBankDropout is that of its bank, {share:.4g}, or 0 for none, got {value}")
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the rate of the bank that is loaded."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}bank" in state_dict and not self.bank.is_meta:
            self.p = _share(self.bank)

    def choice(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the number of the mask for each entry of a batch, shape (batch,), or (1,) for a frozen function.

        Raises:
            ValueError: if masks go by place and the batch has fewer entries than the bank has masks: some would never
                train.
        """
        n, device = self.bank.shape[0], self.bank.device
        if self._function is not None:
            return torch.as_tensor(self._function.sample, dtype=torch.int64, device=device).reshape(-1) % n
        check_generator(generator)
        if not self.chunks:
            return torch.randint(n, (batch,), generator=generator, device=device)
        if batch < n:
            raise ValueError(f"a batch cut into parts for {n} masks needs as many entries, got {batch}")
        return torch.arange(batch, device=device) * n // batch

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mask of each entry, shape (batch or 1, 1, …, C, 1, …) with as many axes as ``x``.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it lacks the features' axis, or its batch is too small to be cut (see :meth:`choice`).
        """
        _check_features(x, self.bank.shape[1], self.dim)
        rows = normalised(self.bank, x.dtype).index_select(0, self.choice(x.shape[0], generator))
        return _along(rows, x, self.dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop features of ``x``, shape (batch, …) with the features on axis ``dim``.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it lacks the features' axis, or its batch is too small to be cut (see :meth:`choice`).
        """
        _check_features(x, self.bank.shape[1], self.dim)
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x

    def extra_repr(self) -> str:
        """Say the settings."""
        n, features = self.bank.shape
        return f"{features}, n={n}, scale={self.scale}, p={self.p:.4g}, dim={self.dim}, chunks={self.chunks}"


def mask_bank_dropout(
    x: Tensor,
    masks: Tensor,
    training: bool = True,
    *,
    dim: int = 1,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`MaskBankDropout`: each entry of the batch takes one of ``masks``, shape (n, C), at random.

    Masks hold 0 for dropped features, anything else for kept ones, and are normalised here.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: if ``masks`` does not have two axes, ``x`` lacks the features' axis, or ``dim`` is 0.
    """
    _check_masks(masks)
    if not len(masks):
        raise ValueError("`masks` must have shape (n, C) with n of 1 or more, got none")
    _check_features(x, masks.shape[1], _check_dim(dim))
    if mask is not None:
        return x * check_mask(mask, x)
    if not training:
        return x
    check_generator(generator)
    chosen = torch.randint(masks.shape[0], (x.shape[0],), generator=generator, device=x.device)
    return x * _along(normalised(masks, x.dtype).index_select(0, chosen), x, dim)
