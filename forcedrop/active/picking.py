r"""Choosing a batch: uncertain frames that differ from what is known and from one another.

Distance between structures is measured in the network's own features: the mean, over the atoms of each element, of what the
energy is read from, each feature in units of its standard deviation over all structures at hand; the distance is the root mean
square difference. Two frames that the network cannot tell apart are at 0, two drawn at random at about :math:`\sqrt 2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from forcedrop.active.design import Design
from forcedrop.evaluation import predict_frames
from forcedrop.graph import batch_graphs, group_by_atoms, pair_vectors
from forcedrop.model import TrainedModel, committee
from forcedrop.structures import Frame


@dataclass(frozen=True)
class Pool:
    """What there is to choose from.

    Attributes:
        sigma: of every candidate, by which it is flagged, shape (n,).
        threshold: σ above which a candidate is flagged.
        features: of every candidate, scaled, shape (n, D).
        known: of the frames that are labelled already, shape (m, D).
        information: of every candidate, what its label would say, shape (n, K, K); see ``forcedrop.active.design``.
    """

    sigma: np.ndarray
    threshold: float
    features: np.ndarray
    known: np.ndarray
    information: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0)))

    @property
    def flagged(self) -> np.ndarray:
        """Whether σ is above the threshold, shape (n,)."""
        above: np.ndarray = self.sigma > self.threshold
        return above


@dataclass(frozen=True)
class Pick:
    """A choice.

    Attributes:
        index: of the candidate.
        reason: why, in a word.
        score: by which it won; 0 at random.
        distance: to the nearest of what was known or chosen before.
    """

    index: int
    reason: str
    score: float
    distance: float


class Strategy(Protocol):
    """How a batch is chosen."""

    def pick(self, pool: Pool, count: int, rng: np.random.Generator, chosen: Sequence[Pick] = ()) -> list[Pick]:
        """Return at most ``count`` picks, none of them, nor a near-duplicate of them, among those ``chosen`` already."""
        ...


@dataclass(frozen=True)
class Uncertain:
    """Greedily the flagged frame with the largest σ times distance to all that is known or chosen: farthest points, by σ.

    Source: farthest-point sampling (Eldar et al., IEEE Trans. Image Process. 6, 1305 (1997)), here weighted.

    Attributes:
        min_distance: nearer frames are duplicates.
    """

    min_distance: float = 0.1

    def pick(self, pool: Pool, count: int, rng: np.random.Generator, chosen: Sequence[Pick] = ()) -> list[Pick]:
        """Choose; nothing is drawn at random."""
        distance = _distances(pool, chosen)
        picks: list[Pick] = []
        for _ in range(count):
            open_ = pool.flagged & (distance > self.min_distance)
            if not open_.any():
                break
            score = np.where(open_, pool.sigma * np.where(np.isinf(distance), 1.0, distance), -1.0)
            best = int(np.argmax(score))
            picks.append(Pick(best, "uncertain", float(score[best]), float(distance[best])))
            distance = np.minimum(distance, _rms(pool.features, pool.features[best]))
        return picks


@dataclass(frozen=True)
class Informative:
    """Greedily the flagged frame whose label would leave least variance over all candidates, see ``forcedrop.active.design``.

    Attributes:
        min_distance: nearer frames are duplicates.
    """

    min_distance: float = 0.1

    def pick(self, pool: Pool, count: int, rng: np.random.Generator, chosen: Sequence[Pick] = ()) -> list[Pick]:
        """Choose; nothing is drawn at random."""
        design = Design(pool.information)
        for pick in chosen:
            design.add(pick.index)
        distance = _distances(pool, chosen)
        picks: list[Pick] = []
        for _ in range(count):
            open_ = np.flatnonzero(pool.flagged & (distance > self.min_distance))
            if not len(open_):
                break
            gains = design.gains(open_)
            best = int(open_[np.argmax(gains)])
            picks.append(Pick(best, "informative", float(gains.max()), float(distance[best])))
            design.add(best)
            distance = np.minimum(distance, _rms(pool.features, pool.features[best]))
        return picks


@dataclass(frozen=True)
class Random:
    """Any frame, flagged or not: what the others must beat, and an unbiased sample to judge σ on.

    Attributes:
        min_distance: nearer frames are duplicates.
        reason: noted with the picks.
    """

    min_distance: float = 0.1
    reason: str = "random"

    def pick(self, pool: Pool, count: int, rng: np.random.Generator, chosen: Sequence[Pick] = ()) -> list[Pick]:
        """Draw."""
        distance = _distances(pool, chosen)
        picks: list[Pick] = []
        for index in rng.permutation(len(pool.sigma)).tolist():
            if len(picks) == count:
                break
            if distance[index] > self.min_distance:
                picks.append(Pick(index, self.reason, 0.0, float(distance[index])))
                distance = np.minimum(distance, _rms(pool.features, pool.features[index]))
        return picks


STRATEGIES: Mapping[str, Callable[[float], Strategy]] = {
    "uncertain": Uncertain,
    "informative": Informative,
    "random": Random,
    "committee": Uncertain,
}
"""By the name in a loop's file; a committee picks as one network does, by a σ of its own."""


def _distances(pool: Pool, chosen: Sequence[Pick]) -> np.ndarray:
    """Return each candidate's distance to the nearest known or chosen frame; infinity where there is none."""
    distance = np.full(len(pool.features), np.inf)
    for row in [*pool.known, *(pool.features[pick.index] for pick in chosen)]:
        distance = np.minimum(distance, _rms(pool.features, row))
    return distance


def _rms(rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sqrt(np.mean(np.square(rows - row), axis=1))
    return found


def committee_sigma(
    models: Sequence[TrainedModel], frames: Sequence[Frame], calibration: Sequence[Frame], quantile: float
) -> tuple[np.ndarray, float]:
    """Return the largest force spread of several networks on each frame [eV/Å], and its quantile on the calibration frames."""
    ensemble = committee(models)

    def spread(of: Sequence[Frame]) -> np.ndarray:
        found = predict_frames(ensemble, of, what="committee")
        return np.array([np.linalg.norm(p.std["forces"], axis=1).max() for p in found])

    return spread(frames), float(np.quantile(spread(calibration), quantile))


def structure_features(model: TrainedModel, frames: Sequence[Frame]) -> np.ndarray:
    """Return the mean of the atoms' features for each element, joined, shape (n, D); zeros for an element that is not there."""
    potential = model.potential
    graphs = model.graphs(frames)
    elements = len(model.elements)
    rows = []
    with torch.no_grad():
        for group in group_by_atoms(graphs, 256):
            batch = batch_graphs(group).to(model.device)
            inputs = potential.inputs(batch)
            features = potential.features(pair_vectors(batch, 2 * model.cutoff, model.dtype), inputs).double()
            place = inputs.batch * elements + inputs.species
            total = features.new_zeros(len(group) * elements, features.shape[1]).index_add(0, place, features)
            count = features.new_zeros(len(group) * elements).index_add(0, place, features.new_ones(len(place)))
            rows.append((total / count.clamp(min=1)[:, None]).reshape(len(group), -1).cpu().numpy())
    return np.concatenate(rows)


def scaled_features(candidates: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both in units of the standard deviation of each feature over all; features that do not vary are left out."""
    both = np.concatenate([candidates, known])
    scale = both.std(axis=0)
    used = scale > 1e-6 * max(float(scale.max()), 1e-30)
    if not used.any():
        return np.zeros((len(candidates), 1)), np.zeros((len(known), 1))
    return candidates[:, used] / scale[used], known[:, used] / scale[used]
