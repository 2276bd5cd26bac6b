"""Where a network computes."""

from __future__ import annotations

import torch


def pick_device(name: str | torch.device | None = "auto") -> torch.device:
    """Return a device by name, ``cpu``, ``cuda``, ``cuda:1`` …; for ``auto`` or None the GPU if there is one.

    Raises:
        ValueError: if there is no such GPU.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the device is to be {device} but torch sees no GPU")
    return device
