r"""Dropout in attention: on the weights (with or without renormalisation), or on the features of the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from forcedrop.dropout.checks import (
    check_flag,
    check_floating,
    check_mask,
    check_number,
    check_rate,
    check_real,
    check_tensor,
    shown,
)
from forcedrop.dropout.masks import keep_mask
from forcedrop.dropout.site import DropoutSite, inverted

_POSITION_BITS = 21  # three numbers below 2²¹ share one 63-bit identity


class AttentionDropout(DropoutSite):
    r"""Drop attention weights, after the softmax: :math:`w \cdot m / (1-p)`, or renormalised, :math:`w m / \sum_j w_j m_j`.

    Without renormalisation as in the Transformer and in ``scaled_dot_product_attention``: rows sum to 1 on average only. With it
    every row sums to 1, which is the softmax over the kept keys; a row that has lost all its keys is 0, as PyTorch has it for
    rows without a key. The mean over masks is then no longer exactly w.

    In a frozen function sample the bit of a weight belongs to (head, query position, key position): a longer sequence keeps the
    bits of its beginning. The first axis is the batch if there are three or more; all axes between it and the last two are heads.

    Source: Vaswani et al., NIPS 2017, arXiv 1706.03762; renormalised: Zehui et al., arXiv 1907.11065 ("DropAttention").

    Args:
        p: the rate, in [0, 1).
        renormalise: divide by the row's sum in place of 1−p.
    """

    settings = DropoutSite.settings | {"renormalise": check_flag}

    def __init__(self, p: float = 0.1, *, renormalise: bool = False) -> None:
        super().__init__(p)
        self.renormalise = renormalise

    def mask(self, weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``weights`` (…, L, S), of values 0 and 1/(1−p); of their shape, or with 1 for the batch if frozen.

        With ``renormalise``, ``mask > 0`` may also be handed to ``scaled_dot_product_attention`` as its ``attn_mask``.

        Raises:
            ValueError: if ``weights`` have fewer than two axes.
        """
        if weights.dim() < 2:
            raise ValueError(f"AttentionDropout needs weights of shape (…, L, S), got {tuple(weights.shape)}")
        if self._function is None:
            return inverted(self.keep(weights, weights.shape, generator), self.p, weights.dtype)
        *heads, n_queries, n_keys = weights.shape[1:] if weights.dim() > 2 else weights.shape
        head = torch.arange(math.prod(heads), device=weights.device)[:, None, None]
        query = torch.arange(n_queries, device=weights.device)[:, None]
        key = torch.arange(n_keys, device=weights.device)
        units = (head << 2 * _POSITION_BITS) | (query << _POSITION_BITS) | key
        shape = ([1] if weights.dim() > 2 else []) + [*heads, n_queries, n_keys]
        return keep_mask(self._function.bits(self._site, units), check_rate(self.p), weights.dtype).reshape(shape)

    def forward(self, weights: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop attention weights, shape (…, L, S): L queries, S keys, rows along the last axis.

        Raises:
            TypeError: if ``weights`` are not real floating point.
            ValueError: if they have fewer than two axes, or ``mask`` does not fit.
        """
        check_real(weights, "AttentionDropout")
        if mask is not None:
            weights = weights * check_mask(mask, weights)
        elif self.active:
            weights = weights * self.mask(weights, generator)
        else:
            return weights
        if not self.renormalise:
            return weights
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total > 0, total, 1)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"p={self.p}, renormalise={self.renormalise}"


class ValueDropout(DropoutSite):
    r"""Drop features of the values, each for all key positions of a head alike; kept ones times 1/(1−p).

    Attention is linear in the values, so this is locked dropout of the heads' outputs: no key goes missing, and any fused kernel
    will do, ``scaled_dot_product_attention(q, k, drop(v))``. The identity in evaluation.

    Source: the mask over time of Gal & Ghahramani, NIPS 2016, arXiv 1512.05287, on the values of an attention head.

    Args:
        p: the rate, in [0, 1).
    """

    def mask(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``v`` (…, S, E), shape (…, 1, E), with 1 for the batch if frozen; it fits any number of keys."""
        if v.dim() < 2:
            raise ValueError(f"ValueDropout needs values of shape (…, S, E), got {tuple(v.shape)}")
        return inverted(self.keep(v, (*v.shape[:-2], 1, v.shape[-1]), generator), self.p, v.dtype)

    def forward(self, v: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop features of ``v``, shape (…, S, E).

        Raises:
            TypeError: if ``v`` is not floating point.
            ValueError: if it has fewer than two axes.
        """
        check_floating(v, "ValueDropout")
        if v.dim() < 2:
            raise ValueError(f"ValueDropout needs values of shape (…, S, E), got {tuple(v.shape)}")
        if mask is not None:
            return v * check_mask(mask, v)
        return v * self.mask(v, generator) if self.active else v


def dropout_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: AttentionDropout | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return :math:`\mathrm{drop}(\mathrm{softmax}(q k^T s + b))\, v`, shape (…, L, Ev).

    Where nothing is dropped this *is* ``torch.nn.functional.scaled_dot_product_attention``. Otherwise the weights are written
    out, because fused kernels take no mask that acts after the softmax. A mask may be drawn once and kept over batches::

        drop = AttentionDropout(0.1)
        mask = drop.mask(q @ k.mT)  # (N, H, L, S); [:1] for one mask for any batch, [..., t, : t + 1] when decoding
        out = dropout_attention(q, k, v, dropout=drop, mask=mask)

    With ``renormalise=True`` that is the softmax over the kept keys, and the fused kernel gives it:
    ``scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)``.

    Args:
        q: queries, shape (…, L, E).
        k: keys, shape (…, S, E).
        v: values, shape (…, S, Ev).
        attn_mask: b, broadcastable to (…, L, S): boolean (True takes part) or added to the scores.
        is_causal: query i sees keys 0 … i.
        scale: s, :math:`1/\sqrt E` if not given.
        dropout: the layer that drops weights; its mode (training, evaluation, frozen) decides.
        mask: an explicit dropout mask of the weights, broadcastable to (…, L, S); active in evaluation too.
        generator: for a fresh draw.

    Raises:
        TypeError: if ``q``, ``k``, ``v`` are not floating point of one type, or another argument is of the wrong kind.
        ValueError: if both ``attn_mask`` and ``is_causal`` are given, or shapes do not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_real(tensor, f"`{name}` of dropout_attention")
        if tensor.dim() < 2:
            raise ValueError(f"`{name}` must have shape (…, length, features), got {tuple(tensor.shape)}")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"`q`, `k` and `v` must be of one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"`q` (…, L, E), `k` (…, S, E) and `v` (…, S, Ev) do not fit: {shapes}")
    if attn_mask is not None:
        check_tensor(attn_mask, "attn_mask")
    if scale is not None:
        scale = check_number(scale, "scale")
    check_flag(is_causal, "is_causal")
    if dropout is not None and not isinstance(dropout, AttentionDropout):
        raise TypeError(f"dropout must be an AttentionDropout layer, got {shown(dropout)}")
    if attn_mask is not None and is_causal:
        raise ValueError("`attn_mask` and `is_causal=True` exclude each other, got both")
    active = dropout is not None and dropout.active
    if mask is None and not active:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = _softmax(scores, attn_mask)
    drop = dropout or AttentionDropout()  # with `mask` alone: as it is, without renormalisation
    return drop(weights, mask, generator) @ v


def _softmax(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Return the softmax over the last axis; 0 where a row has no key, as ``scaled_dot_product_attention`` has it."""
    if attn_mask is None:
        return scores.softmax(-1)
    blocked = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, -math.inf) if blocked else scores + attn_mask
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def attention_dropout(
    weights: Tensor,
    p: float = 0.1,
    training: bool = True,
    *,
    renormalise: bool = False,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`AttentionDropout`."""
    return AttentionDropout(p, renormalise=renormalise).train(training)(weights, mask, generator)


def value_dropout(
    v: Tensor,
    p: float = 0.1,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`ValueDropout`."""
    return ValueDropout(p).train(training)(v, mask, generator)
