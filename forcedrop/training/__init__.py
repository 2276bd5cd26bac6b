"""Training: one YAML file in, one calibrated model out.

The names below are the menu; each is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import lazily

if TYPE_CHECKING:
    from forcedrop.training.config import ConfigError, TrainConfig, load_config, parse_config
    from forcedrop.training.loop import TrainingDiverged, TrainingInterrupted
    from forcedrop.training.run import train

_MENU = {
    "ConfigError": "forcedrop.training.config",
    "TrainConfig": "forcedrop.training.config",
    "TrainingDiverged": "forcedrop.training.loop",
    "TrainingInterrupted": "forcedrop.training.loop",
    "load_config": "forcedrop.training.config",
    "load_model": "forcedrop.model",  # where earlier versions had it
    "parse_config": "forcedrop.training.config",
    "train": "forcedrop.training.run",
}

__all__ = [
    "ConfigError",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "load_config",
    "parse_config",
    "train",
]

__getattr__ = lazily(__name__, _MENU)
