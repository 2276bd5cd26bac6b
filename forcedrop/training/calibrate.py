"""Fitting a model's calibration on frames that neither trained nor stopped it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from forcedrop.calibration import CRITERIA, Calibration, fit_scale, frame_criteria
from forcedrop.graph import AtomicGraph
from forcedrop.sampling import predict_graphs
from forcedrop.training.checkpoint import TrainedModel


def calibrate(model: TrainedModel, graphs: Sequence[AtomicGraph], n_samples: int) -> Calibration:
    """Return the calibration of a model on labelled graphs.

    The factor is that of the forces where there are any, else of the energies; each property's own is kept beside it.

    Raises:
        ValueError: if the graphs carry neither forces nor energies.
    """
    errors: dict[str, list[np.ndarray]] = {"energy": [], "forces": [], "stress": []}
    spreads: dict[str, list[np.ndarray]] = {"energy": [], "forces": [], "stress": []}
    criteria = []
    predictions = predict_graphs(model.potential, graphs, n_samples=n_samples, seed=model.bank_seed)
    bar = tqdm(predictions, total=len(graphs), desc="calibration", unit="frame", leave=False)
    for graph, prediction in zip(graphs, bar, strict=True):
        criteria.append(frame_criteria(prediction.std["forces"], float(prediction.std["energy"])))
        for name in errors:
            if bool(graph[f"has_{name}"]):
                label = graph[name].reshape(np.shape(prediction.mean[name])).double().cpu().numpy()
                errors[name].append(np.ravel(prediction.mean[name] - label))
                spreads[name].append(np.ravel(prediction.std[name]))
    scales = {
        name: fit_scale(np.concatenate(errors[name]), np.concatenate(spreads[name])) for name in errors if errors[name]
    }
    if not {"forces", "energy"} & set(scales):
        raise ValueError("calibration needs frames with forces or energies; there are none among the held-out frames")
    scale = scales["forces"] if "forces" in scales else scales["energy"]
    levels = {name: sorted(scale * frame[name] for frame in criteria) for name in CRITERIA}
    return Calibration(scale, scales, len(graphs), n_samples, levels)
