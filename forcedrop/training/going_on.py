"""Going on with a training, or from a model: what must be the same, and what was known before."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from forcedrop.model import load_model
from forcedrop.structures.prints import Prints
from forcedrop.training.config import ConfigError, TrainConfig
from forcedrop.training.data import Prepared, content_hash

_FREE = ("output", "start", "device", "workers", "compile", "tf32", "checkpoint_seconds")
"""Settings that belong to the machine, and the model to start from, of which the content counts."""
_PATHS = ("train", "validation", "calibration", "isolated_atoms")
"""Of the data, whose content says more than their paths."""


def settings_of(config: TrainConfig) -> str:
    """Return what must not change between a training and its resumption, without what files hold, as JSON."""
    free: Any = dict.fromkeys(_FREE, True)
    return config.model_dump_json(exclude={**free, "data": set(_PATHS)})


def what_must_not_change(config: TrainConfig, data: Prepared) -> dict[str, Any]:
    """Return all that decides the numbers of a training, in plain values: settings, and hashes of what files hold."""
    return {
        "settings": settings_of(config),
        "data_hash": content_hash(data.split.train),
        "held_out": {
            "data.validation": content_hash(data.split.validation),
            "data.calibration": content_hash(data.split.calibration),
        },
        "isolated": {str(z): energy for z, energy in data.isolated.items()},
        "start": _hash_of(config.start),
        "before": {
            "compositions": data.compositions,
            "isolated_origin": data.isolated_origin,
            "prints": data.prints.to_dict(),
        },
    }


def check_same(state: Mapping[str, Any], config: TrainConfig, data: Prepared, path: Path) -> None:
    """Refuse to go on with other settings or data; what an older checkpoint does not say is not compared.

    Raises:
        ConfigError: naming what differs.
    """
    new = what_must_not_change(config, data)
    differ = _differences(json.loads(state["settings"]), json.loads(new["settings"]))
    old = state.get("isolated")
    if old is not None and (
        old.keys() != new["isolated"].keys() or any(abs(old[z] - e) > 1e-9 for z, e in new["isolated"].items())
    ):
        differ.append("data.isolated_atoms")
    if "start" in state and state["start"] != new["start"] and not (config.start and not config.start.exists()):
        differ.append("start")
    held_out = state.get("held_out", {})
    changed = state["data_hash"] != new["data_hash"]
    if not changed:  # else the split is another, too
        differ += [name for name, value in held_out.items() if value != new["held_out"][name]]
    if differ:
        raise ConfigError(f"{path} was made with other settings; these differ: {', '.join(differ)}")
    if changed:
        raise ConfigError(f"the training data changed since {path} was written")


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return the keys, with dots, of values that differ; a key that one of both does not have is not compared."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [key] if old != new else []
    shared = [name for name in new if name in old]
    return [found for name in shared for found in _differences(old[name], new[name], f"{key}.{name}".lstrip("."))]


def continued(data: Prepared, state: Mapping[str, Any]) -> Prepared:
    """Return prepared data with what the first start of a training knew besides."""
    before, elements = state.get("before", {}), state.get("elements", data.elements)
    prints = Prints.from_dict(before["prints"]) if "prints" in before else data.prints
    return replace(
        data,
        elements=tuple(elements),
        compositions=before.get("compositions", data.compositions),
        isolated_origin=before.get("isolated_origin", data.isolated_origin),
        prints=prints,
    )


def from_start(data: Prepared, config: TrainConfig) -> Prepared:
    """Return prepared data with what the model to start from knew: its zero of energy, and frames that trained it.

    Raises:
        ConfigError: if frames to calibrate on trained it.
    """
    model = load_model(config.start)  # type: ignore[arg-type]
    held = data.split.calibration
    mask = model.trained_on(held)
    if mask.any():
        names = ", ".join(held[k].source for k in np.flatnonzero(mask)[:5])
        raise ConfigError(
            f"`start`: {int(mask.sum())} of {len(held)} frames to calibrate on trained {config.start} ({names}"
            f"{' …' if mask.sum() > 5 else ''}): σ would be too small; give `data.calibration` of others"
        )
    if model.prints is None and held and not config.data.calibration:
        warnings.warn(
            f"`start`: if {config.start} was trained on some of the same frames, those held out now to calibrate on are not new "
            "to it and σ will be too small; give `data.calibration`",
            stacklevel=4,
        )
    known = model.provenance.get("isolated_energies", {}).get("compositions")
    compositions = None if known is None else [*known, *(c for c in data.compositions or [] if c not in known)]
    prints = data.prints if model.prints is None else data.prints.joined(model.prints)
    return replace(data, isolated_origin="the model it started from", compositions=compositions, prints=prints)


def _hash_of(path: Path | None) -> str | None:
    """Return the sha256 of a file's content; None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.exists() else None
