"""Fitting a model's calibration on frames that neither trained nor stopped it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from forcedrop.calibration import (
    CRITERIA,
    Calibration,
    Growth,
    Monotone,
    conformal_quantiles,
    fit_elements,
    fit_scale,
    frame_criteria,
    local_spread,
)
from forcedrop.graph import SIGHT, AtomicGraph, out_of_sight
from forcedrop.metrics import atom_norms, nll
from forcedrop.sampling import FramePrediction, predict_graphs
from forcedrop.training.checkpoint import Committee, TrainedModel

SAMPLES = 64
"""Samples of a calibration, more than of a prediction: noise of the spreads would hide how errors grow with them."""
FOLDS = 5
"""Of the calibration frames, to choose what is fitted to them."""


class ForceErrors(NamedTuple):
    """Of all atoms with labels: errors (n, 3), spreads (n, 3), atomic numbers (n,) and frames (n,)."""

    error: np.ndarray
    std: np.ndarray
    z: np.ndarray
    frame: np.ndarray

    def of(self, rows: np.ndarray) -> ForceErrors:
        """Return some of the atoms."""
        return ForceErrors(*(column[rows] for column in self))

    def sigma(self, calibration: Calibration) -> np.ndarray:
        """Return the spreads scaled by a calibration, shape (n, 3)."""
        sigma: np.ndarray = calibration.factors(local_spread(self.std), self.z)[:, None] * self.std
        return sigma


def calibrate(
    model: TrainedModel | Committee, graphs: Sequence[AtomicGraph], n_samples: int | None = None
) -> Calibration:
    """Return the calibration of a model on labelled graphs.

    Curve and elements' factors are those of the forces where there are any, else one factor is that of the energies; what each
    property on its own would ask for is kept beside them.

    Atoms out of sight of all others are left out, with a warning, as are energy and stress of their structures: near the cutoff a
    network's forces and spreads fade to 0, whatever was learned, and no factor makes an error bar of that.

    Args:
        model: what to calibrate; a calibration that it has already is not looked at.
        graphs: labelled, on no frame that trained or stopped the model.
        n_samples: K; by default 64, or all masks of a smaller bank.

    Raises:
        ValueError: if the graphs carry neither forces nor energies.
    """
    found = _predictions(model, graphs, n_samples)
    bound = [_bound(graph, model.cutoff) for graph in graphs]
    if alone := sum(int((~own).sum()) for own in bound):
        warnings.warn(
            f"{alone} atoms of the frames to calibrate on have no neighbour within {SIGHT * model.cutoff:g} Å: they do not "
            "count, σ is near 0 there",
            stacklevel=2,
        )
    forces = _force_errors(graphs, found, bound)
    energies = _entries(graphs, found, bound, "energy", [p.std for p in found])
    if forces is not None:
        shared = choose(forces)
    elif energies is not None:
        shared = Calibration(Growth(fit_scale(*energies[:2])))
    else:
        raise ValueError("calibration needs frames with forces or energies; there are none among the held-out frames")
    sigma = [shared.sigma(p.samples, graph.z.cpu().numpy()) for graph, p in zip(graphs, found, strict=True)]
    entries = {name: _entries(graphs, found, bound, name, sigma) for name in ("energy", "forces", "stress")}
    present = {name: found_of for name, found_of in entries.items() if found_of is not None}
    scales = {name: fit_scale(error, own) for name, (error, own, _) in present.items()}
    if "forces" in present:
        error, own, n_frames = present["forces"]
        present["atoms"] = (*atom_norms(error.reshape(-1, 3), own.reshape(-1, 3)), n_frames)
    criteria = [frame_criteria(s["forces"], float(s["energy"])) for s in sigma]
    return replace(
        shared,
        scales=scales,
        quantiles={name: conformal_quantiles(*found_of) for name, found_of in present.items()},
        n_frames=len(graphs),
        n_samples=len(found[0].samples["energy"]),
        levels={name: sorted(frame[name] for frame in criteria) for name in CRITERIA},
    )


def force_errors(
    model: TrainedModel | Committee, graphs: Sequence[AtomicGraph], n_samples: int | None = None
) -> ForceErrors:
    """Return errors and raw spreads of a model's forces on labelled graphs, of as many samples as :func:`calibrate` takes.

    Raises:
        ValueError: if no graph has forces.
    """
    found = _predictions(model, graphs, n_samples)
    forces = _force_errors(graphs, found, [_bound(graph, model.cutoff) for graph in graphs])
    if forces is None:
        raise ValueError("none of the graphs has forces")
    return forces


def _predictions(
    model: TrainedModel | Committee, graphs: Sequence[AtomicGraph], n_samples: int | None
) -> list[FramePrediction]:
    if n_samples is None and isinstance(model, TrainedModel):
        n_samples = min(model.bank or SAMPLES, SAMPLES)
    predictions = predict_graphs(model.predictor(n_samples), graphs, model.device)
    return list(tqdm(predictions, total=len(graphs), desc="calibration", unit="frame", leave=False))


def choose(forces: ForceErrors) -> Calibration:
    """Return the calibration of the forces that predicts the likelihood of frames left out best, by cross-validation.

    From simple to rich: one factor, growth, growth with elements' factors. A richer one is taken if it is better by more than the
    standard error of the gain over the folds. Fewer than 10 frames decide nothing: one factor.
    """
    if len(np.unique(forces.frame)) < 2 * FOLDS:
        return one_factor(forces)
    best, best_scores = 0, cross_validate(forces, CANDIDATES[0])
    for number, candidate in enumerate(CANDIDATES[1:], start=1):
        scores = cross_validate(forces, candidate)
        gain = best_scores - scores
        if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
            best, best_scores = number, scores
    return CANDIDATES[best](forces)


def one_factor(forces: ForceErrors) -> Calibration:
    """Return one factor for all."""
    return Calibration(Growth(fit_scale(forces.error, forces.std)))


def growing(forces: ForceErrors) -> Calibration:
    """Return a factor that grows with the spread."""
    return Calibration(Growth.fit(forces.error, forces.std))


def monotone(forces: ForceErrors) -> Calibration:
    """Return the factor of an isotonic regression; to compare with, see ``benchmarks/honesty.py``."""
    return Calibration(Monotone.fit(forces.error, forces.std))


def growing_by_element(forces: ForceErrors) -> Calibration:
    """Return a growing factor and one of each element."""
    alike = growing(forces)
    return replace(alike, elements=fit_elements(forces.error, forces.sigma(alike), forces.z))


CANDIDATES = (one_factor, growing, growing_by_element)


def cross_validate(forces: ForceErrors, candidate: Callable[[ForceErrors], Calibration]) -> np.ndarray:
    """Return the mean negative log-likelihood of the forces of each fold of frames under a calibration fitted to the others."""
    folds = np.unique(forces.frame, return_inverse=True)[1] % FOLDS
    scores = []
    for fold in range(FOLDS):
        own, others = forces.of(folds == fold), forces.of(folds != fold)
        sigma = own.sigma(candidate(others))
        seen = sigma > 1e-12
        scores.append(nll(own.error[seen], sigma[seen]))
    return np.array(scores)


def _force_errors(
    graphs: Sequence[AtomicGraph], found: Sequence[FramePrediction], bound: Sequence[np.ndarray]
) -> ForceErrors | None:
    rows = []
    for index, (graph, p, seen) in enumerate(zip(graphs, found, bound, strict=True)):
        if bool(graph.has_forces):
            error = p.mean["forces"] - graph.forces.double().cpu().numpy()
            found_of = (error, p.std["forces"], graph.z.cpu().numpy(), np.full(len(error), index))
            rows.append(tuple(column[seen] for column in found_of))
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    return ForceErrors(*columns) if columns and len(columns[0]) else None


def _bound(graph: AtomicGraph, cutoff: float) -> np.ndarray:
    """Return which atoms the network knows something of, shape (N,)."""
    return ~out_of_sight(graph.pos.cpu().numpy(), graph.cell[0].cpu().numpy(), graph.pbc[0].cpu().numpy(), cutoff)


def _entries(
    graphs: Sequence[AtomicGraph],
    found: Sequence[FramePrediction],
    bound: Sequence[np.ndarray],
    name: str,
    sigma: Sequence[Any],
) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Return errors and ``sigma`` of one property, flat, and of how many graphs; None if no graph has its label."""
    errors, spreads = [], []
    for graph, p, seen, own in zip(graphs, found, bound, sigma, strict=True):
        if bool(graph[f"has_{name}"]) and (name == "forces" or seen.all()):
            label = graph[name].reshape(np.shape(p.mean[name])).double().cpu().numpy()
            chosen = seen if name == "forces" else ...
            errors.append(np.ravel(np.asarray(p.mean[name] - label)[chosen]))
            spreads.append(np.ravel(np.asarray(own[name])[chosen]))
    count = sum(part.size > 0 for part in errors)
    return (np.concatenate(errors), np.concatenate(spreads), count) if count else None
