"""Errors and error bars of a model on labelled frames: what ``forcedrop evaluate`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from forcedrop.graph import NeighbourFinder, build_graph
from forcedrop.metrics import UncertaintyReport, atom_norms, auroc, precision_at, rmse, uncertainty_report
from forcedrop.sampling import FramePrediction, predict_graphs
from forcedrop.structures import Frame, check_frames
from forcedrop.structures.checks import BadFrames
from forcedrop.training import Committee, TrainedModel, calibrate

WORST = 0.05
"""The share of atoms that counts as badly predicted in AUROC and precision."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions against references, flat, with σ already calibrated where the model can.

    Each array holds the entries of all frames that carry the label: ``error`` = mean − reference.

    Attributes:
        reference: by property: energy per atom [eV], forces [eV/Å] (components), stress [eV/Å³] (components).
        error: same shapes.
        sigma: same shapes.
        frame: the frame each entry belongs to.
        plain_rmse: of the plain (weight-scaled) network, by property.
        n_frames: number of frames.
        calibrated: whether σ is calibrated, or the raw spread.
    """

    reference: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    sigma: dict[str, np.ndarray]
    frame: dict[str, np.ndarray]
    plain_rmse: dict[str, float]
    total_energy_rmse: float
    n_frames: int
    calibrated: bool

    def reports(self) -> dict[str, UncertaintyReport]:
        """Return the measures of each property."""
        return {name: uncertainty_report(self.error[name], self.sigma[name], self.frame[name]) for name in self.error}

    def detection(self) -> dict[str, float]:
        """Return how well σ finds the worst atoms: AUROC and precision among as many, by the error of the force vector."""
        if "forces" not in self.error:
            return {}
        error, sigma = atom_norms(self.error["forces"].reshape(-1, 3), self.sigma["forces"].reshape(-1, 3))
        threshold = float(np.quantile(error, 1 - WORST))
        bad = error > threshold
        return {
            "threshold": threshold,
            "auroc": auroc(bad, sigma),
            "precision": precision_at(bad, sigma, int(bad.sum())),
            "share": WORST,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, plain, in eV and Å."""
        return {
            "frames": self.n_frames,
            "calibrated": self.calibrated,
            "total_energy_rmse": self.total_energy_rmse,
            "plain_rmse": self.plain_rmse,
            "detection": self.detection(),
            **{name: report.as_dict() for name, report in self.reports().items()},
        }


def predict_frames(
    model: TrainedModel | Committee,
    frames: Sequence[Frame],
    *,
    n_samples: int | None = None,
    seed: int | None = None,
    what: str = "predict",
) -> list[FramePrediction]:
    """Return the prediction for each frame, with σ and without the samples; a progress bar is named ``what``.

    Raises:
        BadFrames: if a frame cannot be computed, such as one with an element that the model does not know.
    """
    problems = check_frames(frames, elements=model.elements)
    if problems:
        raise BadFrames(problems)
    finder = NeighbourFinder(model.cutoff)
    graphs = [build_graph(frame, finder, model.dtype) for frame in frames]
    predictions = predict_graphs(model.predictor(n_samples, seed), graphs, model.device)
    bar = tqdm(predictions, total=len(frames), desc=what, unit="frame")
    sigma = model.calibration.sigma if model.calibration is not None else lambda samples: None
    return [replace(p, sigma=sigma(p.samples), samples={}) for p in bar]


def evaluate(
    model: TrainedModel | Committee,
    frames: Sequence[Frame],
    *,
    n_samples: int | None = None,
    seed: int | None = None,
    predictions: Sequence[FramePrediction] | None = None,
) -> Evaluation:
    """Compare a model with labelled frames.

    Args:
        model: what to judge.
        frames: structures with labels.
        n_samples: K; by default 16, or all masks of a smaller bank.
        seed: of the masks; by default those the model was trained with.
        predictions: from :func:`predict_frames` on these frames, where they exist already.

    Raises:
        BadFrames: if a frame cannot be computed.
        ValueError: if no frame carries an energy, forces or a stress.
    """
    if predictions is None:
        predictions = predict_frames(model, frames, n_samples=n_samples, seed=seed, what="evaluate")
    columns: dict[str, list[list[np.ndarray]]] = {name: [[], [], [], [], []] for name in ("energy", "forces", "stress")}
    totals = []
    for index, (frame, p) in enumerate(zip(frames, predictions, strict=True)):
        for name, column in columns.items():
            label = getattr(frame, name)
            if label is None:
                continue
            per = len(frame) if name == "energy" else 1
            reference = np.ravel(label) / per
            values = (
                np.ravel(p.mean[name]) / per,
                np.ravel(p.error_bars[name]) / per,
                np.ravel(p.plain[name]) / per,
            )
            row = (reference, values[0] - reference, values[1], values[2] - reference)
            for target, value in zip(column, (*row, np.full(reference.shape, index)), strict=True):
                target.append(value)
        if frame.energy is not None:
            totals.append(float(p.mean["energy"]) - frame.energy)
    joined = {name: [np.concatenate(c) for c in column] for name, column in columns.items() if column[0]}
    if not joined:
        raise ValueError("none of the frames carries an energy, forces or a stress to compare with")
    return Evaluation(
        reference={name: c[0] for name, c in joined.items()},
        error={name: c[1] for name, c in joined.items()},
        sigma={name: c[2] for name, c in joined.items()},
        frame={name: c[4] for name, c in joined.items()},
        plain_rmse={name: rmse(c[3]) for name, c in joined.items()},
        total_energy_rmse=rmse(np.array(totals)) if totals else float("nan"),
        n_frames=len(frames),
        calibrated=model.calibration is not None,
    )


def compare(
    models: Mapping[str, TrainedModel | Committee],
    sets: Mapping[str, Sequence[Frame]],
    calibration: Sequence[Frame] | None = None,
    *,
    n_samples: int | None = None,
) -> dict[str, dict[str, Evaluation]]:
    """Judge several models on the same sets.

    Args:
        models: by name; left as they are.
        sets: labelled frames by name.
        calibration: labelled frames on which every model is calibrated anew; without them each keeps its own calibration.
        n_samples: K of those that can choose; by default 16.

    Raises:
        BadFrames: if a frame cannot be computed.
        ValueError: if a model has nothing to sample, or the calibration frames have no labels.
    """
    found: dict[str, dict[str, Evaluation]] = {}
    for name, model in models.items():
        if calibration is not None:
            finder = NeighbourFinder(model.cutoff)
            graphs = [build_graph(frame, finder, model.dtype) for frame in calibration]
            model = replace(model, calibration=calibrate(model, graphs))
        found[name] = {what: evaluate(model, frames, n_samples=n_samples) for what, frames in sets.items()}
    return found


def with_uncertainties(frame: Frame, prediction: FramePrediction) -> Frame:
    """Return the frame with mean and σ beside its labels, in ``info`` and ``arrays`` where no writer drops them.

    Names: ``forcedrop_energy``, ``energy_std``, ``energy_uncertainty`` … ; the uncertainties only of a calibrated model.
    """
    info, arrays = dict(frame.info), dict(frame.arrays)
    for name in ("energy", "energies", "forces", "stress"):
        if name == "stress" and not (frame.pbc.any() and frame.volume > 0):
            continue
        target: dict[str, Any] = arrays if name in ("energies", "forces") else info
        values: dict[str, Any] = {f"forcedrop_{name}": prediction.mean[name], f"{name}_std": prediction.std[name]}
        if prediction.sigma is not None:
            values[f"{name}_uncertainty"] = prediction.sigma[name]
        target.update({k: float(v) if np.ndim(v) == 0 else np.array(v) for k, v in values.items()})
    return Frame(**{**vars(frame), "info": info, "arrays": arrays})


def device_of(name: str) -> torch.device:
    """Return a device by name, ``auto`` being the GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
