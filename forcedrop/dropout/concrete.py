r"""Concrete dropout: the rate of each site is learned by gradient descent, through a smooth mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from forcedrop.dropout.site import DropoutSite, check_floating

_EPS = 1e-7


def concrete_mask(rate: Tensor, uniform: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Return a relaxed inverted-dropout mask, of the shape of ``uniform``, differentiable in the rate.

    :math:`m = (1 - \tilde z)/(1-p)` with
    :math:`\tilde z = \mathrm{sigmoid}\big((\mathrm{logit}\,p + \mathrm{logit}\,u)/t\big)`, equation 5 of Gal, Hron &
    Kendall. :math:`\tilde z > 1/2` with probability p exactly; the mean of m is 1 up to O(t²) for small t.

    Args:
        rate: the rate p in (0, 1), without axes.
        uniform: independent uniform numbers u in [0, 1).
        temperature: t > 0; 0 would be the Bernoulli mask.
    """
    dropped = torch.sigmoid((torch.logit(rate) + torch.logit(uniform, eps=_EPS)) / temperature)
    return (1 - dropped) / (1 - rate)


class ConcreteDropout(DropoutSite):
    r"""Dropout that learns its rate: minimise loss + :meth:`regulariser` over weights and rate together.

    In training, each unit of the input has a relaxed mask (:func:`concrete_mask`), which passes a gradient to the rate;
    the parameter is ``logit``, :math:`p = \mathrm{sigmoid}(\mathrm{logit})`. A frozen function sample has a hard
    Bernoulli mask of the current rate, which passes none. In evaluation otherwise the identity.

    Source: Gal, Hron & Kendall, NeurIPS 2017 (arXiv 1705.07832).

    Args:
        p: the rate at the start, in (0, 1); from 0 no gradient leads away.
        temperature: of the relaxation, positive; the authors use 0.1.
        length_scale: prior length scale l of the weights that follow, positive.

    Raises:
        ValueError: if ``p`` is not in (0, 1), or ``temperature`` or ``length_scale`` are not positive.
    """

    logit: nn.Parameter

    def __init__(self, p: float = 0.1, *, temperature: float = 0.1, length_scale: float = 1.0) -> None:
        super().__init__(p)
        for name, value in (("temperature", temperature), ("length_scale", length_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}")
        self.temperature = temperature
        self.length_scale = length_scale

    @property
    def p(self) -> float:
        """The current rate, a number read from the parameter ``logit``; assigning sets the parameter."""
        return float(torch.sigmoid(self.logit.detach()))

    @p.setter
    def p(self, value: float) -> None:
        if not 0 < value < 1:
            raise ValueError(f"`p` must lie in (0, 1) where it is learned, got {value}")
        logit = math.log(value) - math.log1p(-value)
        if "logit" in self._parameters:
            nn.init.constant_(self.logit, logit)
        else:
            self.logit = nn.Parameter(torch.tensor(logit))

    @property
    def rate(self) -> Tensor:
        """The current rate as a tensor without axes, differentiable in ``logit``; in float32 at least."""
        return torch.sigmoid(self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)))

    @property
    def active(self) -> bool:
        """Whether a call without a mask would drop anything: the rate itself is never 0."""
        return self.training or self._function is not None

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``: relaxed, of its shape, differentiable in the rate; frozen, of values 0 and 1/(1−p).

        To keep a mask over several optimiser steps, detach it: its graph belongs to the rate it was drawn with.
        """
        rate = self.rate
        if self._function is None:
            uniform = torch.rand(x.shape, generator=generator, dtype=rate.dtype, device=x.device)
            return concrete_mask(rate, uniform, self.temperature).to(x.dtype)
        rate = rate.detach()
        shape = (1, *x.shape[1:]) if x.dim() > 1 else tuple(x.shape)
        uniform = self._function.uniform(self._site, shape, dtype=rate.dtype, device=x.device)
        return ((uniform >= rate) / (1 - rate)).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop units of ``x``, any shape.

        Raises:
            TypeError: if ``x`` is not floating point.
        """
        check_floating(x, "ConcreteDropout")
        if mask is not None:
            return x * mask
        return x * self.mask(x, generator) if self.active else x

    def regulariser(self, weight: Tensor, n_data: int, *, units: int | None = None) -> Tensor:
        r"""Return this site's share of KL(q‖prior)/N, to be added to a *mean* negative log-likelihood [nats per datum].

        .. math:: \frac1N \Big( \frac{l^2 \lVert W \rVert^2}{2 (1-p)} - K\, H(p) \Big), \qquad H(p) = -p\ln p -
        (1-p)\ln(1-p)

        Equations 1, 3 and 4 of the paper, whose M is W/(1−p) where the mask is divided by 1−p as here. The authors' code
        has twice this, because its loss is twice a Gaussian log-likelihood.

        Args:
            weight: W of the layer that takes this site's output, shape (outputs, inputs, …).
            n_data: N, the number of data in the training set, not in the batch.
            units: K, the number of units with a mask each; the inputs of ``weight`` if not given.

        Raises:
            ValueError: if ``n_data`` or ``units`` is less than 1, or ``weight`` has fewer than 2 axes and ``units`` is
                not given.
        """
        if n_data < 1:
            raise ValueError(f"`n_data` must be at least 1, got {n_data}")
        if units is None and weight.dim() < 2:
            raise ValueError(f"`weight` needs shape (outputs, inputs, …), got {tuple(weight.shape)}")
        n_units = weight.shape[1] if units is None else units
        if n_units < 1:
            raise ValueError(f"`units` must be at least 1, got {n_units}")
        rate = self.rate
        shrink = self.length_scale**2 * weight.square().sum() / (2 * (1 - rate))
        entropy = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
        return (shrink - n_units * entropy) / n_data

    def extra_repr(self) -> str:
        """Say the current rate and the settings."""
        return f"p={self.p:.4g}, temperature={self.temperature}, length_scale={self.length_scale}"


def concrete_dropout(
    x: Tensor,
    rate: Tensor,
    training: bool = True,
    *,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`ConcreteDropout`, with the rate in (0, 1) as a tensor without axes that a gradient goes to.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: if ``rate`` has axes.
    """
    check_floating(x, "concrete_dropout")
    if rate.dim() != 0:
        raise ValueError(f"`rate` must have no axes, got shape {tuple(rate.shape)}")
    if mask is not None:
        return x * mask
    if not training:
        return x
    uniform = torch.rand(x.shape, generator=generator, dtype=rate.dtype, device=x.device)
    return x * concrete_mask(rate, uniform, temperature).to(x.dtype)
