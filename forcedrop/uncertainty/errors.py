"""How wrong a network is on held-out graphs as it stands, with what was found for it after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from forcedrop.derive import derive
from forcedrop.graph import AtomicGraph, batch_graphs, group_by_atoms
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.sampling import predict_graphs


def held_out_errors(
    potential: EnergyModel, graphs: Sequence[AtomicGraph], n_samples: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the root mean square errors of what a network predicts: of its mean over functions, or of the plain network.

    Args:
        potential: the network, with its functions.
        graphs: labelled.
        n_samples: K of masks within the network; of a bank the mean is that of all functions, whatever K is.
        seed: of masks that are drawn.

    Returns:
        ``frames``, ``functions`` (0 for a network without), ``energy_meV``, ``energy_meV_atom``, ``forces_meV_A`` and
        ``stress_meV_A3``; None where no graph has the label.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("energy", "per_atom", "forces", "stress")}
    plain = potential.centred or potential.n_functions == 0
    functions = (potential.n_functions or 0) if plain else (n_samples or 0)
    for graph, (energy, forces, stress) in zip(graphs, _means(potential, graphs, plain, functions, seed), strict=True):
        if bool(graph.has_energy):
            error = energy - float(graph.energy.double())
            found["energy"].append(np.array([error]))
            found["per_atom"].append(np.array([error / len(graph.z)]))
        if bool(graph.has_forces):
            found["forces"].append((forces - graph.forces.double().cpu().numpy()).ravel())
        if bool(graph.has_stress):
            found["stress"].append(stress - graph.stress.double().cpu().numpy().ravel())
    units = {"energy": "energy_meV", "per_atom": "energy_meV_atom", "forces": "forces_meV_A", "stress": "stress_meV_A3"}
    errors = {
        units[name]: 1e3 * float(np.sqrt(np.mean(np.square(np.concatenate(parts))))) if parts else None
        for name, parts in found.items()
    }
    return {"frames": len(graphs), "functions": functions, **errors}


def _means(
    potential: EnergyModel, graphs: Sequence[AtomicGraph], plain: bool, n_samples: int, seed: int
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Return energy, forces and stress of each graph."""
    if not plain:
        predictions = predict_graphs(potential, graphs, n_samples=n_samples, seed=seed)
        return [(float(p.mean["energy"]), p.mean["forces"], p.mean["stress"]) for p in predictions]
    rows = []
    for group in group_by_atoms(graphs, 256):
        batch = batch_graphs(group).to(potential.device)
        with torch.no_grad():
            values = derive(potential, batch)
        ends = batch.ptr.tolist()
        energy, forces, stress = (
            x.detach().double().cpu().numpy() for x in (values.energy, values.forces, values.stress)
        )
        rows += [(float(energy[k]), forces[ends[k] : ends[k + 1]], stress[k]) for k in range(len(group))]
    return rows
