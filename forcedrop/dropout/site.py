"""What every dropout layer of this library is: a site where a mask multiplies, and the three places a mask can come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_generator, check_rate
from forcedrop.dropout.function import FunctionSample

Check = Callable[[Any, str], Any]
"""(value, name) → the value as the layer keeps it, or an error that names it."""


class DropoutSite(nn.Module):
    """A layer that multiplies by a mask. Base of all layers here; subclasses are final.

    Where the mask comes from, in this order:

    1. the call's ``mask`` argument, if given: used as it is (in the input's type), in training and in evaluation alike; it has
       the input's shape or broadcasts to it;
    2. a frozen function sample, set by ``forcedrop.dropout.frozen`` or ``mc_samples``: a pure function of (seed, sample, site
       name), the same for every entry of a batch, in training and in evaluation alike;
    3. in training, a fresh draw, from the call's ``generator`` if given, else from torch's global one, as ``torch.nn.Dropout``.

    In evaluation without 1 and 2 the input is returned as it is. Nothing works in place.

    Settings, the rate first of all, may be set later (``layer.p = 0.2``) and are checked then as at the start; what a layer's
    buffers are made of, such as irreps, is fixed. Layers go through ``torch.compile``, ``torch.export``, ``torch.jit.trace``,
    ``torch.func.vmap``, ``copy`` and ``pickle``; ``torch.jit.script`` cannot compile them and says so.

    Args:
        p: the rate, probability of a unit to be dropped, in [0, 1).

    Raises:
        TypeError: if ``p`` is no number.
        ValueError: if ``p`` is not in [0, 1).
    """

    settings: ClassVar[dict[str, Check]] = {"p": check_rate}
    """How attributes are checked whenever they are set, at the start or later."""

    fixed: ClassVar[frozenset[str]] = frozenset()
    """Attributes that cannot be set again, because buffers depend on them."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self._function: FunctionSample | None = None
        self._site = ""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed and name in vars(self):
            raise ValueError(f"`{name}` of {type(self).__name__} is fixed when the layer is made: make another one")
        check = self.settings.get(name)
        super().__setattr__(name, value if check is None else check(value, name))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

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

        Raises:
            TypeError: if ``generator`` is no ``torch.Generator``.
        """
        p = self.p if p is None else p
        if self._function is not None:
            frozen = (1, *shape[1:]) if len(shape) > 1 else tuple(shape)
            return self._function.keep(self._site + part, p, frozen, device=x.device)
        return fresh_uniform(shape, x.device, generator) >= p

    def extra_repr(self) -> str:
        """Say the rate."""
        return f"p={self.p}"


def refuse_script(layer: nn.Module) -> NoReturn:
    """Say why ``torch.jit.script`` cannot have a layer.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(layer).__name__}, whose masks and functions are Python objects: use"
        " torch.compile, torch.export or torch.jit.trace, or torch.nn.Dropout in a network that is to be scripted"
    )


def fresh_uniform(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return fresh uniform numbers in [0, 1).

    Raises:
        TypeError: if ``generator`` is no ``torch.Generator``.
    """
    if generator is None:  # torch.compile cannot trace `generator=None` with a batch of changing size
        return torch.rand(tuple(shape), device=device, dtype=dtype)
    check_generator(generator)
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=dtype)


def inverted(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return the inverted-dropout mask of kept units: 0 or 1/(1−p)."""
    return keep.to(dtype) / (1.0 - p)
