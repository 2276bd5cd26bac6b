"""Training: one YAML file in, one calibrated model out."""

from forcedrop.training.checkpoint import TrainedModel, load_model, save_model
from forcedrop.training.config import ConfigError, TrainConfig, load_config, parse_config
from forcedrop.training.loop import TrainingDiverged, TrainingInterrupted
from forcedrop.training.run import train

__all__ = [
    "ConfigError",
    "TrainConfig",
    "TrainedModel",
    "TrainingDiverged",
    "TrainingInterrupted",
    "load_config",
    "load_model",
    "parse_config",
    "save_model",
    "train",
]
