r"""Dropout along a sequence: one mask for all time steps (locked dropout), and units that keep their last state (zoneout)."""

from __future__ import annotations

import torch
from torch import Tensor

from forcedrop.dropout.checks import check_flag, check_floating, check_integer, check_mask, check_rank
from forcedrop.dropout.site import DropoutSite, inverted


class LockedDropout(DropoutSite):
    r"""Variational dropout: one mask per sequence, the same at every time step; kept features times 1/(1−p).

    The identity in evaluation. A mask fits sequences of any length.

    Source: Gal & Ghahramani, NIPS 2016, arXiv 1512.05287; the name is that of Merity et al., arXiv 1708.02182.

    Args:
        p: the rate, in [0, 1).
        batch_first: inputs are (B, T, F), else (T, B, F), as in ``torch.nn.LSTM``; without a batch always (T, F).
    """

    settings = DropoutSite.settings | {"batch_first": check_flag}

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__(p)
        self.batch_first = batch_first

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for ``x``, with 1 for the time axis (and 1 for the batch if frozen)."""
        check_rank(x, (2, 3), "LockedDropout")
        if x.dim() == 2:
            keep = self.keep(x, (1, x.shape[1]), generator)
        else:
            batch_axis, time_axis = (0, 1) if self.batch_first else (1, 0)
            keep = self.keep(x, (x.shape[batch_axis], x.shape[2]), generator).unsqueeze(time_axis)
        return inverted(keep, self.p, x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Drop features of ``x``, shape (T, B, F), or (B, T, F) with ``batch_first``, or (T, F).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if ``x`` has neither 2 nor 3 axes.
        """
        check_floating(x, "LockedDropout")
        check_rank(x, (2, 3), "LockedDropout")
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator) if self.active else x

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"p={self.p}, batch_first={self.batch_first}"


class Zoneout(DropoutSite):
    r"""Let units of a recurrent state keep their previous value, :math:`d \cdot h_{t-1} + (1-d) \cdot \tilde h_t`.

    Here d ~ Bernoulli(p). In evaluation the expectation, :math:`p \cdot h_{t-1} + (1-p) \cdot \tilde h_t`. Masks hold 1−d: 1
    takes the new value, 0 the old one. For an LSTM, one layer for h and one for c, with rates of their own::

        h_new, c_new = cell(x[t], (h, c))
        h, c = zoneout_h(h_new, h, step=t), zoneout_c(c_new, c, step=t)

    Source: Krueger et al., ICLR 2017, arXiv 1606.01305, section 3.

    Args:
        p: the rate at which a unit keeps its previous value, in [0, 1).
    """

    def mask(self, new: Tensor, generator: torch.Generator | None = None, *, step: int = 0) -> Tensor:
        """Return a mask for ``new``, of values 0 and 1; of its shape, or with 1 for the batch if frozen."""
        step = check_integer(step, "step")
        return self.keep(new, new.shape, generator, part=f"@{step}").to(new.dtype)

    def forward(
        self,
        new: Tensor,
        old: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        step: int = 0,
    ) -> Tensor:
        """Choose between the state ``new`` and the one before, ``old``, both (B, H) or of another shape they share.

        Args:
            new: the state that the cell proposes.
            old: the previous state.
            mask: 1 for the new value, 0 for the old one.
            generator: for a fresh draw.
            step: the time step: a frozen function sample has an independent mask for each; fresh draws do not need it.

        Raises:
            TypeError: if a state is not floating point.
            ValueError: if the states' shapes differ.
        """
        check_floating(new, "Zoneout")
        check_floating(old, "Zoneout")
        if new.shape != old.shape:
            raise ValueError(f"Zoneout needs two states of one shape, got {tuple(new.shape)} and {tuple(old.shape)}")
        if mask is not None:
            mask = check_mask(mask, new)
        elif self.active:
            mask = self.mask(new, generator, step=step)
        if mask is not None:
            return mask * new + (1 - mask) * old
        return (1 - self.p) * new + self.p * old if self.p else new


def locked_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    batch_first: bool = False,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`LockedDropout`."""
    return LockedDropout(p, batch_first).train(training)(x, mask, generator)


def zoneout(
    new: Tensor,
    old: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`Zoneout`."""
    return Zoneout(p).train(training)(new, old, mask, generator)
