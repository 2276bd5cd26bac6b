r"""Initialisation that knows about dropout: the second moment of activations stays what it is over depth, in training.

**The law.** Take a layer :math:`y = W (m \odot x)` with fan-in n, independent weights of mean 0 and variance v, and a mask m.
Then :math:`\mathrm{E}[y_i^2] = n \, v \, \mathrm{E}[m^2] \, \mathrm{E}[x_j^2]`, so v must be
:math:`\mathrm{gain}^2 / (n \, \mathrm{E}[m^2])`, with gain² = 2 for ReLU (He et al., ICCV 2015, arXiv 1502.01852).

================================  ==========  ============================  =====================================
scheme                            E[m²]       variance of the weights       the keep probability 1−p enters as
================================  ==========  ============================  =====================================
inverted (m is 0 or 1/(1−p))      1/(1−p)     gain² (1−p) / fan-in          a factor: *proportional*
classic (m is 0 or 1)             1−p         gain² / ((1−p) fan-in)        a divisor: *inversely proportional*
================================  ==========  ============================  =====================================

**Texts disagree, and why.** "The variance must be inversely proportional to the keep probability" is true of the classic
scheme, which makes activations smaller in training. Today's layers, ``torch.nn.Dropout`` and all of this library but
``ClassicDropout``, are inverted: they keep the mean and make the second moment larger, by 1/(1−p) a layer, and the same rule,
carried over, would grow it by 1/(1−p)². After 20 layers at p = 0.3 that is 10⁶ instead of 1, and plain Kaiming is at 10³. For
multiplicative noise in general, variance 2/(fan-in · E[m²]) is derived by Pretorius et al., NeurIPS 2018 (arXiv 1811.00293).

**The price.** A mask is absent in evaluation, so no variance serves both: with inverted dropout the second moment of the
weight-scaled pass shrinks by 1−p a layer at initialisation. Training is where the gradients are.

The backward pass obeys the same law with the fan-out (``mode="fan_out"``), since the gradient passes through the same mask.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_floating, check_generator, check_integer, check_number, check_rate, shown

Scheme = Literal["inverted", "classic"]
Mode = Literal["fan_in", "fan_out"]


def dropout_kaiming_normal_(
    tensor: Tensor,
    p: float,
    *,
    scheme: Scheme = "inverted",
    branches: int | None = None,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill a weight with normal numbers whose variance keeps the second moment over a layer with dropout, and return it.

    **Residual networks**: give the last weight of every branch that is added to the stream ``branches=L``, their number, and the
    other weights nothing. Its variance is then also divided by L, so each branch adds 1/L of the stream's second moment, which
    grows to at most (1 + 1/L)^L < e over the whole depth, whatever L and p are, instead of 2^L. Dropout belongs into the
    branch: on the stream itself, its growth is 1/(1−p) a block under any initialisation. Sources: Radford et al., Language models
    are unsupervised multitask learners (2019), section 2.3, for the scale 1/√L; Zhang, Dauphin & Ma, ICLR 2019 (arXiv
    1901.09321), for the growth without it.

    Args:
        tensor: the weight, of two or more axes, as torch's layers have it: outputs first.
        p: the rate of the dropout between the previous nonlinearity and this weight (or on this layer's output), in [0, 1). For
            two of them 1 − (1−p₁)(1−p₂). With 0 and without ``branches`` this is ``torch.nn.init.kaiming_normal_``.
        scheme: ``"inverted"`` (variance ∝ 1−p) or ``"classic"`` (variance ∝ 1/(1−p)).
        branches: see above.
        a: the negative slope, for ``"leaky_relu"``.
        mode: ``"fan_in"`` keeps the activations, ``"fan_out"`` the gradients.
        nonlinearity: the one that makes this weight's input, as in ``torch.nn.init.calculate_gain``; ``"linear"`` if none does.
        generator: torch's global one if not given.

    Raises:
        ValueError: if ``p`` is not in [0, 1), if the weight has fewer than two axes, or if an option is none of the above.
    """
    check_generator(generator)
    std = _std(tensor, p, scheme, branches, a, mode, nonlinearity)
    with torch.no_grad():
        return tensor.normal_(0, std, generator=generator)


def dropout_kaiming_uniform_(
    tensor: Tensor,
    p: float,
    *,
    scheme: Scheme = "inverted",
    branches: int | None = None,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`dropout_kaiming_normal_` with uniform numbers of the same variance.

    Raises:
        ValueError: as there.
    """
    check_generator(generator)
    bound = math.sqrt(3) * _std(tensor, p, scheme, branches, a, mode, nonlinearity)
    with torch.no_grad():
        return tensor.uniform_(-bound, bound, generator=generator)


def _std(
    tensor: Tensor, p: float, scheme: Scheme, branches: int | None, a: float, mode: Mode, nonlinearity: str
) -> float:
    keep = 1 - check_rate(p)
    check_floating(tensor, "dropout's Kaiming initialisation")
    if tensor.dim() < 2:
        raise ValueError(f"the weight needs 2 axes or more to have a fan, got shape {tuple(tensor.shape)}")
    if scheme not in ("inverted", "classic"):
        raise ValueError(f"`scheme` must be 'inverted' or 'classic', got {scheme!r}")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"`mode` must be 'fan_in' or 'fan_out', got {mode!r}")
    if branches is not None and check_integer(branches, "branches") < 1:
        raise ValueError(f"`branches` must be at least 1, got {branches}")
    fan = tensor.shape[1 if mode == "fan_in" else 0] * tensor.shape[2:].numel()
    if not isinstance(nonlinearity, str):
        raise TypeError(f"nonlinearity must be a string, got {shown(nonlinearity)}")
    a = check_number(a, "a")
    if not math.isfinite(a):
        raise ValueError(f"`a` must be finite, got {a}")
    gain = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    return gain * math.sqrt((keep if scheme == "inverted" else 1 / keep) / (max(fan, 1) * (branches or 1)))
