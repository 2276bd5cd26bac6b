"""The equivariant network with dropout sites: (graph, masks) → energy per atom."""

from forcedrop.potential.network import (
    DropoutRates,
    GraphInputs,
    Masks,
    Potential,
    PotentialConfig,
    Site,
    dropout_sites,
)

__all__ = ["DropoutRates", "GraphInputs", "Masks", "Potential", "PotentialConfig", "Site", "dropout_sites"]
