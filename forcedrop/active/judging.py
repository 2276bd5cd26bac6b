"""Was the model right about how wrong it is? Fresh labels against the model that had not seen them, and whether to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forcedrop.active.config import StopSection
from forcedrop.active.state import frame_key
from forcedrop.evaluation import evaluate, predict_frames, with_uncertainties
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame
from forcedrop.uncertainty.calibration import frame_criteria

FEWEST = 3
"""Fresh labels below which nothing is judged."""


def judge(model: TrainedModel, fresh: Sequence[Frame]) -> tuple[dict[str, Any], list[Frame]]:
    """Compare fresh labels with the model that the frames were picked with; also return the frames with what it predicted.

    Returns:
        ``frames``; ``force_rmse``, ``force_sigma`` (root mean square of σ) [eV/Å], ``z2`` of force components with its interval
        of 95 % ``z2_low``, ``z2_high``; ``energy_rmse`` [eV/atom] and ``energy_z2``; ``each``, by key: σ and error of the energy
        [eV] and of the largest atomic force [eV/Å]. The frames carry predictions and σ as those of ``forcedrop evaluate`` do.
    """
    if not fresh:
        return {"frames": 0, "each": {}}, []
    predictions = predict_frames(model, fresh, what="judge")
    found = evaluate(model, fresh, predictions=predictions)
    each = {}
    for frame, p in zip(fresh, predictions, strict=True):
        wrong = np.zeros((1, 3)) if frame.forces is None else p.mean["forces"] - frame.forces
        each[frame_key(frame)] = {
            "sigma_energy": float(p.error_bars["energy"]),
            "sigma_max_force": frame_criteria(p.error_bars["forces"], 0.0)["max_force"],
            "error_energy": float(p.mean["energy"]) - float(frame.energy or 0.0),
            "error_max_force": float(np.linalg.norm(wrong, axis=1).max()),
            "error_force_rms": float(np.sqrt(np.mean(np.square(wrong)))),
        }
    reports = found.reports()
    forces, energy = reports["forces"], reports["energy"]
    noted = [with_uncertainties(frame, p) for frame, p in zip(fresh, predictions, strict=True)]
    frames = [replace(frame, info={**frame.info, **each[frame_key(frame)]}) for frame in noted]
    numbers = {
        "frames": len(fresh),
        "force_rmse": forces.rmse,
        "force_sigma": forces.sigma_rms,
        "z2": forces.z2,
        "z2_low": forces.intervals["z2"][0],
        "z2_high": forces.intervals["z2"][1],
        "energy_rmse": energy.rmse,
        "energy_z2": energy.z2,
        "each": each,
    }
    return numbers, frames


def verdict(judged: Mapping[str, Any], settings: StopSection) -> str:
    """Return what the fresh labels say of the model: ``good``, or what is not.

    Good is: the force error is under the wanted one, and the mean z² lies between the limits, so that error and σ agree.
    """
    if judged["frames"] < FEWEST:
        return "too few labels to judge"
    low, high = settings.z2
    faults = []
    if settings.force_rmse is not None and judged["force_rmse"] > settings.force_rmse:
        faults.append("error too large")
    if judged["z2"] > high:
        faults.append("σ too small")
    if judged["z2"] < low:
        faults.append("σ too large")
    return ", ".join(faults) or "good"


def stop_reason(rounds: Sequence[Mapping[str, Any]], labels: int, settings: StopSection) -> str | None:
    """Return why the loop is over, or None.

    Args:
        rounds: of each round that is over, ``verdict``, ``candidates``, ``picked``, ``labelled``.
        labels: how many there are.
        settings: when to stop.
    """
    if labels >= settings.labels:
        return f"the budget of {settings.labels} labels is spent"
    if not rounds:
        return None
    last = rounds[-1]
    if not last["picked"]:
        if last["candidates"] == 0:
            return "exploration meets no new frame to label: σ is too large, or atoms are out of sight of others, from the start"
        return "exploration finds nothing that the model is unsure of"
    if settings.force_rmse is not None and last["verdict"] == "good":
        return f"errors on fresh labels agree with σ and are under {settings.force_rmse:g} eV/Å"
    if len(rounds) > 1 and not any(r["labelled"] for r in rounds[-2:]):
        return "no label of the last two rounds succeeded: see the reasons in audit.csv"
    if len(rounds) >= settings.rounds:
        return f"{settings.rounds} rounds are over"
    return None
