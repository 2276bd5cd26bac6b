"""Errors and error bars of a model on labelled frames: what ``forcedrop evaluate`` prints."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import Symbols
from tqdm import tqdm

from forcedrop.graph import SIGHT, out_of_sight
from forcedrop.metrics import UncertaintyReport, atom_norms, detection, informative, rmse, uncertainty_report
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame, check_frames
from forcedrop.structures.checks import BadFrames
from forcedrop.structures.copies import copies
from forcedrop.structures.predictions import mark
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.calibration import Calibration, deviations, difference_sigma
from forcedrop.uncertainty.sampling import FramePrediction, predict_graphs

WORST = 0.05
"""The share of atoms that counts as badly predicted in AUROC and precision."""
PROPERTIES = ("energy", "difference", "forces", "stress")
"""What is compared."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions against references, flat, with σ already calibrated where the model can.

    Each array holds the entries of all frames that carry the label: ``error`` = mean − reference.

    Attributes:
        reference: by property: energy per atom [eV], energy differences [eV], forces [eV/Å] (components), stress [eV/Å³]
            (components). A difference is that of two frames in a row of the same atoms; each frame is in one pair at most.
        error: same shapes.
        sigma: same shapes; of a difference from those of the samples, see ``calibration.difference_sigma``.
        frame: the frame each entry belongs to.
        atomic_number: of the atom of each force component, shape (3·N,); empty without forces.
        plain_rmse: of the plain (weight-scaled) network, by property.
        n_frames: number of frames.
        calibrated: whether σ is calibrated, or the raw spread.
        coverage: of the calibration's conformal intervals, by property: the share of errors inside, by the share stated.
        n_samples: of how many functions forces and stress have their σ; 0 where that is not known.
    """

    reference: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    sigma: dict[str, np.ndarray]
    frame: dict[str, np.ndarray]
    atomic_number: np.ndarray
    plain_rmse: dict[str, float]
    total_energy_rmse: float
    n_frames: int
    calibrated: bool
    coverage: dict[str, dict[float, float]] = field(default_factory=dict)
    n_samples: int = 0

    def reports(self) -> dict[str, UncertaintyReport]:
        """Return the measures of each property."""
        return {name: uncertainty_report(self.error[name], self.sigma[name], self.frame[name]) for name in self.error}

    def by_element(self) -> dict[str, UncertaintyReport]:
        """Return the measures of the force components of each element, by symbol; empty without forces.

        An element on whose atoms symmetry forbids all forces is left out.
        """
        found = {}
        for z in np.unique(self.atomic_number):
            own = self.atomic_number == z
            error, sigma, frame = (part["forces"][own] for part in (self.error, self.sigma, self.frame))
            if informative(error, sigma).any():
                found[chemical_symbols[z]] = uncertainty_report(error, sigma, frame)
        return found

    def by_frame(self) -> UncertaintyReport | None:
        """Return the measures of each frame's root mean square force error against that of its σ; None without forces.

        An error that is a root mean square is no Gaussian deviate: z², ENCE and Spearman say how far σ ranks and sizes whole
        frames; likelihoods and the area are those of a half-normal and only to be compared among models.
        """
        if "forces" not in self.error:
            return None
        frames, index = np.unique(self.frame["forces"], return_inverse=True)
        count = np.bincount(index)
        error, sigma = (np.sqrt(np.bincount(index, np.square(x["forces"])) / count) for x in (self.error, self.sigma))
        return uncertainty_report(error, sigma, frames)

    def atoms(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each atom's force error (the norm), its σ (√tr Σ) and its frame, shapes (N,); empty without forces."""
        if "forces" not in self.error:
            return np.empty(0), np.empty(0), np.empty(0)
        error, sigma = atom_norms(self.error["forces"].reshape(-1, 3), self.sigma["forces"].reshape(-1, 3))
        return error, sigma, self.frame["forces"][::3]

    def detection(self) -> dict[str, Any]:
        """Return how well σ finds the worst atoms by the error of the force vector, see :func:`metrics.detection`."""
        error, sigma, frame = self.atoms()
        return detection(error, sigma, WORST, frame) if error.size else {}

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, plain, in eV and Å."""
        return {
            "frames": self.n_frames,
            "samples": self.n_samples,
            "calibrated": self.calibrated,
            "total_energy_rmse": self.total_energy_rmse,
            "plain_rmse": self.plain_rmse,
            "detection": self.detection(),
            "coverage": self.coverage,
            **{name: report.as_dict() for name, report in self.reports().items()},
            "forces_by_element": {name: report.as_dict() for name, report in self.by_element().items()},
            "forces_by_frame": frames.as_dict() if (frames := self.by_frame()) else None,
        }


def predict_frames(
    model: TrainedModel,
    frames: Sequence[Frame],
    *,
    n_samples: int | None = None,
    seed: int | None = None,
    what: str = "predict",
) -> list[FramePrediction]:
    """Return the prediction for each frame with σ; of the samples, calibrated if the model is, only those of the energy.

    A progress bar is named ``what``.

    Raises:
        BadFrames: if a frame cannot be computed, such as one with an element that the model does not know.
    """
    problems = check_frames(frames, elements=model.elements)
    if problems:
        raise BadFrames(problems)
    graphs = model.graphs(frames)
    n_samples, seed = model.functions_for(n_samples, seed)
    predictions = predict_graphs(model.potential, graphs, n_samples=n_samples, seed=seed)
    bar = tqdm(predictions, total=len(frames), desc=what, unit="frame")
    return [_calibrated(model, frame, p) for frame, p in zip(frames, bar, strict=True)]


def predicted_frames(
    model: TrainedModel,
    frames: Iterable[Frame],
    *,
    n_samples: int | None = None,
    seed: int | None = None,
    most_atoms: int = 16_384,
) -> Iterator[Frame]:
    """Yield every frame with energy, forces and stress of the model in the place of labels, marked as such, and σ beside them.

    At most ``most_atoms`` atoms, or one frame, are in memory at a time, however many frames there are.

    Names beyond the labels: ``energies`` (of atoms), ``energy_std``, ``energy_uncertainty``, ``forces_std`` …, in ``info`` and
    ``arrays``; the uncertainties only of a calibrated model.

    Raises:
        BadFrames: if a frame cannot be computed.
    """
    n_samples, seed = model.functions_for(n_samples, seed)
    for block in _blocks(frames, most_atoms):
        problems = check_frames(block, elements=model.elements)
        if problems:
            raise BadFrames(problems)
        _warn_of_energies(model, block)
        found = predict_graphs(model.potential, model.graphs(block), n_samples=n_samples, seed=seed)
        for frame, p in zip(block, found, strict=True):
            yield with_predictions(frame, _calibrated(model, frame, p))


def _blocks(frames: Iterable[Frame], most_atoms: int) -> Iterator[list[Frame]]:
    block: list[Frame] = []
    atoms = 0
    for frame in frames:
        if block and atoms + len(frame) > most_atoms:
            yield block
            block, atoms = [], 0
        block.append(frame)
        atoms += len(frame)
    if block:
        yield block


def _calibrated(model: TrainedModel, frame: Frame, p: FramePrediction) -> FramePrediction:
    """Return a prediction with σ, if the model has a calibration, and with the samples of the energy alone."""
    samples, sigma = p.samples, None
    calibration = model.calibration_of(p.n_samples)
    if calibration is not None:
        samples = calibration.apply(p.samples, frame.z, p.mean)
        sigma = deviations(samples)
    return replace(p, sigma=sigma, samples={"energy": samples["energy"]})


def evaluate(
    model: TrainedModel,
    frames: Sequence[Frame],
    *,
    n_samples: int | None = None,
    seed: int | None = None,
    predictions: Sequence[FramePrediction] | None = None,
) -> Evaluation:
    """Compare a model with labelled frames.

    Forces of atoms out of sight of all others are left out with a warning, as are stress, and an energy whose σ is 0, of their
    frames: near the cutoff a network's forces and spreads fade to 0, whatever was learned. Warns too about frames that trained
    the model, and energies that its training data do not determine.

    Args:
        model: what to judge.
        frames: structures with labels.
        n_samples: K; by default 16, or all functions of a smaller bank.
        seed: of trained masks; by default those of the training.
        predictions: from :func:`predict_frames` on these frames, where they exist already.

    Raises:
        BadFrames: if a frame cannot be computed.
        ValueError: if no frame carries an energy, forces or a stress.
    """
    if predictions is None:
        predictions = predict_frames(model, frames, n_samples=n_samples, seed=seed, what="evaluate")
    _warn_of(model, frames)
    columns: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in PROPERTIES}
    numbers = [np.empty(0, int)]
    bound = [~out_of_sight(f.pos, f.cell, f.pbc, model.cutoff) for f in frames]
    if alone := sum(int((~own).sum()) for own, frame in zip(bound, frames, strict=True) if frame.forces is not None):
        warnings.warn(
            f"{alone} atoms have no neighbour within {SIGHT * model.cutoff:g} Å: the network can know nothing of their forces, "
            "which are left out",
            stacklevel=2,
        )
    for index, (frame, p) in enumerate(zip(frames, predictions, strict=True)):
        for name in ("energy", "forces", "stress"):
            if getattr(frame, name) is not None and _comparable(name, p, bound[index]):
                columns[name].append(_row(frame, p, name, index, bound[index] if name == "forces" else ...))
        if frame.forces is not None:
            numbers.append(np.repeat(frame.z[bound[index]], 3))
    columns["difference"] = _differences(frames, predictions)
    joined = {name: [np.concatenate(c) for c in zip(*rows, strict=True)] for name, rows in columns.items() if rows}
    joined = {name: rows for name, rows in joined.items() if rows[0].size}
    if not joined:
        raise ValueError("none of the frames carries an energy, forces or a stress that can be compared with")
    totals = [
        float(p.mean["energy"]) - f.energy for f, p in zip(frames, predictions, strict=True) if f.energy is not None
    ]
    n_samples = predictions[0].n_samples if len(predictions) else 0
    calibration = model.calibration_of(n_samples)
    found = Evaluation(
        reference={name: c[0] for name, c in joined.items()},
        error={name: c[1] for name, c in joined.items()},
        sigma={name: c[2] for name, c in joined.items()},
        frame={name: c[4] for name, c in joined.items()},
        atomic_number=np.concatenate(numbers),
        plain_rmse={name: rmse(c[3]) for name, c in joined.items()},
        total_energy_rmse=rmse(np.array(totals)) if totals else float("nan"),
        n_frames=len(frames),
        calibrated=calibration is not None,
        n_samples=n_samples,
    )
    return found if calibration is None else replace(found, coverage=_coverage(found, calibration))


def _warn_of(model: TrainedModel, frames: Sequence[Frame]) -> None:
    """Warn about frames on which errors say nothing of others."""
    if trained := int(model.trained_on(frames).sum()):
        warnings.warn(
            f"{trained} of {len(frames)} frames trained the model: errors on them are smaller than on others, z² says nothing",
            stacklevel=3,
        )
    _warn_of_energies(model, [frame for frame in frames if frame.energy is not None])


def _warn_of_energies(model: TrainedModel, frames: Sequence[Frame]) -> None:
    """Warn about frames whose energies the training data do not determine."""
    compositions = Counter(tuple(sorted(frame.z.tolist())) for frame in frames)
    strange = Counter(
        {
            str(Symbols(z).get_chemical_formula()): count
            for z, count in compositions.items()
            if not model.determines_energy(np.array(z))
        }
    )
    if strange:
        names = ", ".join(name for name, _ in strange.most_common(3))
        warnings.warn(
            f"energies of {strange.total()} of {len(frames)} frames ({names}{' …' if len(strange) > 3 else ''}) mean nothing: "
            "the training data did not determine those of their compositions, and no isolated-atom energies were given",
            stacklevel=3,
        )


def _row(frame: Frame, p: FramePrediction, name: str, index: int, chosen: Any) -> tuple[np.ndarray, ...]:
    """Return reference, error, σ, error of the plain pass and frame of one property, flat; energies per atom."""
    per = len(frame) if name == "energy" else 1
    reference = np.ravel(np.asarray(getattr(frame, name))[chosen]) / per
    mean, sigma, plain = (np.ravel(np.asarray(part[name])[chosen]) / per for part in (p.mean, p.error_bars, p.plain))
    return reference, mean - reference, sigma, plain - reference, np.full(reference.shape, index)


def _comparable(name: str, p: FramePrediction, bound: np.ndarray) -> bool:
    """Return whether σ of a property means something where only some atoms have neighbours in sight."""
    if name == "energy":
        return bool(bound.any()) or float(p.error_bars["energy"]) > 0
    return name == "forces" or bool(bound.all())


def _differences(frames: Sequence[Frame], predictions: Sequence[FramePrediction]) -> list[tuple[np.ndarray, ...]]:
    """Return the same of the energy differences of frames 0 and 1, 2 and 3 … where both have energies of the same atoms."""
    rows = []
    for index in range(0, len(frames) - 1, 2):
        (a, b), (p, q) = frames[index : index + 2], predictions[index : index + 2]
        sampled = "energy" in p.samples and "energy" in q.samples
        if sampled and a.energy is not None and b.energy is not None and np.array_equal(np.sort(a.z), np.sort(b.z)):
            reference = a.energy - b.energy
            sigma = difference_sigma(p.samples["energy"], q.samples["energy"])
            if sigma > 0:  # 0 of two copies of one structure: nothing to judge
                error = float(p.mean["energy"] - q.mean["energy"]) - reference
                plain = float(p.plain["energy"] - q.plain["energy"]) - reference
                rows.append(tuple(np.array([x]) for x in (reference, error, sigma, plain, index)))
    return rows


def _coverage(found: Evaluation, calibration: Calibration) -> dict[str, dict[float, float]]:
    """Return the share of errors inside each conformal interval, by property and stated share."""
    errors = {name: (np.abs(found.error[name]), found.sigma[name]) for name in found.error}
    error, sigma, _ = found.atoms()
    errors["atoms"] = (error, sigma)
    return {
        name: {stated: float(np.mean(errors[name][0] <= q * errors[name][1])) for stated, q in quantiles.items()}
        for name, quantiles in calibration.quantiles.items()
        if name in errors and errors[name][0].size
    }


def compare(
    models: Mapping[str, TrainedModel],
    sets: Mapping[str, Sequence[Frame]],
    calibration: Sequence[Frame] | None = None,
    *,
    n_samples: int | None = None,
) -> dict[str, dict[str, Evaluation]]:
    """Judge several models on the same sets.

    Args:
        models: by name; left as they are.
        sets: labelled frames by name.
        calibration: labelled frames on which every model is calibrated anew, copies once; without them each keeps its own
            calibration.
        n_samples: K, at most; by default 16.

    Raises:
        BadFrames: if a frame cannot be computed.
        ValueError: if a model has nothing to sample, or the calibration frames have no labels, trained a model, or are judged on.
    """
    found: dict[str, dict[str, Evaluation]] = {}
    if calibration is not None:
        calibration = _apart(calibration, sets)
        for name, model in models.items():
            model.refuse_trained(calibration, f"to calibrate {name} on")
    for name, model in models.items():
        if calibration is not None:
            graphs = model.graphs(calibration)
            model = replace(model, calibration=calibrate(model.potential, graphs, seed=model.seed))
        most = model.n_functions
        k = n_samples if n_samples is None or most is None else min(n_samples, most)
        found[name] = {what: evaluate(model, frames, n_samples=k) for what, frames in sets.items()}
    return found


def _apart(calibration: Sequence[Frame], sets: Mapping[str, Sequence[Frame]]) -> list[Frame]:
    """Return the calibration frames, each structure once.

    Raises:
        ValueError: if one is in a set to judge on.
    """
    tests = [frame for frames in sets.values() for frame in frames]
    first = copies([*tests, *calibration])[len(tests) :]
    shared = [(own, tests[k]) for own, k in zip(calibration, first.tolist(), strict=True) if k < len(tests)]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(calibration)} frames to calibrate on are to be judged on as well, such as "
            f"{shared[0][0].source} = {shared[0][1].source}: z² would be 1 whatever σ is worth"
        )
    return [frame for k, frame in enumerate(calibration) if first[k] == len(tests) + k]


def with_uncertainties(frame: Frame, prediction: FramePrediction) -> Frame:
    """Return the frame with mean and σ beside its labels, in ``info`` and ``arrays`` where no writer drops them.

    Names: ``forcedrop_energy``, ``energy_std``, ``energy_uncertainty`` … ; the uncertainties only of a calibrated model.
    """
    return _noted(frame, prediction, "forcedrop_")


def with_predictions(frame: Frame, prediction: FramePrediction) -> Frame:
    """Return the frame with the means in the place of its labels, marked as such, and σ beside."""
    stress = prediction.mean["stress"] if _has_stress(frame) else None
    bare = replace(frame, energy=float(prediction.mean["energy"]), forces=prediction.mean["forces"], stress=stress)
    noted = _noted(bare, prediction, "")
    info = {name: value for name, value in noted.info.items() if name not in ("energy", "stress")}
    return mark(replace(noted, info=info, arrays={k: v for k, v in noted.arrays.items() if k != "forces"}))


def _noted(frame: Frame, prediction: FramePrediction, prefix: str) -> Frame:
    """Return the frame with means, under names with a prefix, raw spreads and σ in ``info`` and ``arrays``."""
    info, arrays = dict(frame.info), dict(frame.arrays)
    for name in ("energy", "energies", "forces", "stress"):
        if name == "stress" and not _has_stress(frame):
            continue
        target: dict[str, Any] = arrays if name in ("energies", "forces") else info
        values: dict[str, Any] = {f"{prefix}{name}": prediction.mean[name], f"{name}_std": prediction.std[name]}
        if prediction.sigma is not None:
            values[f"{name}_uncertainty"] = prediction.sigma[name]
        target.update({k: float(v) if np.ndim(v) == 0 else np.array(v) for k, v in values.items()})
    return replace(frame, info=info, arrays=arrays)


def _has_stress(frame: Frame) -> bool:
    return bool(frame.pbc.any()) and frame.volume > 0
