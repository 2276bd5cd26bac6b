"""Force fields that know when they are wrong.

The names below are the public menu; each is imported on first use, so that ``import forcedrop`` and
``import forcedrop.dropout`` stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MENU = {
    "DropoutCalculator": "forcedrop.calculator",
    "Frame": "forcedrop.structures",
    "FrameStore": "forcedrop.structures",
    "Prediction": "forcedrop.sampling",
    "evaluate": "forcedrop.evaluation",
    "flag": "forcedrop.active",
    "load_model": "forcedrop.training",
    "read_frames": "forcedrop.structures",
    "run_md": "forcedrop.md",
    "train": "forcedrop.training",
}

__all__ = [*_MENU, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MENU:
        return getattr(import_module(_MENU[name]), name)
    raise AttributeError(f"module 'forcedrop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
