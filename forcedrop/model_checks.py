"""Whether a model file says what it must, before a network is made of it: every field, and every number finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from forcedrop.door import Refused, short
from forcedrop.potential.registry import kind_of
from forcedrop.potential.settings import LIMITS, check_shape
from forcedrop.uncertainty.calibration import Calibration

_FIELDS = {"network": Mapping, "weights": Mapping, "rates": Mapping, "uncertainty": Mapping, "provenance": Mapping}
_POSITIVE = (".rms", "energy_scale")
"""Ends of the names of weights that are divided by, or by which everything is multiplied."""
MOST_SEED = 2**64
LARGEST = 1e15
"""Of a calibration no number is as large."""


def check_model(values: Mapping[str, Any]) -> None:
    """Check the fields of a model file of the present format.

    Raises:
        Refused: naming the field and what is wrong with it.
    """
    for name, kind in _FIELDS.items():
        if not isinstance(values.get(name), kind):
            raise Refused(f"`{name}` must hold names and values, got {short(values.get(name))}")
    check_weights(values["weights"])
    check_network(values["network"], sum(x.numel() for x in values["weights"].values()))
    for name, rate in values["rates"].items():
        if not isinstance(name, str) or not isinstance(rate, float | int) or not 0 <= rate < 1:
            raise Refused(f"`rates` must lie in [0, 1), got {short(rate)} for {short(name)}")
    about = values["uncertainty"]
    if not isinstance(about.get("method", "none"), str):
        raise Refused(f"`uncertainty.method` must be a name, got {short(about['method'])}")
    for name in ("functions", "seed"):
        _require_count(f"uncertainty.{name}", about.get(name, 0), -MOST_SEED if name == "seed" else 0)
    if not isinstance(values.get("calibration"), Mapping | None):
        raise Refused(f"`calibration` must hold names and values, got {short(values['calibration'])}")


def check_weights(weights: Mapping[str, Any]) -> None:
    """Check that weights are tensors of finite numbers, and that norms are positive.

    Raises:
        Refused: naming the weight.
    """
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise Refused(f"`weights` must hold dense tensors by name, got {short(value)} for {short(name)}")
        if not value.dtype.is_floating_point:
            raise Refused(f"`weights`: {short(name)} holds no floating-point numbers")
        if not torch.isfinite(value).all():
            raise Refused(f"`weights`: {short(name)} holds a number that is not finite")
        if name.endswith(_POSITIVE) and not (value > 0).all():
            raise Refused(f"`weights`: {short(name)} must be positive")


def check_network(network: Any, n_weights: int) -> None:
    """Check what a network is to be made from, against how many numbers there are for it.

    Raises:
        Refused: naming the setting.
    """
    if not isinstance(network, Mapping) or "kind" not in network:
        raise Refused(f"`network` must say its kind, got {short(network)}")
    if network["kind"] == "ensemble":
        members = network.get("members")
        if not isinstance(members, Sequence) or isinstance(members, str) or not 2 <= len(members) <= n_weights:
            raise Refused(f"`network.members` must be two or more, got {short(members)}")
        for member in members:
            check_network(member, n_weights)
        return
    elements, shape = network.get("elements"), network.get("shape")
    known = range(1, len(chemical_symbols))
    if not isinstance(elements, Sequence) or not elements or not all(type(z) is int and z in known for z in elements):
        raise Refused(f"`network.elements` must be atomic numbers, got {short(elements)}")
    if list(elements) != sorted(set(elements)):
        raise Refused(f"`network.elements` must ascend, got {short(elements)}")
    if not isinstance(shape, Mapping):
        raise Refused(f"`network.shape` must hold names and values, got {short(shape)}")
    check_shape(kind_of(network["kind"]).Shape, shape)
    counts = {name: value for name, value in shape.items() if name in LIMITS and name.startswith("n_")}
    if counts and max(counts.values()) * counts.get("n_layers", 1) > n_weights:
        raise Refused(f"`network.shape` is of a larger network than there are weights for: {short(counts)}")


def read_calibration(values: Mapping[str, Any] | None) -> Calibration | None:
    """Return a calibration from plain values, checked.

    Raises:
        Refused: for missing or unknown entries, or numbers that cannot be.
    """
    if values is None:
        return None
    try:
        found = Calibration.from_dict(values)
    except (TypeError, KeyError, ValueError) as error:
        raise Refused(f"`calibration` cannot be read: {short(str(error))}") from error
    curve = found.curve
    _require_numbers("calibration.curve.scale", [curve.scale], above=0)
    _require_numbers("calibration.curve.exponent", [curve.exponent], above=-100)
    _require_numbers("calibration.curve.reference", [curve.reference], above=0)
    for name in ("elements", "own", "scales", "quantiles", "levels"):
        if not isinstance(getattr(found, name), dict):
            raise Refused(f"`calibration.{name}` must hold names and values, got {short(getattr(found, name))}")
    if not all(type(z) is int and 0 < z < len(chemical_symbols) for z in found.elements):
        raise Refused(f"`calibration.elements` must be named by atomic number, got {short(found.elements)}")
    for name in ("elements", "own", "scales"):
        _require_numbers(f"calibration.{name}", list(getattr(found, name).values()), above=0)
    for name, by_coverage in found.quantiles.items():
        if not isinstance(by_coverage, dict):
            raise Refused(f"`calibration.quantiles.{name}` must hold numbers by coverage, got {short(by_coverage)}")
        _require_numbers(f"calibration.quantiles.{name}", [*by_coverage, *by_coverage.values()], above=-1e-300)
    for name, values_ in found.levels.items():
        if not isinstance(values_, list):
            raise Refused(f"`calibration.levels.{name}` must be a list, got {short(values_)}")
        _require_numbers(f"calibration.levels.{name}", values_, above=-1e-300)
    _require_count("calibration.n_frames", found.n_frames, 0)
    _require_count("calibration.n_samples", found.n_samples, 0)
    return found


def _require_numbers(name: str, values: Sequence[Any], above: float) -> None:
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < LARGEST:
            raise Refused(f"`{name}` must be a number above {above:g} and below {LARGEST:g}, got {short(value)}")


def _require_count(name: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < MOST_SEED:
        raise Refused(f"`{name}` must be a whole number, got {short(value)}")
