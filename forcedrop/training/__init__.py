"""Training: one YAML file in, one calibrated model out."""

from forcedrop.training.calibrate import calibrate
from forcedrop.training.checkpoint import Committee, TrainedModel, load_model, save_model
from forcedrop.training.config import ConfigError, TrainConfig, load_config, parse_config
from forcedrop.training.loop import TrainingDiverged, TrainingInterrupted
from forcedrop.training.run import train

__all__ = [
    "Committee",
    "ConfigError",
    "TrainConfig",
    "TrainedModel",
    "TrainingDiverged",
    "TrainingInterrupted",
    "calibrate",
    "load_config",
    "load_model",
    "parse_config",
    "save_model",
    "train",
]
