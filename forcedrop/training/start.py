"""Fine-tuning: what a training takes over from the model that it starts from."""

from __future__ import annotations

import json
from typing import Any

from forcedrop.files import load_tensors
from forcedrop.model import load_model
from forcedrop.potential import kind_of
from forcedrop.training.config import NetworkSettings, TrainConfig
from forcedrop.training.output import CHECKPOINT


def with_shape_of_start(config: TrainConfig, *, resume: bool) -> TrainConfig:
    """Return a configuration with kind and shape of the model it starts from, where the file has no section ``model``.

    A training that is resumed has them in its checkpoint, whatever became of that model.

    Raises:
        ValueError: if there is no such model.
    """
    if config.start is None or "model" in config.model_fields_set:
        return config
    checkpoint = config.output / CHECKPOINT
    if resume and checkpoint.exists():
        values: dict[str, Any] = json.loads(load_tensors(checkpoint)["settings"])["model"]
    else:
        potential = load_model(config.start).potential
        values = {"kind": potential.kind, **potential.settings()}
    kind = values.pop("kind")
    return config.model_copy(update={"model": NetworkSettings(kind, kind_of(kind).Shape(**values))})
