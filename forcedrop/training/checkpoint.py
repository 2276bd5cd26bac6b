"""One file, one model: everything that inference needs, and nothing that runs code when it is loaded."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import forcedrop
from forcedrop.calibration import Calibration
from forcedrop.potential import Potential, PotentialConfig
from forcedrop.sampling import Predictor, committee, sampled

FORMAT = 4
SAMPLES = 16
"""Masks of a prediction where nobody asks for another number."""
UNITS = {"length": "Angstrom", "energy": "eV", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3"}


@dataclass
class TrainedModel:
    """A potential and all that is known about it.

    Attributes:
        potential: the network.
        calibration: what turns raw spread into σ; None for a model that was not calibrated.
        bank: number of masks or heads it was trained with; 0 if any draw will do.
        bank_seed: their seed.
        provenance: training-set hash, element and distance ranges, settings, date, version.
    """

    potential: Potential
    calibration: Calibration | None = None
    bank: int = 0
    bank_seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers it knows."""
        return self.potential.config.elements

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.potential.hidden_bias.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.potential.hidden_bias.device

    @property
    def cutoff(self) -> float:
        """Of the neighbour lists [Å]."""
        return self.potential.config.cutoff

    def predictor(self, n_samples: int | None = None, seed: int | None = None) -> Predictor:
        """Return the K functions, by default those of :meth:`masks_for`."""
        return sampled(self.potential, *self.masks_for(n_samples, seed))

    def masks_for(self, n_samples: int | None, seed: int | None) -> tuple[int, int]:
        """Return the number of samples and the seed to use: the first 16 masks of the training where None.

        Warns (``UserWarning``) about masks that are not among those of the training.
        """
        n_samples = n_samples if n_samples is not None else default_samples(self.bank)
        seed = self.bank_seed if seed is None else seed
        if self.bank and (seed != self.bank_seed or n_samples > self.bank):
            warnings.warn(
                f"this model was trained with the {self.bank} masks of seed {self.bank_seed}, asked for {n_samples} of seed "
                f"{seed}: masks that were not trained predict worse, and their σ is not calibrated",
                stacklevel=3,
            )
        return n_samples, seed


@dataclass
class Committee:
    """A deep ensemble: separately trained networks, each of which is one function.

    Attributes:
        members: at least two, of the same elements and cutoff.
        calibration: of their spread; None where there is none.
    """

    members: Sequence[TrainedModel]
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Check that they fit together.

        Raises:
            ValueError: if there are fewer than two, or elements or cutoffs differ.
        """
        if len(self.members) < 2:
            raise ValueError(f"a committee needs at least two models, got {len(self.members)}")
        for name in ("elements", "cutoff"):
            values = [getattr(member, name) for member in self.members]
            if len(set(values)) > 1:
                raise ValueError(f"the models of a committee must have the same {name}, got {values}")

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers they know."""
        return self.members[0].elements

    @property
    def cutoff(self) -> float:
        """Of the neighbour lists [Å]."""
        return self.members[0].cutoff

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.members[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.members[0].device

    def predictor(self, n_samples: int | None = None, seed: int | None = None) -> Predictor:
        """Return the functions; there are as many as members, whatever is asked for."""
        return committee([member.potential for member in self.members])


def default_samples(bank: int) -> int:
    """Return K where nobody asks for another: 16, or all masks of a smaller bank."""
    return min(bank or SAMPLES, SAMPLES)


def save_model(model: TrainedModel, path: str | Path) -> None:
    """Write a model, atomically: a reader finds the old file or the new one, never half of one."""
    potential = model.potential
    save_atomically(
        {
            "format": FORMAT,
            "forcedrop": forcedrop.__version__,
            "units": UNITS,
            "config": potential.config.to_dict(),
            "weights": {name: value.detach().cpu() for name, value in potential.state_dict().items()},
            "calibration": model.calibration.to_dict() if model.calibration else None,
            "bank": model.bank,
            "bank_seed": model.bank_seed,
            "provenance": json.loads(json.dumps(model.provenance)),  # plain values or an error, now
        },
        path,
    )


def load_model(path: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Read a model.

    Raises:
        ValueError: if the file is not there, is not a forcedrop model, or is of a newer format.
    """
    values = load_plain(path)
    if not {"format", "config", "weights"} <= set(values):
        raise ValueError(f"{path} is not a forcedrop model (it holds {', '.join(map(str, values))})")
    if values["format"] < FORMAT:
        raise ValueError(
            f"{path} has format {values['format']}, of a network that this forcedrop no longer has: please train it anew"
        )
    if values["format"] > FORMAT:
        raise ValueError(f"{path} has format {values['format']}, this forcedrop reads up to {FORMAT}: please update")
    potential = Potential(PotentialConfig.from_dict(values["config"]))
    potential.to(values["weights"]["hidden_bias"].dtype)
    for name in {"posterior", "refit"} & set(values["weights"]):
        setattr(potential, name, torch.empty_like(values["weights"][name]))
    potential.load_state_dict(values["weights"])
    calibration = values["calibration"]
    return TrainedModel(
        potential=potential.to(device).eval(),
        calibration=Calibration.from_dict(calibration) if calibration else None,
        bank=values["bank"],
        bank_seed=values["bank_seed"],
        provenance=values["provenance"],
    )


def save_atomically(values: dict[str, Any], path: str | Path) -> None:
    """Write with ``torch.save`` beside the target, flush to disk, then rename over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as stream:
        torch.save(values, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def load_plain(path: str | Path) -> dict[str, Any]:
    """Read tensors and plain values only (``weights_only=True``).

    Raises:
        ValueError: if the file is not there or holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a forcedrop model or checkpoint, or is damaged") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a forcedrop model or checkpoint")
    return values
