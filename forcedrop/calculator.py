"""The ASE calculator: a thin adapter that turns atoms into a graph and a prediction into ``results``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.symbols import Symbols
from torch import Tensor

from forcedrop.derive import Derived, derive
from forcedrop.devices import enough_memory, pick_device
from forcedrop.dropout import frozen
from forcedrop.graph import Batch, NeighbourFinder, batch_graphs, build_graph
from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import Frame
from forcedrop.structures.search import check_geometry
from forcedrop.uncertainty.calibration import FEWEST, deviations, force_covariance
from forcedrop.uncertainty.sampling import MAX_MEMORY, Prediction, predict

_VALUES = ("energy", "energies", "forces", "stress")
_CELL = ("stress", "pressure")


class DropoutCalculator(Calculator):
    r"""Means over dropout functions, and error bars, from one trained network.

    ``results`` hold the means ``energy``, ``free_energy`` [eV], ``energies`` [eV], ``forces`` [eV/Å] and ``stress`` [eV/Å³];
    ``X_std``, the raw standard deviation over the functions (ddof 1); ``X_uncertainty``, the calibrated standard deviation
    expected against the reference method, for a model that carries a calibration; and with ``keep_samples`` ``X_ensemble``,
    sample axis first, calibrated about the mean. X is energy, energies, forces, stress; the pressure (−⅓ tr stress) has a
    spread and an uncertainty too, those of the samples' pressures, for its components err together. ``forces_covariance``
    [eV²/Å²], shape (N, 3, 3), is each atom's, of the calibrated samples: the one entry that is not a σ.

    Function k is the same whatever ``n_samples`` is and whatever was computed before, so dynamics conserve energy and runs are
    reproducible. Of a bank of functions that differ in what energies are read from (exact dropout, posterior, heads) the mean is
    that of the whole bank, which is the plain network; energies and their σ use all of the bank in every call, forces and stress
    the K functions that were asked for. Of trained masks and deep ensembles the mean is that of the K functions.

    Args:
        model: a path to a model file, or a loaded model; several paths, in a list or joined by ``+``, are a deep ensemble.
        n_samples: K; by default 16, or all functions of a model that has fewer. At least 4 for a calibrated model, 2 for the raw
            spread of another; fewer than 8 say little, with a warning.
        seed: of trained masks, by default the model's own; others are allowed, with a warning. A bank does not look at it.
        device: ``cpu``, ``cuda``, …; by default the GPU if there is one.
        dtype: precision of the network, by default that of its weights.
        uncertainty_every: 1 computes all K functions at every evaluation. n > 1 takes energy, forces and stress from the plain
            network, which is the mean (of trained masks: from the first of them), at *every* evaluation, one potential throughout
            at the price of one pass, and computes the functions, for σ alone, at every n-th. Between, results hold no σ; asking
            for one (``calc.get_property("forces_std", atoms)``) computes it.
        keep_samples: whether ``results`` also hold every sample.
        skin: of the neighbour list [Å].
        max_memory: of the samples [GiB]; those that do not fit at once are computed one group after another.

    Attributes:
        prediction: the raw samples of the last evaluation; None where it computed none.

    Raises:
        ValueError: if the model cannot be read, has nothing to sample, or K is too small.
    """

    implemented_properties = [  # noqa: RUF012 (as in the base class)
        *_VALUES,
        "free_energy",
        *(f"{name}_{kind}" for name in _VALUES for kind in ("std", "uncertainty", "ensemble")),
        "forces_covariance",
        "pressure_std",
        "pressure_uncertainty",
    ]
    nolabel = True

    def __init__(
        self,
        model: TrainedModel | str | Path | Sequence[str | Path],
        n_samples: int | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        uncertainty_every: int = 1,
        keep_samples: bool = False,
        skin: float = 0.5,
        max_memory: float = MAX_MEMORY,
    ) -> None:
        super().__init__()
        if n_samples is not None and n_samples < 2:
            raise ValueError(f"error bars need at least 2 samples, got n_samples={n_samples}")
        if not max_memory > 0:
            raise ValueError(f"`max_memory` must be positive [GiB], got {max_memory}")
        if uncertainty_every < 1:
            raise ValueError(f"`uncertainty_every` must be at least 1, got {uncertainty_every}")
        self.device = pick_device(device)
        self.model = model if isinstance(model, TrainedModel) else load_model(model)
        self.n_samples, self.seed = self.model.functions_for(n_samples, seed)
        dtype = dtype or self.model.dtype
        same = (self.model.device, self.model.dtype) == (self.device, dtype)
        self.potential = self.model.potential if same else deepcopy(self.model.potential).to(self.device, dtype)
        self.potential.eval()
        self.uncertainty_every = uncertainty_every
        self.keep_samples = keep_samples
        self.max_memory = max_memory
        self._finder = NeighbourFinder(self.potential.cutoff, skin)
        self._evaluations = 0
        self._told: set[bytes] = set()
        self.prediction: Prediction | None = None

    @property
    def sigma_kind(self) -> str:
        """What σ is called in ``results``: ``uncertainty`` for a calibrated model, else ``std``, the raw spread."""
        return "std" if self.model.calibration_of(self.n_samples) is None else "uncertainty"

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill ``results`` for ``atoms``.

        Raises:
            ValueError: for an element that the model does not know, positions or a cell that are not finite or absurdly large, a
                cell that does not fit the periodic directions, or atoms in one place.
            PropertyNotImplementedError: for a stress without a periodic cell, or a σ that needs a calibration.
            MemoryError: for more atoms than fit; the message says what needs less.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        present: Any = self.atoms
        frame = self._checked(Frame.geometry(present, source="atoms"))
        periodic = bool(frame.pbc.any()) and frame.volume > 0
        self._refuse(properties, periodic)
        self._warn_of_energy(frame.z)
        with enough_memory(
            f"{len(frame)} atoms", "fewer atoms, `dtype=torch.float32`, fewer samples or a smaller `max_memory`"
        ):
            results = self._results(frame, properties, system_changes)
        results = {k: v for k, v in results.items() if periodic or not k.startswith(_CELL)}
        for name, value in results.items():
            if not name.endswith(("ensemble", "covariance")) and not np.isfinite(value).all():
                raise ValueError(
                    f"the model's {name} of these atoms are not finite: is a structure like this possible?"
                )
        self.results = results

    def _results(self, frame: Frame, properties: Sequence[str], system_changes: Sequence[str]) -> dict[str, Any]:
        """Return means and spreads."""
        batch = batch_graphs([build_graph(frame, self._finder, self.potential.dtype)]).to(self.device)
        asked = any(name.rpartition("_")[2] in ("std", "uncertainty", "covariance", "ensemble") for name in properties)
        due = self._evaluations % self.uncertainty_every == 0
        self._evaluations += bool(system_changes)
        results: dict[str, Any] = {}
        prediction = None
        if asked or due or self.uncertainty_every == 1:
            prediction = predict(
                self.potential, batch, n_samples=self.n_samples, seed=self.seed, max_memory=self.max_memory
            )
            results.update(self._spread(prediction, frame.z))
        self.prediction = prediction
        best = prediction.mean if prediction and self.uncertainty_every == 1 else self._sample(batch)
        results.update(_single(best, ""))
        results["free_energy"] = results["energy"]
        return results

    def _sample(self, batch: Batch) -> Derived:
        """Return the plain network, where it is the mean; else the first function, which was trained."""
        if self.potential.centred or not any(site.p for site in self.potential.inner_sites.values()):
            return derive(self.potential, batch)
        with frozen(self.potential, self.seed, 0):
            return derive(self.potential, batch)

    def _spread(self, prediction: Prediction, z: np.ndarray) -> dict[str, Any]:
        """Return the raw and the calibrated standard deviations, and the samples if they are to be kept."""
        results = _single(prediction.std, "_std")
        samples = {name: _numpy(x) for name, x in prediction.samples._asdict().items()}
        samples |= {name: samples[name][:, 0] for name in ("energy", "stress")}
        mean = _single(prediction.mean, "")
        results["pressure_std"] = _pressure(samples["stress"])
        calibration = self.model.calibration_of(self.n_samples)
        if calibration is not None:
            samples = calibration.apply(samples, z, mean)
            results["forces_covariance"] = force_covariance(samples["forces"])
            results |= {f"{name}_uncertainty": _scalar(x) for name, x in deviations(samples).items()}
            results["pressure_uncertainty"] = _pressure(samples["stress"])
        if self.keep_samples:
            results |= {f"{name}_ensemble": samples[name] for name in _VALUES}
        return results

    def _checked(self, frame: Frame) -> Frame:
        known = self.model.elements
        if len(frame) == 0:
            raise ValueError("there are no atoms to calculate")
        if not (usable := np.isin(frame.z, known)).all():
            index = int(np.argmin(usable))
            z, names = int(frame.z[index]), ", ".join(chemical_symbols[e] for e in known)
            what = (
                chemical_symbols[z] if 0 < z < len(chemical_symbols) else f"of atomic number {z}, which is no element"
            )
            raise ValueError(f"atom {index} is {what}; the model knows {names}")
        check_geometry(frame.pos, frame.cell)
        return frame

    def _warn_of_energy(self, z: np.ndarray) -> None:
        """Warn, once a composition, where the training data do not determine its energy."""
        key = np.sort(z).tobytes()
        if key not in self._told:
            self._told.add(key)
            if not self.model.determines_energy(z):
                warnings.warn(
                    f"the energy of {Symbols(z).get_chemical_formula()} means nothing: the compositions that the model was "
                    "trained on do not determine it, and no isolated-atom energies were given; differences between structures of "
                    "these atoms do not need them",
                    stacklevel=3,
                )

    def _refuse(self, properties: Sequence[str], periodic: bool) -> None:
        for name in properties:
            if name.startswith(_CELL) and not periodic:
                raise PropertyNotImplementedError("stress needs a periodic structure with a cell")
            if name.endswith(("_uncertainty", "_covariance")) and self.sigma_kind == "std":
                raise PropertyNotImplementedError(
                    f"{name} needs a calibrated model and {FEWEST} functions or more (raw spread: {name[:-11]}std)"
                )
            if name.endswith("_ensemble") and not self.keep_samples:
                raise PropertyNotImplementedError(f"{name} needs DropoutCalculator(..., keep_samples=True)")

    def describe(self) -> dict[str, Any]:
        """Return what decides its numbers beside the model, in plain values."""
        return {
            "n_samples": self.n_samples, "mask_seed": self.seed, "uncertainty_every": self.uncertainty_every,
            "precision": str(self.potential.dtype).removeprefix("torch."),
        }  # fmt: skip

    def copy(self) -> DropoutCalculator:
        """Return an independent calculator of the same function; the network itself is shared."""
        return _rebuild(self.model, self._settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> DropoutCalculator:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {
            "n_samples": self.n_samples, "seed": self.seed, "device": self.device,
            "dtype": self.potential.dtype, "uncertainty_every": self.uncertainty_every,
            "keep_samples": self.keep_samples, "skin": self._finder.skin, "max_memory": self.max_memory,
        }  # fmt: skip


def _rebuild(model: TrainedModel, settings: dict[str, Any]) -> DropoutCalculator:
    return DropoutCalculator(model, **settings)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()


def _scalar(x: np.ndarray) -> Any:
    return float(x) if np.ndim(x) == 0 else x


def _pressure(stress: np.ndarray) -> float:
    """Return the standard deviation of the pressures of the samples, from their stress (K, 6)."""
    return float(stress[:, :3].mean(axis=-1).std(ddof=1))


def _single(values: Derived, suffix: str) -> dict[str, Any]:
    """Return the values of a batch of one structure as ASE wants them."""
    return {
        f"energy{suffix}": float(values.energy[0]),
        f"energies{suffix}": _numpy(values.energies),
        f"forces{suffix}": _numpy(values.forces),
        f"stress{suffix}": _numpy(values.stress[0]),
    }
