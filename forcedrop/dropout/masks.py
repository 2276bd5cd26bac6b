r"""Masks as pure functions of (seed, sample index, site name): no generator, no state, the same bits everywhere.

A counter-based generator: the 64-bit finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014, doi:10.1145/2660193.2660195)
hashes (seed and site) → key, then key, sample and unit → 64 bits, in integer arithmetic that is the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from forcedrop.dropout.checks import LARGEST, check_dtype, check_integer, check_integers, check_rate, shown

P = ParamSpec("P")
R = TypeVar("R")
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
UNIFORM_BITS = 31
"""How many random bits decide over a unit."""


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Have ``torch.compile`` call the function while it traces, instead of tracing into it.

    What ``torch.compiler.assume_constant_result`` does, without its import of the whole compiler (two seconds).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def site_key(seed: int, site: str) -> int:
    """Return the signed 64-bit key of a dropout site, from the user's seed, any integer, and the site's name.

    Raises:
        TypeError: if ``seed`` is no integer, or ``site`` no string.
    """
    if type(seed) is not int:
        seed = check_integer(seed, "seed")
    if not isinstance(site, str):
        raise TypeError(f"site must be a string, got {shown(site)}")
    digest = hashlib.sha256(f"{seed}/{site}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values with SplitMix64's finaliser (a bijection of 64-bit integers)."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def random_bits(key: int, samples: Tensor, units: Tensor) -> Tensor:
    r"""Return uniform integers in [0, 2³¹), shape (K, n), for samples (K,) and units (n,), both int64."""
    per_sample = mix(mix(samples) ^ key)
    return _shift_right(mix(per_sample[:, None] ^ mix(units)[None, :]), 64 - UNIFORM_BITS)


def row_bits(key: int, samples: Tensor, units: Tensor) -> Tensor:
    r"""Return uniform integers in [0, 2³¹) where row i belongs to sample i: shape (n, …), for samples (n,) and units (1 or n, …).

    Row i is that of :func:`random_bits` for sample i.
    """
    per_row = mix(mix(samples) ^ key).reshape(-1, *[1] * (units.dim() - 1))
    return _shift_right(mix(per_row ^ mix(units)), 64 - UNIFORM_BITS)


def kept(bits: Tensor, p: float) -> Tensor:
    """Turn uniform integers into which units are kept, boolean; each is dropped with probability ``p``.

    Raises:
        ValueError: if ``p`` is not in [0, 1).
    """
    return bits >= round(check_rate(p) * (1 << UNIFORM_BITS))


def keep_mask(bits: Tensor, p: float, dtype: torch.dtype | None = None) -> Tensor:
    """Turn uniform integers into an inverted-dropout mask of 0 (probability ``p``) or 1/(1−p).

    Raises:
        ValueError: if ``p`` is not in [0, 1).
    """
    return kept(bits, p).to(dtype or torch.get_default_dtype()) / (1.0 - p)


def _sample_tensor(samples: int | Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    """Return sample indices, shape (K,).

    Raises:
        TypeError: if they are no integers.
        ValueError: if their number is negative.
    """
    if isinstance(samples, Tensor) and samples.dim():
        check_integers(samples, (None,), "samples")
        return samples.to(device, torch.int64)
    if isinstance(samples, Sequence) and not isinstance(samples, str | bytes):
        return torch.tensor([check_integer(k, "samples") for k in samples], dtype=torch.int64, device=device)
    return torch.arange(check_integer(samples, "samples", 0, LARGEST), device=device)


def check_table(n: int, units: int, what: str) -> None:
    """Refuse masks of more entries than a machine could want.

    Raises:
        ValueError: naming both numbers.
    """
    if n * units > LARGEST:
        raise ValueError(f"{what} of {n} times {units} entries are too large: at most {LARGEST} in all")


def feature_mask(
    p: float,
    n: int,
    *,
    seed: int,
    samples: int | Sequence[int] | Tensor,
    site: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the masks of ``n`` channels, shape (K, n): one bit per channel, 0 or 1/(1−p).

    Args:
        p: the dropout rate, in [0, 1).
        n: number of channels.
        seed: the user's seed.
        samples: K (meaning samples 0 … K−1), or the sample indices themselves.
        site: the site's name; masks of different sites are independent.
        dtype: of the result, torch's default if not given.
        device: of the result.

    Raises:
        TypeError: if ``p`` is no number, or an index is no integer.
        ValueError: if ``p`` is not in [0, 1), or ``n`` or K is negative.
    """
    check_rate(p)
    check_dtype(dtype)
    n, k = check_integer(n, "n", 0, LARGEST), _sample_tensor(samples, device)
    check_table(len(k), n, "masks")
    units = torch.arange(n, device=k.device)
    return keep_mask(random_bits(site_key(seed, site), k, units), p, dtype)


def normal_noise(
    n: int,
    *,
    seed: int,
    samples: int | Sequence[int] | Tensor,
    site: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return independent standard normal numbers, shape (K, n), as pure functions of (seed, sample, site) like masks.

    By inversion of the normal distribution in float64 on the CPU, so that every device gets the same bits; arguments as in
    :func:`feature_mask`.

    Raises:
        TypeError: if an index is no integer.
        ValueError: if ``n`` or K is negative.
    """
    check_dtype(dtype)
    n, k = check_integer(n, "n", 0, LARGEST), _sample_tensor(samples, "cpu")
    check_table(len(k), n, "numbers")
    bits = random_bits(site_key(seed, site), k, torch.arange(n))
    uniform = (bits.double() + 0.5) / (1 << UNIFORM_BITS)
    return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).to(device, dtype or torch.get_default_dtype())


def edge_identity(edge_index: Tensor, edge_shift: Tensor | None = None) -> Tensor:
    """Return an int64 identity per edge, shape (E,), equal for (i, j, S) and (j, i, −S) and for nothing else.

    It depends on the pair alone, not on the place of the edge in the list, so it survives a rebuilt neighbour list.
    ("For nothing else" up to a 64-bit hash.)

    Args:
        edge_index: shape (2, E), int64.
        edge_shift: the integer cell shift S of the second atom relative to the first, shape (E, 3); zero if not given.

    Raises:
        TypeError: if a tensor does not hold integers.
        ValueError: if one has a wrong shape.
    """
    check_integers(edge_index, (2, None), "`edge_index`")
    if edge_shift is not None:
        check_integers(edge_shift, (edge_index.shape[1], 3), "`edge_shift`")
    edge_index = edge_index.to(torch.int64)
    i, j = edge_index[0], edge_index[1]
    if edge_shift is None:
        edge_shift = torch.zeros(i.shape[0], 3, dtype=torch.int64, device=i.device)
    shift = edge_shift.to(torch.int64)
    sx, sy, sz = shift.unbind(1)
    first_sign = torch.where(sx != 0, sx, torch.where(sy != 0, sy, sz)).sign()
    flip = (i > j) | ((i == j) & (first_sign < 0))
    lo, hi = torch.where(flip, j, i), torch.where(flip, i, j)
    shift = torch.where(flip[:, None], -shift, shift)
    identity = mix(lo)
    for part in (hi, shift[:, 0], shift[:, 1], shift[:, 2]):
        identity = mix(identity ^ part)
    return identity


def edge_mask(
    p: float,
    edge_index: Tensor,
    edge_shift: Tensor | None = None,
    *,
    seed: int,
    samples: int | Sequence[int] | Tensor,
    site: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the masks of edges, shape (K, E): one bit per undirected pair, 0 or 1/(1−p).

    Both directions of a pair share their bit, a self-image pair counts once, and the bit survives a rebuilt list.

    Raises:
        TypeError: if ``p`` is no number, or an index or a tensor does not hold integers.
        ValueError: if ``p`` is not in [0, 1), K is negative, or a tensor has a wrong shape.
    """
    check_rate(p)
    check_dtype(dtype)
    identity = edge_identity(edge_index, edge_shift)
    k = _sample_tensor(samples, identity.device)
    check_table(len(k), len(identity), "masks")
    bits = random_bits(site_key(seed, site), k, identity)
    return keep_mask(bits, p, dtype)
