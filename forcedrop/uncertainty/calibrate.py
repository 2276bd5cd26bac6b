"""Fitting a model's calibration on frames that neither trained nor stopped it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from forcedrop.graph import SIGHT, AtomicGraph, out_of_sight
from forcedrop.metrics import atom_norms, informative, nll
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.calibration import (
    CRITERIA,
    FEWEST,
    Calibration,
    Growth,
    conformal_quantiles,
    fit_elements,
    fit_scale,
    frame_criteria,
    local_spread,
)
from forcedrop.uncertainty.sampling import FramePrediction, predict_graphs, require_functions

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
    potential: EnergyModel, graphs: Sequence[AtomicGraph], n_samples: int | None = None, seed: int = 0
) -> Calibration:
    """Return the calibration of a network's functions on labelled graphs.

    Curve and elements' factors are those of the forces where there are any, else one factor is that of the energies. Energies and
    stresses take a further factor of their own where frames left out ask for a larger σ, see :func:`own_factors`.

    Atoms out of sight of all others are left out, with a warning, as are energy and stress of their structures: near the cutoff a
    network's forces and spreads fade to 0, whatever was learned, and no factor makes an error bar of that.

    Args:
        potential: what to calibrate.
        graphs: labelled, on no frame that trained or stopped it.
        n_samples: K; by default 64, or all functions of a smaller bank.
        seed: of masks that are drawn.

    Raises:
        ValueError: if the graphs carry neither forces nor energies, or there are fewer than 4 functions.
    """
    found = _predictions(potential, graphs, n_samples, seed)
    bound = [_bound(graph, potential.cutoff) for graph in graphs]
    if alone := sum(int((~own).sum()) for own in bound):
        warnings.warn(
            f"{alone} atoms of the frames to calibrate on have no neighbour within {SIGHT * potential.cutoff:g} Å: they do not "
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
    apart = own_factors(
        {name: present[name] for name in ("energy", "stress") if name in present and forces is not None}
    )
    for name, factor in apart.items():
        error, spread, n_frames = present[name]
        present[name] = (error, factor * spread, n_frames)
    criteria = [frame_criteria(s["forces"], apart.get("energy", 1.0) * float(s["energy"])) for s in sigma]
    return replace(
        shared,
        own=apart,
        scales=scales,
        quantiles={name: conformal_quantiles(*found_of) for name, found_of in present.items()},
        n_frames=len(graphs),
        n_samples=len(found[0].samples["forces"]),
        levels={name: sorted(frame[name] for frame in criteria) for name in CRITERIA},
    )


def own_factors(entries: Mapping[str, tuple[np.ndarray, np.ndarray, int]]) -> dict[str, float]:
    """Return the factor above 1 of each property's own that held-out frames ask for; none where one for all predicts as well.

    By cross-validation of the likelihood over groups of frames: it must gain by more than the standard error of the gain. None
    makes σ smaller: energies near the training data, which one asks, are the easy ones. In a trial on ethanol at 300 K they
    asked for 0.7, and with it σ of energies at 600 and 1200 K was too small by a factor of 1.9, without by 1.4.

    Args:
        entries: errors, σ by the common factor, and number of frames, by property; entries of a frame stand together.
    """
    found = {}
    for name, (error, sigma, n_frames) in entries.items():
        seen = sigma > 1e-12
        if n_frames < 2 * FOLDS or not seen.any():
            continue
        error, sigma = error[seen], sigma[seen]
        folds = np.arange(len(error)) * FOLDS // len(error)
        gains = []
        for fold in range(FOLDS):
            factor = fit_scale(error[folds != fold], sigma[folds != fold])
            own = folds == fold
            gains.append(nll(error[own], sigma[own]) - nll(error[own], factor * sigma[own]))
        factor = fit_scale(error, sigma)
        if factor > 1 and np.mean(gains) > np.std(gains, ddof=1) / np.sqrt(FOLDS):
            found[name] = factor
    return found


def force_errors(
    potential: EnergyModel, graphs: Sequence[AtomicGraph], n_samples: int | None = None, seed: int = 0
) -> ForceErrors:
    """Return errors and raw spreads of a network's forces on labelled graphs, of as many samples as :func:`calibrate` takes.

    Raises:
        ValueError: if no graph has forces.
    """
    found = _predictions(potential, graphs, n_samples, seed)
    forces = _force_errors(graphs, found, [_bound(graph, potential.cutoff) for graph in graphs])
    if forces is None:
        raise ValueError("none of the graphs has forces")
    return forces


def _predictions(
    potential: EnergyModel, graphs: Sequence[AtomicGraph], n_samples: int | None, seed: int
) -> list[FramePrediction]:
    if n_samples is None:
        n_samples = min(potential.n_functions or SAMPLES, SAMPLES)
    require_functions(potential, n_samples)
    if n_samples < FEWEST:
        raise ValueError(
            f"a calibration needs {FEWEST} functions or more, got {n_samples}: errors are any multiple of such a spread"
        )
    predictions = predict_graphs(potential, graphs, n_samples=n_samples, seed=seed)
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
    if not columns or not len(columns[0]):
        return None
    error, std, *rest = columns
    return ForceErrors(*allowed(error, std), *rest)


def allowed(error: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and spreads with 0 for both where symmetry forbids them: what is left there is rounding.

    Its ratio says nothing, and in a calibration it would outweigh all that does; see :func:`~forcedrop.metrics.informative`.
    """
    if np.any((std <= 0) & (np.abs(error) > 0)):  # whoever fits says so
        return error, std
    seen = informative(error, std)
    return np.where(seen, error, 0.0), np.where(seen, std, 0.0)


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
    if not count:
        return None
    error, spread = np.concatenate(errors), np.concatenate(spreads)
    return (*(allowed(error, spread) if name != "energy" else (error, spread)), count)
