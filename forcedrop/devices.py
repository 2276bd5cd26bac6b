"""Where a network computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from forcedrop.door import short

KINDS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that compute."""


def pick_device(name: str | torch.device | None = "auto") -> torch.device:
    """Return a device by name, ``cpu``, ``cuda``, ``cuda:1`` …; for ``auto`` or None the GPU if there is one.

    Raises:
        ValueError: if there is no such device, or torch sees none of its kind.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"no such device: {short(name)}; there are cpu, cuda, cuda:1 … and auto") from None
    if device.type not in KINDS:
        raise ValueError(f"nothing can be computed on the device {device}; there are {', '.join(KINDS)} and auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the device is to be {device} but torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device is to be {device} but torch sees {torch.cuda.device_count()} GPUs")
    return device


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn torch's various errors about memory into one that says what to do.

    Args:
        what: needs the memory.
        advice: what needs less.

    Raises:
        MemoryError: if there is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"{what} need more memory than there is; try {advice}") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a processor or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = (
        "not enough memory",
        "out of memory",
        "can't allocate memory",
        "cannot allocate memory",
        "storage size calculation",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
