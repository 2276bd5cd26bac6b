r"""Concrete dropout: the rate of each site is learned by gradient descent, through a smooth mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_floating, check_mask, check_number, check_positive, check_real, check_size
from forcedrop.dropout.site import DropoutSite, fresh_uniform

_EPS = 1e-7
_LOGIT = 80.0  # exp(−80) is a number of float32 still


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
    return _relaxed(torch.logit(rate), uniform, temperature) / (1 - rate)


def _relaxed(logit: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return how much of each unit is kept, from the rate's logit."""
    return torch.sigmoid(-(logit + torch.logit(uniform, eps=_EPS)) / temperature)


def check_learned_rate(p: Any, name: str = "p") -> float:
    """Return ``p`` if it is a rate that can be learned.

    Raises:
        TypeError: if ``p`` is no number.
        ValueError: if ``p`` is not in (0, 1).
    """
    p = check_number(p, name)
    if not 0 < p < 1:
        raise ValueError(f"`{name}` must lie in (0, 1) where it is learned, got {p}")
    return p


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
    settings = DropoutSite.settings | {
        "p": check_learned_rate,
        "temperature": check_positive,
        "length_scale": check_positive,
    }

    def __init__(self, p: float = 0.1, *, temperature: float = 0.1, length_scale: float = 1.0) -> None:
        super().__init__(p)
        self.temperature = temperature
        self.length_scale = length_scale

    @property
    def p(self) -> float:
        """The current rate, a number read from the parameter ``logit``; assigning sets the parameter."""
        logit = torch.tensor(float(self.logit.detach()), dtype=torch.float64)  # in float32 the rate would soon be 1
        return float(torch.sigmoid(logit))

    @p.setter
    def p(self, value: float) -> None:
        logit = math.log(value) - math.log1p(-value)
        if "logit" in self._parameters:
            nn.init.constant_(self.logit, logit)
        else:
            self.logit = nn.Parameter(torch.tensor(logit))

    @property
    def rate(self) -> Tensor:
        """The current rate as a tensor without axes, differentiable in ``logit``; in float32 at least."""
        return torch.sigmoid(self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)))

    def _logit(self) -> Tensor:
        """Return the rate's logit in float32 at least, where 1−p is a number above 0."""
        return self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)).clamp(-_LOGIT, _LOGIT)

    @property
    def active(self) -> bool:
        """Whether a call without a mask would drop anything: the rate itself is never 0."""
        return self.training or self._function is not None

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``: relaxed, of its shape, differentiable in the rate; frozen, of values 0 and 1/(1−p).

        To keep a mask over several optimiser steps, detach it: its graph belongs to the rate it was drawn with.
        """
        logit = self._logit()
        keep_rate = torch.sigmoid(-logit)  # not 1 − p, which is soon 0
        if self._function is None:
            uniform = fresh_uniform(x.shape, x.device, generator, logit.dtype)
            return (_relaxed(logit, uniform, self.temperature) / keep_rate).to(x.dtype)
        shape = (1, *x.shape[1:]) if x.dim() > 1 else tuple(x.shape)
        uniform = self._function.uniform(self._site, shape, dtype=logit.dtype, device=x.device)
        return ((uniform >= torch.sigmoid(logit.detach())) / keep_rate.detach()).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop units of ``x``, any shape.

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if ``mask`` does not fit.
        """
        check_floating(x, "ConcreteDropout")
        if mask is not None:
            return x * check_mask(mask, x)
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
        check_real(weight, "ConcreteDropout.regulariser")
        if check_number(n_data, "n_data") < 1:
            raise ValueError(f"`n_data` must be at least 1, got {n_data}")
        if units is None and weight.dim() < 2:
            raise ValueError(f"`weight` needs shape (outputs, inputs, …), got {tuple(weight.shape)}")
        n_units = check_size(weight.shape[1] if units is None else units, "units")
        logit = self._logit()
        rate, keep_rate = torch.sigmoid(logit), torch.sigmoid(-logit)
        shrink = self.length_scale**2 * weight.square().sum() / (2 * keep_rate)
        entropy = -(torch.xlogy(rate, rate) + torch.xlogy(keep_rate, keep_rate))
        return (shrink - n_units * entropy) / n_data

    def extra_repr(self) -> str:
        """Say the current rate and the settings."""
        rate = "unknown" if self.logit.is_meta else f"{self.p:.4g}"
        return f"p={rate}, temperature={self.temperature}, length_scale={self.length_scale}"


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
        ValueError: if ``rate`` has axes or is not in (0, 1), ``temperature`` is not positive, or ``mask`` does not fit.
    """
    check_floating(x, "concrete_dropout")
    check_real(rate, "the `rate` of concrete_dropout")
    if rate.dim() != 0:
        raise ValueError(f"`rate` must have no axes, got shape {tuple(rate.shape)}")
    temperature = check_positive(temperature, "temperature")
    if not torch.compiler.is_compiling() and not rate.is_meta and not 0 < float(rate.detach()) < 1:
        raise ValueError(f"`rate` must lie in (0, 1), got {float(rate.detach())}")
    if mask is not None:
        return x * check_mask(mask, x)
    if not training:
        return x
    uniform = fresh_uniform(x.shape, x.device, generator, rate.dtype)
    return x * concrete_mask(rate, uniform, temperature).to(x.dtype)
