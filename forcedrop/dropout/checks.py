"""What the doors let in: numbers, rates, flags, tensors, masks. An error names the argument, what it got and what was wanted."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
"""The largest size of an axis, and number of functions or masks, that is taken for one."""


def shown(value: object) -> str:
    """Return a value as an error message shows it, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    return reprlib.repr(value)


def check_number(value: Any, name: str) -> float:
    """Return a number as a float: Python's, NumPy's, or a tensor without axes.

    Raises:
        TypeError: if it is none, or a tensor that wants a gradient, which a number cannot pass on.
    """
    if isinstance(value, float):  # first: the only one that torch.compile can trace
        return float(value)
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        if value.requires_grad:
            raise TypeError(f"{name} must be a number, got a tensor that requires a gradient, which would be lost")
        return float(value)
    # SymFloat and SymInt: numbers of torch.export and of make_fx
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat | numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_rate(p: Any, name: str = "p") -> float:
    """Return ``p`` if it is a dropout rate.

    Raises:
        TypeError: if ``p`` is no number.
        ValueError: if ``p`` is not in [0, 1).
    """
    p = check_number(p, name)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"`{name}` must lie in [0, 1), got {p}")
    return p


def check_positive(value: Any, name: str) -> float:
    """Return a finite number above 0.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not positive and finite.
    """
    value = check_number(value, name)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive, got {value}")
    return value


def check_integer(value: Any, name: str, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """Return an integer between two bounds: Python's, NumPy's, or an integer tensor without axes.

    Raises:
        TypeError: if it is none; 2.0 is none either.
        ValueError: if it lies outside of the bounds.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors have `__index__` whatever they hold
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from error
    if number < low:
        raise ValueError(f"`{name}` must be at least {low}, got {number}")
    if number > high:
        raise ValueError(f"`{name}` must be at most {high}, got {number}")
    return number


def check_size(value: Any, name: str) -> int:
    """Return the size of something, from 1 to :data:`LARGEST`.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is too small or too large.
    """
    return check_integer(value, name, 1, LARGEST)


def check_flag(value: Any, name: str) -> bool:
    """Return a flag.

    Raises:
        TypeError: if it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_tensor(x: Any, name: str) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(x)}")


def check_floating(x: Any, what: str) -> None:
    """Refuse integers and booleans, which cannot be rescaled.

    Raises:
        TypeError: if ``x`` is no tensor, or neither real nor complex floating point.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} needs a tensor, got {shown(x)}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{what} needs a floating-point input, got {x.dtype}")


def check_real(x: Any, what: str) -> None:
    """Refuse complex numbers too.

    Raises:
        TypeError: if ``x`` is no tensor, or not real floating point.
    """
    check_floating(x, what)
    if x.is_complex():
        raise TypeError(f"{what} needs real numbers, got {x.dtype}")


def check_rank(x: Tensor, ranks: Sequence[int], what: str) -> None:
    """Refuse inputs with a wrong number of axes.

    Raises:
        ValueError: naming the ranks that would do.
    """
    if x.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{what} needs an input of {wanted} axes, got shape {tuple(x.shape)}")


def check_integers(t: Any, shape: tuple[int | None, ...], what: str) -> None:
    """Refuse a tensor that does not hold integers, or has another shape than ``shape``, where None stands for any size.

    Raises:
        TypeError: if ``t`` is no tensor of integers.
        ValueError: if the shape is another one.
    """
    check_tensor(t, what)
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{what} must hold integers, got {t.dtype}")
    if t.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{what} must have shape ({wanted}), got {tuple(t.shape)}")


def check_generator(generator: Any) -> None:
    """Refuse what is no random number generator.

    Raises:
        TypeError: if it is neither None nor a ``torch.Generator``.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {shown(generator)}")


def check_dtype(dtype: Any) -> None:
    """Refuse a type that a mask of 0 and 1/(1−p) cannot have.

    Raises:
        TypeError: if it is neither None nor a floating-point ``torch.dtype``.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {shown(dtype)}")


def check_same_dtype(x: Tensor, weight: Tensor, what: str) -> None:
    """Refuse inputs of another type than the weights, unless ``torch.autocast`` converts both.

    Raises:
        TypeError: naming both types.
    """
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{what} has weights of {weight.dtype} and needs inputs of that type, got {x.dtype}")


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether something of the one shape multiplies something of the other without making it larger."""
    # not `m in (1, n)`, which would fix sizes for whoever traces this
    return len(shape) <= len(wanted) and all(
        m == n or m == 1 for m, n in zip(reversed(shape), reversed(wanted), strict=False)
    )


def check_mask(mask: Any, x: Tensor, name: str = "mask") -> Tensor:
    """Return an explicit mask for ``x``, in its type.

    Raises:
        TypeError: if it is no tensor, or complex where ``x`` is real.
        ValueError: if it has more axes than ``x``, does not broadcast to its shape, or is on another device.
    """
    check_tensor(mask, name)
    if mask.shape != x.shape and not fits(mask.shape, x.shape):
        raise ValueError(f"`{name}` of shape {tuple(mask.shape)} does not fit an input of shape {tuple(x.shape)}")
    if mask.device != x.device and mask.dim():
        raise ValueError(f"`{name}` must be on the device of the input, {x.device}, got {mask.device}")
    if mask.dtype == x.dtype:
        return mask
    if mask.is_complex() and not x.is_complex():
        raise TypeError(f"{name} must be real for an input of {x.dtype}, got {mask.dtype}")
    return mask.to(x.dtype)
