"""What samples say: mean, variance and covariance of a regression; parts of the uncertainty of a classification."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forcedrop.dropout.checks import check_real


class RegressionSummary(NamedTuple):
    """Moments of K samples of shape (K, …, F): F output features, … any number of axes of independent inputs.

    Attributes:
        mean: shape (…, F).
        variance: between samples, with K − 1 in the denominator, shape (…, F); the epistemic part of the predictive variance.
        covariance: between output features, with K − 1 in the denominator, shape (…, F, F); its diagonal is the variance.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor


class ClassificationSummary(NamedTuple):
    """Uncertainty of a classification from K samples of shape (K, …, C), all entropies in nats.

    Attributes:
        probabilities: the predictive distribution, mean of the samples' distributions, shape (…, C).
        predictive_entropy: of that distribution, shape (…); the sum of the following two.
        expected_entropy: mean of the samples' entropies, shape (…); the aleatoric part.
        mutual_information: between class and function sample, shape (…); the epistemic part, in [0, log min(C, K)].
        variation_ratio: share of samples whose most probable class is not the one most samples chose, shape (…).
    """

    probabilities: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor


def regression_summary(samples: Tensor) -> RegressionSummary:
    """Return mean, variance and covariance of samples of shape (K, …, F).

    The covariance runs over the last axis, so give a network with one output a last axis of 1: (K, N, 1), not (K, N).

    Raises:
        ValueError: with fewer than two samples or two axes.
        TypeError: if the samples are not floating point.
    """
    samples = _checked(samples)
    mean = samples.mean(0)
    deviation = (samples - mean).movedim(0, -2)
    covariance = deviation.mT @ deviation / (samples.shape[0] - 1)
    return RegressionSummary(mean, samples.var(0, correction=1), covariance)


def classification_summary(samples: Tensor, *, logits: bool = True) -> ClassificationSummary:
    r"""Split the uncertainty of a classification into its aleatoric and its epistemic part.

    With :math:`\bar p = \frac{1}{K}\sum_k p_k` and the entropy :math:`H(p) = -\sum_c p_c \log p_c` (0 log 0 = 0):
    :math:`H(\bar p) = \frac{1}{K}\sum_k H(p_k) + I`, where I, the mutual information, is the mean Kullback-Leibler divergence of
    the samples from their mean.

    Sources: Houlsby et al., arXiv 1112.5745 (2011), equation 2; Gal, thesis, Cambridge (2016), section 3.3.1; Freeman, Elementary
    Applied Statistics (1965), for the variation ratio. Ties for the most probable class go to the first one.

    Args:
        samples: shape (K, …, C), with C ≥ 2 classes: give a single logit z as (0, z). Half precision is computed in float32.
        logits: whether the samples are logits; else probabilities, not negative and with sum 1.

    Raises:
        ValueError: with fewer than two samples, axes or classes, or if ``logits=False`` and these are no probabilities.
        TypeError: if the samples are not floating point.
    """
    samples = _checked(samples)
    samples = samples.to(torch.promote_types(samples.dtype, torch.float32))
    if samples.shape[-1] < 2:
        raise ValueError(f"`samples` need a last axis of 2 or more classes, got shape {tuple(samples.shape)}")
    p = samples.softmax(-1) if logits else _check_probabilities(samples)
    mean = p.mean(0)
    total = torch.special.entr(mean).sum(-1)
    expected = torch.special.entr(p).sum(-1).mean(0)
    votes = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype).mean(0)
    # negative only by rounding
    return ClassificationSummary(mean, total, expected, (total - expected).clamp_min(0), 1 - votes.amax(-1))


def _checked(samples: Tensor) -> Tensor:
    check_real(samples, "a summary")
    if samples.dim() < 2:
        raise ValueError(f"`samples` must have the shape (K, …, F), 2 axes or more, got shape {tuple(samples.shape)}")
    if samples.shape[0] < 2:
        raise ValueError(f"a spread needs 2 samples or more, got {samples.shape[0]}")
    return samples


def _check_probabilities(p: Tensor) -> Tensor:
    # the tolerance is what a softmax in half precision needs
    if not (bool((p >= 0).all()) and bool(((p.sum(-1) - 1).abs() <= 1e-2).all())):
        raise ValueError(
            f"`samples` are no probabilities: smallest {p.min():.3g}, sums from {p.sum(-1).min():.3g} to {p.sum(-1).max():.3g};"
            " for logits use logits=True"
        )
    return p
