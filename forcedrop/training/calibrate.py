"""Fitting a model's calibration on frames that neither trained nor stopped it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from forcedrop.calibration import CRITERIA, Calibration, fit_growth, fit_scale, frame_criteria
from forcedrop.graph import AtomicGraph
from forcedrop.sampling import FramePrediction, predict_graphs
from forcedrop.training.checkpoint import Committee, TrainedModel

SAMPLES = 64
"""Samples of a calibration, more than of a prediction: noise of the spreads would hide how errors grow with them."""


def calibrate(
    model: TrainedModel | Committee, graphs: Sequence[AtomicGraph], n_samples: int | None = None
) -> Calibration:
    """Return the calibration of a model on labelled graphs.

    Factor and growth are those of the forces where there are any, else one factor is that of the energies; what each property
    on its own would ask for is kept beside them.

    Args:
        model: what to calibrate; a calibration that it has already is not looked at.
        graphs: labelled, on no frame that trained or stopped the model.
        n_samples: K; by default 64, or all masks of a smaller bank.

    Raises:
        ValueError: if the graphs carry neither forces nor energies.
    """
    if n_samples is None and isinstance(model, TrainedModel):
        n_samples = min(model.bank or SAMPLES, SAMPLES)
    predictions = predict_graphs(model.predictor(n_samples), graphs, model.device)
    found = list(tqdm(predictions, total=len(graphs), desc="calibration", unit="frame", leave=False))
    forces, energies = (_entries(graphs, found, name) for name in ("forces", "energy"))
    if forces is not None:
        scale, exponent, reference = fit_growth(*(x.reshape(-1, 3) for x in forces))
    elif energies is not None:
        scale, exponent, reference = fit_scale(*energies), 0.0, 1.0
    else:
        raise ValueError("calibration needs frames with forces or energies; there are none among the held-out frames")
    shared = Calibration(scale, exponent, reference)
    sigma = [shared.sigma(p.samples) for p in found]
    entries = {name: _entries(graphs, found, name, sigma) for name in ("energy", "forces", "stress")}
    scales = {name: fit_scale(*pair) for name, pair in entries.items() if pair is not None}
    criteria = [frame_criteria(s["forces"], float(s["energy"])) for s in sigma]
    levels = {name: sorted(frame[name] for frame in criteria) for name in CRITERIA}
    k = len(found[0].samples["energy"])
    return Calibration(scale, exponent, reference, scales, len(graphs), k, levels)


def _entries(
    graphs: Sequence[AtomicGraph], found: Sequence[FramePrediction], name: str, sigma: Sequence[Any] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return errors and spreads, or ``sigma``, of one property, flat; None if no graph has its label."""
    errors, spreads = [], []
    for index, (graph, p) in enumerate(zip(graphs, found, strict=True)):
        if bool(graph[f"has_{name}"]):
            label = graph[name].reshape(np.shape(p.mean[name])).double().cpu().numpy()
            errors.append(np.ravel(p.mean[name] - label))
            spreads.append(np.ravel((p.std if sigma is None else sigma[index])[name]))
    return (np.concatenate(errors), np.concatenate(spreads)) if errors else None
