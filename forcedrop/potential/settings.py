"""What the settings of a network may be: of the right type, finite, and not absurd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

LIMITS: dict[str, float] = {
    "cutoff": 100.0, "cutoff_power": 64, "n_channels": 4096, "n_layers": 32, "n_radial": 512, "n_hidden": 65536,
}  # fmt: skip
"""Largest values of settings by name [Å for the cutoff]: a network beyond them fits no machine, and is a slip of the pen."""


def check_shape(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Check values for a ``Shape``, a dataclass of settings, against the types of its defaults and :data:`LIMITS`.

    Raises:
        ValueError: naming the setting, what it is and what it may be.
    """
    for setting in fields(kind):
        if setting.name not in values:
            continue
        name, value, default = setting.name, values[setting.name], setting.default
        kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"`{name}` must be of type {type(default).__name__}, got {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}")
        if name in LIMITS and values[name] > LIMITS[name]:
            raise ValueError(f"`{name}` must be at most {LIMITS[name]:g}, got {values[name]:g}")
