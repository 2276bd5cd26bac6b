"""Moments under dropout: of gradients, of activations over depth, and of a network's output (the Jensen gap)."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_rate
from forcedrop.dropout.montecarlo import call_with, evaluation_mode, mc_samples

Number = TypeVar("Number", float, Tensor)


def gradient_variance(mean: Number, variance: Number, p: float) -> Number:
    r"""Return the variance of a gradient g times an inverted-dropout mask, :math:`(\mathrm{Var}\,g + p\,\mathrm{E}[g]^2)/(1-p)`.

    The mask m is independent of g, with E[m] = 1 and E[m²] = 1/(1−p), so that
    :math:`\mathrm{Var}(mg) = \mathrm{E}[g^2]/(1-p) - \mathrm{E}[g]^2`. The mean stays E[g].

    Args:
        mean: E[g], any shape.
        variance: Var g, of the same shape.
        p: the rate, in [0, 1).

    Raises:
        ValueError: if ``p`` is not in [0, 1), or if a variance is negative.
    """
    if bool((torch.as_tensor(variance) < 0).any()):
        raise ValueError(f"`variance` must not be negative, got {variance}")
    return (variance + p * mean**2) / (1 - check_rate(p))


def second_moment_growth(p: float, layers: int) -> float:
    """Return by what factor the second moment of activations grows over ``layers`` layers of inverted dropout, (1−p)^−layers.

    That is in training, with weights whose variance forgets dropout (Glorot, Kaiming); evaluation grows by 1.
    :mod:`forcedrop.dropout.init` takes the factor out. Source: E[m²] = 1/(1−p) per layer; Pretorius et al., NeurIPS 2018 (arXiv
    1811.00293), for noise in general.

    Raises:
        ValueError: if ``p`` is not in [0, 1), or if ``layers`` is negative.
    """
    if layers < 0:
        raise ValueError(f"`layers` must not be negative, got {layers}")
    return float((1 - check_rate(p)) ** -layers)


class JensenGap(NamedTuple):
    """How far the weight-scaled pass is from the mean of the ensemble that it stands for; all of the output's shape.

    Attributes:
        gap: ``mean`` − ``scaled``; 0 for networks that are linear in their masks.
        standard_error: of the gap, by the spread of the samples: gaps within a few of these are not seen at this ``n``.
        scaled: the pass in evaluation mode without masks.
        mean: the Monte-Carlo mean.
    """

    gap: Tensor
    standard_error: Tensor
    scaled: Tensor
    mean: Tensor


def jensen_gap(
    model: nn.Module, inputs: Any, n: int, seed: int = 0, *, chunk: int | None = None, vectorised: bool | None = None
) -> JensenGap:
    r"""Estimate the Jensen gap, :math:`\mathrm{E}_m[f(x; m)] - f(x; \mathrm{E}[m])`, from ``n`` samples.

    Sources: Srivastava et al., JMLR 15, 1929 (2014), section 7.5 (weight scaling against Monte-Carlo averaging); Baldi &
    Sadowski, NeurIPS 2013, for its analysis.

    Args:
        model: a network with dropout layers and one tensor as output; see :func:`~forcedrop.dropout.montecarlo.mc_samples`, which
            has the other arguments too.
        inputs: as there.
        n: how many samples, 2 or more.
        seed: as there.
        chunk: as there.
        vectorised: as there.

    Raises:
        ValueError: if ``n`` < 2, and as ``mc_samples``.
        TypeError: if the output is not a tensor.
    """
    if n < 2:
        raise ValueError(f"a standard error needs 2 samples or more, got n={n}")
    with torch.no_grad():
        with evaluation_mode(model):
            scaled = call_with(model, inputs)
        if not isinstance(scaled, Tensor):
            raise TypeError(f"the network must return a tensor, got {type(scaled).__name__}")
        samples = mc_samples(model, inputs, n, seed, chunk=chunk, vectorised=vectorised)
    mean = samples.mean(0)
    return JensenGap(mean - scaled, samples.std(0, correction=1) / n**0.5, scaled, mean)
