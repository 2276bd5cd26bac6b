"""What every dropout layer of this library is: a site where a mask multiplies, and the three places a mask can come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.masks import check_rate


def check_floating(x: Tensor, what: str) -> None:
    """Refuse integers and booleans, which cannot be rescaled.

    Raises:
        TypeError: if ``x`` is neither real nor complex floating point.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{what} needs a floating-point input, got {x.dtype}")


def check_rank(x: Tensor, ranks: Sequence[int], what: str) -> None:
    """Refuse inputs with a wrong number of axes.

    Raises:
        ValueError: naming the ranks that would do.
    """
    if x.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{what} needs an input of {wanted} axes, got shape {tuple(x.shape)}")


class DropoutSite(nn.Module):
    """A layer that multiplies by a mask. Base of all layers here; subclasses are final.

    Where the mask comes from, in this order:

    1. the call's ``mask`` argument, if given: used as it is, in training and in evaluation alike;
    2. a frozen function sample, set by ``forcedrop.dropout.frozen`` or ``mc_samples``: a pure function of (seed, sample, site
       name), the same for every entry of a batch, in training and in evaluation alike;
    3. in training, a fresh draw, from the call's ``generator`` if given, else from torch's global one, as ``torch.nn.Dropout``.

    In evaluation without 1 and 2 the input is returned as it is.

    Args:
        p: the rate, probability of a unit to be dropped, in [0, 1).

    Raises:
        ValueError: if ``p`` is not in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_rate(p)
        self._function: FunctionSample | None = None
        self._site = ""

    @property
    def active(self) -> bool:
        """Whether a call without a mask would drop anything."""
        return (self.training or self._function is not None) and self.p > 0

    def check_samples(self, n: int) -> None:
        """Refuse ``n`` function samples if the site has fewer; most have any number."""

    def keep(
        self,
        x: Tensor,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        part: str = "",
        p: float | None = None,
    ) -> Tensor:
        """Return which units are kept, boolean, on the device of ``x``; every unit is dropped with probability ``p``.

        Args:
            x: the input; its device counts.
            shape: of a fresh draw; a frozen function sample has 1 for the first axis, the batch, if there are two or more.
            generator: for a fresh draw.
            part: distinguishes several draws of one layer.
            p: another rate than the layer's.
        """
        p = self.p if p is None else p
        if self._function is not None:
            frozen = (1, *shape[1:]) if len(shape) > 1 else tuple(shape)
            return self._function.keep(self._site + part, p, frozen, device=x.device)
        if generator is None:  # torch.compile cannot trace `generator=None` with a batch of changing size
            return torch.rand(tuple(shape), device=x.device) >= p
        return torch.rand(tuple(shape), generator=generator, device=x.device) >= p

    def extra_repr(self) -> str:
        """Say the rate."""
        return f"p={self.p}"


def inverted(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return the inverted-dropout mask of kept units: 0 or 1/(1−p)."""
    return keep.to(dtype) / (1.0 - p)
