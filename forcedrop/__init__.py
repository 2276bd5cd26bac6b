"""Force fields that know when they are wrong.

The names below are the public menu; each is imported on first use, so that ``import forcedrop`` and
``import forcedrop.dropout`` stay light.
"""

from __future__ import annotations

from typing import Any

from forcedrop.menus import lazily

__version__ = "0.1.0"

_MENU = {
    "DropoutCalculator": "forcedrop.calculator",
    "Frame": "forcedrop.structures",
    "FrameStore": "forcedrop.structures",
    "Prediction": "forcedrop.uncertainty.sampling",
    "evaluate": "forcedrop.evaluation",
    "fill": "forcedrop.model",
    "flag": "forcedrop.active",
    "load_model": "forcedrop.model",
    "read_frames": "forcedrop.structures",
    "run_md": "forcedrop.md",
    "train": "forcedrop.training",
}

__all__ = [*_MENU, "__version__"]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MENU)(name)


def __dir__() -> list[str]:
    return sorted(__all__)
