"""Networks: (pair vectors, neighbours) → energy per atom. ``contract.py``: what one offers; ``registry.py``: which there are."""

from forcedrop.potential.contract import DropoutRates, EnergyModel, Gradients, GraphInputs
from forcedrop.potential.registry import KINDS, build, kind_of

__all__ = ["KINDS", "DropoutRates", "EnergyModel", "Gradients", "GraphInputs", "build", "kind_of"]
