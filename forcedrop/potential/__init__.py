"""The equivariant network with dropout sites: (graph, masks) → energy per atom."""

from forcedrop.potential.network import (
    READOUT_SHIFT,
    DropoutRates,
    GraphInputs,
    Masks,
    Potential,
    PotentialConfig,
    Site,
    require_samples,
)

__all__ = [
    "READOUT_SHIFT",
    "DropoutRates",
    "GraphInputs",
    "Masks",
    "Potential",
    "PotentialConfig",
    "Site",
    "require_samples",
]
