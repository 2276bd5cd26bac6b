r"""Dropout of single units: inverted, classic, and Gaussian multiplicative noise of the same variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from forcedrop.dropout.checks import check_floating, check_generator, check_mask
from forcedrop.dropout.site import DropoutSite, inverted


class Dropout(DropoutSite):
    r"""Inverted dropout, :math:`x \cdot m / (1-p)` in training with :math:`m \sim` Bernoulli(1−p); the identity in evaluation.

    As ``torch.nn.Dropout``, which it calls for fresh draws, plus explicit masks, generators and frozen function samples (see
    :class:`~forcedrop.dropout.site.DropoutSite`). Frozen, the mask covers all axes but the first, the batch, of inputs with two
    or more axes.

    Source: Srivastava et al., JMLR 15, 1929 (2014); the scaling in training is their section 10.

    Args:
        p: the rate, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, of values 0 and 1/(1−p), to be kept and given to later calls."""
        return inverted(self.keep(x, x.shape, generator), self.p, x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop units of ``x``, any shape.

        Raises:
            TypeError: if ``x`` is not floating point.
        """
        check_floating(x, "Dropout")
        if mask is not None:
            return x * check_mask(mask, x)
        if not self.active:
            return x
        if self._function is None and generator is None and not x.is_complex():
            return functional.dropout(x, self.p, training=True)
        return x * self.mask(x, generator)


class ClassicDropout(DropoutSite):
    r"""Dropout as first published: :math:`x \cdot m` in training, :math:`x (1-p)` in evaluation.

    The expectation in training is that of evaluation, (1−p)·x, not x. Masks hold 0 and 1; a frozen function sample gives
    :math:`x \cdot m`.

    Source: Hinton et al., arXiv 1207.0580 (2012); Srivastava et al., JMLR 15, 1929 (2014), section 4.

    Args:
        p: the rate, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, of values 0 and 1."""
        return self.keep(x, x.shape, generator).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop units of ``x``, any shape.

        Raises:
            TypeError: if ``x`` is not floating point.
        """
        check_floating(x, "ClassicDropout")
        if mask is not None:
            return x * check_mask(mask, x)
        if self.active:
            return x * self.mask(x, generator)
        return x * (1.0 - self.p) if self.p else x


class GaussianDropout(DropoutSite):
    r"""Multiplicative Gaussian noise with the mean and variance of inverted dropout: :math:`x (1 + \sqrt{p/(1-p)}\,\epsilon)`.

    The identity in evaluation. Source: Srivastava et al., JMLR 15, 1929 (2014), section 10.

    Args:
        p: the rate of the Bernoulli dropout whose variance p/(1−p) it has, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, real, of mean 1 and variance p/(1−p)."""
        dtype = x.real.dtype if x.is_complex() else x.dtype
        if self._function is not None:
            shape = (1, *x.shape[1:]) if x.dim() > 1 else tuple(x.shape)
            noise = self._function.normal(self._site, shape, dtype=dtype, device=x.device)
        elif generator is None:  # torch.compile cannot trace `generator=None` with a batch of changing size
            noise = torch.randn(x.shape, dtype=dtype, device=x.device)
        else:
            check_generator(generator)
            noise = torch.randn(x.shape, generator=generator, dtype=dtype, device=x.device)
        return 1 + math.sqrt(self.p / (1 - self.p)) * noise

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Multiply ``x``, any shape, by noise.

        Raises:
            TypeError: if ``x`` is not floating point.
        """
        check_floating(x, "GaussianDropout")
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`Dropout`."""
    return Dropout(p).train(training)(x, mask, generator)


def classic_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`ClassicDropout`."""
    return ClassicDropout(p).train(training)(x, mask, generator)


def gaussian_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`GaussianDropout`."""
    return GaussianDropout(p).train(training)(x, mask, generator)
