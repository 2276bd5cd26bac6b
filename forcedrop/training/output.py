"""The folder of a training: what is in it, and that no training is lost to another one."""

from __future__ import annotations

import shutil
from pathlib import Path

from forcedrop.files import claim
from forcedrop.training.config import ConfigError, TrainConfig

CHECKPOINT, MODEL, LOG = "last.pt", "model.pt", "log.csv"
_FILES = (CHECKPOINT, MODEL, LOG, "split.json", "training.png")


def claim_training(config: TrainConfig, *, overwrite: bool, resume: bool) -> None:
    """Refuse to start a training where another one is, or where its own input would be overwritten.

    Args:
        config: of the training.
        overwrite: whether what is there may go.
        resume: whether it was meant to go on; there was nothing to go on from.

    Raises:
        ConfigError: naming the file that is there.
    """
    if resume and overwrite:
        raise ConfigError("either go on with the training or overwrite it (--resume, --overwrite), not both")
    data, out = config.data, config.output
    isolated = [data.isolated_atoms] if isinstance(data.isolated_atoms, Path) else []
    read = [config.start, *data.train, *(data.validation or []), *(data.calibration or []), *isolated]
    otherwise = "--resume goes on with the training, --overwrite removes it"
    if resume:
        otherwise = f"there is no {CHECKPOINT} to go on from; --overwrite removes what is there"
    try:
        claim([out / name for name in (CHECKPOINT, MODEL, LOG)], read, overwrite=overwrite, otherwise=otherwise)
    except ValueError as error:
        raise ConfigError(f"`output`: {error}") from None


def remove_training(out: Path) -> None:
    """Remove a training, so that nothing of it is taken for a part of the next one."""
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
