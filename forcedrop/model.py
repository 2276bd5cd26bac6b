"""A trained network, its functions, its calibration, and all that is known about it.

One file, one model: everything that inference needs, and nothing that runs code when it is loaded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import forcedrop
from forcedrop.door import door, one_line, short
from forcedrop.files import load_tensors, save_tensors
from forcedrop.graph import AtomicGraph, NeighbourFinder, build_graph
from forcedrop.model_checks import check_model, read_calibration
from forcedrop.potential import DropoutRates, EnergyModel, build
from forcedrop.structures import Frame, check_frames
from forcedrop.structures.checks import BadFrames
from forcedrop.structures.compositions import spanned
from forcedrop.structures.copies import copies, signatures
from forcedrop.structures.prints import Prints
from forcedrop.structures.sequences import halves
from forcedrop.uncertainty.calibration import FEW, FEWEST, Calibration
from forcedrop.uncertainty.ensemble import Ensemble
from forcedrop.uncertainty.errors import held_out_errors
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels, Method, find_functions
from forcedrop.uncertainty.posterior import draws
from forcedrop.uncertainty.sampling import require_functions

FORMAT = 6
SAMPLES = 16
"""Functions of a prediction where nobody asks for another number."""
UNITS = {"length": "Angstrom", "energy": "eV", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3"}


@dataclass
class TrainedModel:
    """A potential and all that is known about it.

    Attributes:
        potential: the network, with its functions.
        calibration: what turns raw spread into σ; None for a model that was not calibrated.
        uncertainty: how its functions were found: ``method``, ``functions``, ``seed``, and what the method chose.
        provenance: training-set hash, element and distance ranges, settings, date, version.
    """

    potential: EnergyModel
    calibration: Calibration | None = None
    uncertainty: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def elements(self) -> tuple[int, ...]:
        """The atomic numbers it knows."""
        return self.potential.elements

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.potential.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.potential.device

    @property
    def cutoff(self) -> float:
        """Of the neighbour lists [Å]."""
        return self.potential.cutoff

    @property
    def seed(self) -> int:
        """Of masks that are drawn; a bank does not look at it."""
        return int(self.uncertainty.get("seed", 0))

    @property
    def n_functions(self) -> int | None:
        """How many functions it has: those of its bank, or the masks it was trained with; None for any number."""
        known = self.potential.n_functions
        return known if known is not None else self.uncertainty.get("functions")

    def graphs(self, frames: Sequence[Frame]) -> list[AtomicGraph]:
        """Return the graphs of frames, with its cutoff and in its precision."""
        finder = NeighbourFinder(self.cutoff)
        return [build_graph(frame, finder, self.dtype) for frame in frames]

    @property
    def prints(self) -> Prints | None:
        """Of the frames that trained it; None for a model from before there were any.

        Raises:
            ValueError: if they are damaged.
        """
        values = self.provenance.get("prints")
        return None if values is None else Prints.from_dict(values)

    def trained_on(self, frames: Sequence[Frame]) -> np.ndarray:
        """Return which frames trained it, as far as it knows: copies, however turned or ordered; shape (n,), bool."""
        prints = self.prints
        return np.zeros(len(frames), bool) if prints is None else prints.hold(frames)

    def refuse_trained(self, frames: Sequence[Frame], purpose: str) -> None:
        """Refuse frames that trained it for what needs frames that did not.

        Raises:
            ValueError: naming the first ones.
        """
        mask = self.trained_on(frames)
        if mask.any():
            names = ", ".join(frames[k].source for k in np.flatnonzero(mask)[:5]) + (" …" if mask.sum() > 5 else "")
            raise ValueError(
                f"{int(mask.sum())} of {len(frames)} frames {purpose} trained the model ({names}): "
                "errors on them are smaller than on others, and σ would be too small"
            )

    def determines_energy(self, z: np.ndarray) -> bool:
        """Return whether the training data determine the energy of a composition, from the atomic numbers (N,) of its atoms.

        Not where energies of isolated atoms were fitted, and the composition is no combination of those that were trained on.
        """
        known = self.provenance.get("isolated_energies", {}).get("compositions")
        return known is None or spanned(z, known)

    def calibration_of(self, n_samples: int) -> Calibration | None:
        """Return the calibration of σ of so many functions; None for fewer than 4, of which there is no calibrated σ."""
        return None if 0 < n_samples < FEWEST else self.calibration

    def need_calibration(self, n_samples: int) -> None:
        """Refuse to compare the σ of so few functions with a limit that calibrated ones are meant for.

        Raises:
            ValueError: if the model has a calibration, and they are fewer than 4.
        """
        if self.calibration is not None and self.calibration_of(n_samples) is None:
            raise ValueError(
                f"there is no calibrated σ of fewer than {FEWEST} functions to hold against a limit, asked for {n_samples}; "
                f"take {FEW} or more"
            )

    def functions_for(self, n_samples: int | None = None, seed: int | None = None) -> tuple[int, int]:
        """Return how many functions to use, and the seed of masks that are drawn: by default the first 16.

        Warns (``UserWarning``) about masks that are not among those of the training, and about fewer than 8 functions.

        Raises:
            ValueError: if there are not so many.
        """
        known = self.n_functions
        if n_samples is None:
            n_samples = min(SAMPLES, known or SAMPLES)
        seed = self.seed if seed is None else seed
        require_functions(self.potential, n_samples)
        if n_samples < FEWEST:
            warnings.warn(
                f"σ of {n_samples} functions says nothing, errors are any multiple of it: it is the raw spread, not calibrated; "
                f"take {FEW} or more",
                stacklevel=3,
            )
        elif n_samples < FEW:
            warnings.warn(
                f"σ of {n_samples} functions says little: it is itself uncertain by {100 / (2 * n_samples - 2) ** 0.5:.0f} %; "
                f"take {FEW} or more",
                stacklevel=3,
            )
        if self.potential.n_functions is None and known and (seed != self.seed or n_samples > known):
            warnings.warn(
                f"this model was trained with the {known} masks of seed {self.seed}, asked for {n_samples} of seed {seed}: "
                "masks that were not trained predict worse, and their σ is not calibrated",
                stacklevel=3,
            )
        return n_samples, seed


def committee(models: Sequence[TrainedModel]) -> TrainedModel:
    """Return a deep ensemble of several models as one; each is a function, their own functions are not looked at.

    Raises:
        ValueError: if there are fewer than two, two are equal, or they do not fit together.
    """
    ensemble = Ensemble([model.potential for model in models])
    states = [member.state_dict() for member in ensemble.each()]
    for b, own in enumerate(states):
        for a, other in enumerate(states[:b]):
            if own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own):
                raise ValueError(
                    f"members {a + 1} and {b + 1} of the ensemble are equal: their spread says nothing; train with other seeds"
                )
    about = {"method": "ensemble", "functions": len(models)}
    provenance = dict(models[0].provenance)
    provenance.pop("validation", None)  # of one member
    known = [model.prints for model in models]
    prints = [one for one in known if one is not None]
    if prints:
        joined = prints[0]
        for more in prints[1:]:
            joined = joined.joined(more)
        provenance["prints"] = joined.to_dict()
    return TrainedModel(ensemble.eval(), None, about, provenance)


def fill(
    model: TrainedModel,
    train: Sequence[Frame],
    held_out: Sequence[Frame],
    method: Method | None = None,
    *,
    stress: bool = True,
    quiet: bool = False,
) -> TrainedModel:
    """Return a model with functions found anew, calibrated; the network itself stays as it was trained.

    Args:
        model: a trained one, with or without functions; left as it is.
        train: labelled frames that trained it.
        held_out: labelled frames that did not: every other one to choose by, the rest to calibrate on; where they come in
            sequence every other quarter. Copies count once.
        method: how; exact dropout by default.
        stress: whether stress labels count.
        quiet: without progress bars.

    Raises:
        BadFrames: if a frame holds what the model does not know.
        ValueError: if the network or the labels do not allow it, held-out frames trained the model or are among ``train``, or
            there are fewer than 4 different ones.
    """
    from forcedrop.uncertainty.calibrate import calibrate  # only who fits one waits for it

    if problems := check_frames([*train, *held_out], elements=model.elements):
        raise BadFrames(problems)
    method = method or ExactDropout()
    if method.learns:
        raise ValueError(f"functions of method {method.name!r} learn together with the network: train with it instead")
    choosing, calibrating = _choosing_and_calibrating(model, train, held_out)
    potential = deepcopy(model.potential)
    potential.forget_functions()
    of_train, to_choose, to_calibrate = map(model.graphs, (train, choosing, calibrating))
    about = find_functions(potential, method, Labels(of_train, to_choose, stress=stress, quiet=quiet))
    calibration = calibrate(potential, to_calibrate, seed=method.seed) if method.gives_error_bars else None
    provenance = {**model.provenance, "validation": held_out_errors(potential, to_choose)}
    known, prints = model.prints, Prints.taken(signatures(train))
    if known is None or not model.trained_on(train).all():  # what its energies are read with comes from these frames
        provenance["prints"] = (prints if known is None else known.joined(prints)).to_dict()
    return TrainedModel(potential, calibration, about, provenance)


def _choosing_and_calibrating(
    model: TrainedModel, train: Sequence[Frame], held_out: Sequence[Frame]
) -> tuple[list[Frame], list[Frame]]:
    """Return two halves of the held-out frames, each structure once.

    Raises:
        ValueError: if one trained, or there are too few.
    """
    model.refuse_trained(held_out, "that are held out")
    signed = signatures([*train, *held_out])
    first = copies([*train, *held_out], signed)[len(train) :]
    shared = [(own, train[k]) for own, k in zip(held_out, first.tolist(), strict=True) if k < len(train)]
    if shared:
        names = ", ".join(f"{own.source} = {other.source}" for own, other in shared[:5])
        raise ValueError(
            f"{len(shared)} of {len(held_out)} frames that are held out are among the training frames ({names}"
            f"{' …' if len(shared) > 5 else ''}): σ would be too small"
        )
    places = [k for k in range(len(held_out)) if first[k] == len(train) + k]
    if len(places) < 4:
        raise ValueError(
            f"functions need 4 different held-out frames or more, to choose and to calibrate by, got {len(places)}"
        )
    frames = [held_out[k] for k in places]
    parts = halves(frames, [signed[len(train) + k] for k in places])
    return [frames[k] for k in parts[0]], [frames[k] for k in parts[1]]


def save_model(model: TrainedModel, path: str | Path) -> None:
    """Write a model, atomically: a reader finds the old file or the new one, never half of one."""
    potential = model.potential
    save_tensors(
        {
            "format": FORMAT,
            "forcedrop": forcedrop.__version__,
            "units": UNITS,
            "network": _describe(potential),
            "weights": {name: value.detach().cpu() for name, value in potential.state_dict().items()},
            "rates": {name: site.p for name, site in potential.inner_sites.items() if site.p},
            "calibration": model.calibration.to_dict() if model.calibration else None,
            "uncertainty": json.loads(json.dumps(model.uncertainty)),  # plain values or an error, now
            "provenance": json.loads(json.dumps(model.provenance)),
        },
        path,
    )


def load_model(path: str | Path | Sequence[str | Path], device: str | torch.device = "cpu") -> TrainedModel:
    """Read a model; several, as a sequence or joined by ``+``, are a deep ensemble.

    Raises:
        ValueError: if a file is not there, is not a forcedrop model, is of a newer format, or does not hold what it says.
    """
    if isinstance(path, str | Path) and not Path(path).is_file() and "+" in str(path):
        path = str(path).split("+")
    if not isinstance(path, str | Path):
        return committee([load_model(one, device) for one in path])
    values = load_tensors(path)
    if "format" not in values or "weights" not in values:
        raise ValueError(f"{path} is not a forcedrop model (it holds {short(list(values))})")
    if not isinstance(values["format"], int):
        raise ValueError(f"{path} has format {short(values['format'])}, which is no number")
    if values["format"] > FORMAT:
        raise ValueError(f"{path} has format {values['format']}, this forcedrop reads up to {FORMAT}: please update")
    if values["format"] < 4:
        raise ValueError(
            f"{path} has format {values['format']}, of a network that this forcedrop no longer has: please train it anew"
        )
    with door(path):
        if values["format"] == 4:
            values = _from_format_4(values)
        if values["format"] < 6:
            values = {**values, "network": _without_limits(values["network"])}
        check_model(values)
        model = _made_of(values, path)
    model.potential = model.potential.to(device).eval()
    return model


def _made_of(values: Mapping[str, Any], path: str | Path) -> TrainedModel:
    """Return the model that the checked values of a file describe.

    Raises:
        ValueError: naming the file, if they do not fit together.
    """
    wrong = f"{path}: its weights or its bank of functions do not fit its network"
    weights = values["weights"]
    dtypes = {x.dtype for name, x in weights.items() if "isolated" not in name}
    try:
        if len(dtypes) != 1:
            raise ValueError(f"they are of {len(dtypes)} precisions")
        potential = _build(values["network"]).to(dtypes.pop())
        if values["format"] < 6:
            weights = {n: x for n, x in potential.state_dict().items() if n.endswith("approach.shortest")} | dict(
                weights
            )
        potential.load_state_dict(weights)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{wrong}: {one_line(lines[-1])}") from None
    sites = potential.inner_sites
    for name, rate in values["rates"].items():
        if name not in sites:
            raise ValueError(f"{path}: `rates`: the network has no dropout site {short(name)}")
        sites[name].p = rate
    said, there = values["uncertainty"].get("functions"), potential.n_functions
    if None not in (said, there) and said != there:
        raise ValueError(f"{path}: it is to have {short(said)} functions, its bank holds {there}")
    calibration = read_calibration(values["calibration"])
    return TrainedModel(potential.eval(), calibration, dict(values["uncertainty"]), dict(values["provenance"]))


def _describe(potential: EnergyModel) -> dict[str, Any]:
    """Return what a network is made from, in plain values."""
    if isinstance(potential, Ensemble):
        return {"kind": "ensemble", "members": [_describe(member) for member in potential.each()]}
    about = {"kind": potential.kind, "shape": potential.settings(), "elements": list(potential.elements)}
    return about | {"presence": potential.presence is not None}


def _build(network: Mapping[str, Any]) -> EnergyModel:
    """Undo :func:`_describe`."""
    if network["kind"] == "ensemble":
        return Ensemble([_build(member) for member in network["members"]])
    potential = build(network["kind"], network["shape"], tuple(network["elements"]))
    if not network.get("presence", True):
        potential.presence = None
    return potential


def _without_limits(network: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a network of before format 6: without repulsion, without what holds of atoms alone or too close."""
    if network["kind"] == "ensemble":
        return {**network, "members": [_without_limits(member) for member in network["members"]]}
    return {**network, "shape": {**network["shape"], "repulsion": False}, "presence": False}


def _from_format_4(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a model from before there were banks: draws from its posterior, its heads, or its masks."""
    config, old = dict(values["config"]), dict(values["weights"])
    elements, rates, n_heads = config.pop("elements"), DropoutRates(**config.pop("dropout")), config.pop("n_heads", 0)
    if rates.edge:
        warnings.warn("edge dropout by numbers of atoms is no more: this model is used without it", stacklevel=3)
    weights: dict[str, Tensor] = {}
    for name, x in old.items():
        if name not in ("posterior", "refit", "heads"):
            name = name.replace(
                "mask.centre", "update_dropout.centre" if name.startswith("layers") else "hidden_dropout.centre"
            )
            weights[name] = x
    network = {"kind": "sphere", "shape": config, "elements": elements}
    potential, like = _build(network), old["hidden_bias"]
    fresh = potential.state_dict()
    n_sets = fresh["correction.weight"].shape[0]
    if n_sets < len(elements) and ({"posterior", "refit", "heads"} & set(old)):
        raise ValueError(f"a model of {len(elements)} elements with weights of its own for each: please train it anew")
    weights |= {name: fresh[name].to(like) for name in fresh if name.startswith(("correction", "basis", "edges"))}
    if "refit" in old:
        weights["correction.weight"] = old["refit"].unflatten(0, (n_sets, -1))
    seed, method, bank = values["bank_seed"], "none", None
    if n_heads:
        method, bank = "heads", old["heads"] - old["heads"].mean(0)
    elif "posterior" in old:
        method, bank = "posterior", draws(old["posterior"], 64, seed).to(like)
    if bank is not None:
        weights["correction.bank"] = bank.unflatten(1, (n_sets, -1))
    calibration = values["calibration"]
    if bank is None and any((rates.message, rates.update, rates.readout)):
        warnings.warn(
            "trained masks of before belong to other sites: this model is used without them, and has no functions until "
            "`forcedrop fill MODEL --data FRAMES --held-out FRAMES` finds some",
            stacklevel=3,
        )
        calibration = None
    functions = 0 if bank is None else len(bank)
    return {
        "format": 5, "network": network, "weights": weights, "rates": {}, "calibration": calibration,
        "uncertainty": {"method": method, "functions": functions, "seed": seed}, "provenance": values["provenance"],
    }  # fmt: skip
