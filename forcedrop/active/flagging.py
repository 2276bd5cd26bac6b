"""Which structures does the model not know? Ranking frames by σ and flagging those above a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from forcedrop.active.picking import Pool, Uncertain, scaled_features, structure_features
from forcedrop.evaluation import predict_frames, with_uncertainties
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame
from forcedrop.structures.streaming import structures_in
from forcedrop.uncertainty.calibration import CRITERIA, MEANING, Calibration, frame_criteria


@dataclass(frozen=True)
class Flags:
    """Frames judged by one criterion.

    Attributes:
        criterion: one of ``forcedrop.uncertainty.calibration.CRITERIA``.
        threshold: σ above which a frame is flagged.
        values: σ of every frame, in the order of the frames.
        ranking: indices of all frames, most uncertain first.
        frames: every frame with predictions and σ in ``info`` and ``arrays``, in the order given.
    """

    criterion: str
    threshold: float
    values: np.ndarray
    ranking: np.ndarray
    frames: list[Frame]

    @property
    def flagged(self) -> list[Frame]:
        """The frames above the threshold, most uncertain first."""
        return [self.frames[i] for i in self.ranking if self.values[i] > self.threshold]

    def summary(self) -> str:
        """Return a sentence."""
        unit = CRITERIA[self.criterion]
        return (
            f"{len(self.flagged)} of {len(self.frames)} frames have a {self.criterion} σ ({MEANING[self.criterion]}) above "
            f"{self.threshold:.4g} {unit}; "
            f"median {np.median(self.values):.4g}, largest {self.values.max():.4g} {unit}"
        )


def flag(
    model: TrainedModel,
    frames: Sequence[Frame],
    *,
    criterion: str = "max_force",
    threshold: float | None = None,
    quantile: float | None = None,
    n_samples: int | None = None,
    seed: int | None = None,
) -> Flags:
    """Predict all frames, rank them by σ, and flag those above a threshold.

    Args:
        model: with a calibration; without one the raw spread is used and a ``threshold`` must be given.
        frames: structures; labels are kept but not looked at.
        criterion: ``max_force`` (largest atomic force σ, the norm of the vector of component σ [eV/Å]), ``mean_force``
            [eV/Å] or ``energy_per_atom`` [eV].
        threshold: σ in the criterion's unit.
        quantile: instead, the σ below which this share of the calibration frames lies; 0.95 if neither is given.
        n_samples: K; by default 16, or all masks of a smaller bank.
        seed: of the masks; by default those the model was trained with.

    Raises:
        ValueError: for an unknown criterion, both a threshold and a quantile, or a quantile without a calibration.
        BadFrames: if a frame cannot be computed.
    """
    if n_samples is not None:
        model.need_calibration(n_samples)
    limit = resolve_threshold(model.calibration, criterion, threshold, quantile)
    predictions = predict_frames(model, frames, n_samples=n_samples, seed=seed, what="flag")
    values = np.empty(len(frames))
    judged = []
    for index, (frame, p) in enumerate(zip(frames, predictions, strict=True)):
        criteria = frame_criteria(p.error_bars["forces"], float(p.error_bars["energy"]))
        values[index] = criteria[criterion]
        noted = with_uncertainties(frame, p)
        info = {
            **noted.info,
            **{f"sigma_{name}": value for name, value in criteria.items()},
            "origin": frame.source,
        }
        judged.append(Frame(**{**vars(noted), "info": info}))
    return Flags(criterion, limit, values, np.argsort(-values, kind="stable"), judged)


def select(
    model: TrainedModel, flags: Flags, number: int | None = None, *, diverse: bool = False, known: Sequence[Frame] = ()
) -> list[Frame]:
    """Return what to label of the flagged frames, most worth it first.

    Args:
        model: that judged them.
        flags: of :func:`flag`.
        number: at most so many; all if None.
        diverse: by σ times the distance, in the network's features, from all that is known or chosen, without near-duplicates, as
            the loop picks; else by σ alone.
        known: frames that are labelled already, for the distance.

    Raises:
        ValueError: if ``number`` is not positive.
    """
    if number is not None and number < 1:
        raise ValueError(f"the number of frames must be positive, got {number}")
    flagged = flags.flagged
    if not diverse or not flagged:
        return flagged[:number]
    own = structure_features(model, flags.frames)
    before = structure_features(model, known) if known else own[:0]
    pool = Pool(flags.values, flags.threshold, *scaled_features(own, before))
    picks = Uncertain().pick(pool, len(flagged) if number is None else number, np.random.default_rng(0))
    return [flags.frames[pick.index] for pick in picks]


def of_flag(path: Path) -> bool:
    """Return whether a file is what ``forcedrop flag`` wrote: every frame looked at has a σ that it was ranked by."""
    if not path.is_file():
        return False
    try:
        first = list(islice(structures_in(path), 1))
    except ValueError:
        return False
    return bool(first) and all(f"sigma_{name}" in first[0].info for name in (*CRITERIA,)) and "origin" in first[0].info


def resolve_threshold(
    calibration: Calibration | None, criterion: str, threshold: float | None, quantile: float | None
) -> float:
    """Return the absolute threshold that was meant.

    Raises:
        ValueError: see :func:`flag`.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    if threshold is not None and quantile is not None:
        raise ValueError("give a threshold or a quantile, not both")
    if threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"the threshold must not be negative, got {threshold}")
        return threshold
    if calibration is None:
        raise ValueError("a quantile needs a calibrated model; give an absolute threshold")
    return calibration.threshold(criterion, 0.95 if quantile is None else quantile)
