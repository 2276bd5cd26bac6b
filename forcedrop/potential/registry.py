"""The kinds of networks there are: name → where its class is. A new kind is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from forcedrop.menus import chosen
from forcedrop.potential.contract import EnergyModel

KINDS = {
    "sphere": "forcedrop.potential.network:SpherePotential",
    "painn": "forcedrop.potential.painn:PaiNN",
}


def kind_of(name: str) -> type[EnergyModel]:
    """Return the class of a kind.

    Raises:
        ValueError: if there is no such kind.
    """
    found: type[EnergyModel] = chosen(KINDS, name, "kind of network")
    return found


def build(
    kind: str,
    shape: Mapping[str, Any],
    elements: tuple[int, ...],
    isolated_energies: Mapping[int, float] | None = None,
    energy_scale: float = 1.0,
) -> EnergyModel:
    """Return a network with random weights from torch's global generator.

    Args:
        kind: its name.
        shape: its settings by name.
        elements: atomic numbers, ascending.
        isolated_energies: [eV] by atomic number.
        energy_scale: [eV].

    Raises:
        ValueError: for an unknown kind, an unknown setting, or one out of range.
    """
    network = kind_of(kind)
    known = [field.name for field in fields(network.Shape)]
    if unknown := sorted(set(shape) - set(known)):
        raise ValueError(f"a network of kind {kind!r} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return network(network.Shape(**shape), elements, isolated_energies, energy_scale)
