r"""The posterior of the readouts: how far weights of what energies are read from could move without the training data noticing.

Features are the invariant products of every layer and the hidden channels of the last, each with a weight for every element
(``Potential.features``): more than the trained readouts use, so that what the products of an unknown structure do shows in the
spread. The energy is linear in the F weights w, so for Gaussian errors the posterior is Gaussian with precision

.. math:: H = \sum_{frames} \frac{J_E J_E^T}{N\,\sigma_E^2} + \frac{J_F J_F^T}{\sigma_F^2} + \frac{1}{\langle w^2\rangle}\,1,

:math:`J = \partial(\text{energy, forces})/\partial w`, σ the root mean square errors on frames that did not train (energies
per √N); the last term is the prior, of the variance that the trained readouts have. Source: the last-layer Laplace
approximation (Daxberger et al., NeurIPS 2021, arXiv 2106.14806), for potentials Bigi, Chong, Ceriotti & Grasselli, Mach. Learn.:
Sci. Technol. 5, 045018 (2024). Samples of it are potentials; the spread of their forces grows where features do that the
training data did not hold fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch
from tqdm import tqdm

from forcedrop.derive import derive
from forcedrop.graph import AtomicGraph, batch_graphs, group_by_atoms, pair_vectors
from forcedrop.potential import Potential

FRAMES = 100
"""Training frames, evenly chosen, that the precision is summed over; then it is scaled to all."""
ATOMS = 4000
"""Of these at most so many that they have about as many atoms together: three force rows each, for a few hundred weights."""
CHUNK = 8
BATCH_ATOMS = 256


def fit_posterior(
    potential: Potential,
    graphs: Sequence[AtomicGraph],
    held: Sequence[AtomicGraph],
    *,
    frames: int = FRAMES,
    quiet: bool = False,
) -> Tensor:
    """Return a root R of the posterior's covariance, R Rᵀ = H⁻¹, shape (F, F), in the network's unit of weights.

    Args:
        potential: a trained network.
        graphs: what trained it, labelled.
        held: labelled frames that did not, for σ.
        frames: how many of ``graphs`` to use.
        quiet: without a progress bar.

    Raises:
        ValueError: if ``held`` has neither energies nor forces.
    """
    sigma_energy, sigma_forces = _held_errors(potential, held)
    chosen = _evenly(graphs, frames)
    precision = torch.zeros(potential.n_readout, potential.n_readout, dtype=torch.float64)
    batches = group_by_atoms(chosen, BATCH_ATOMS)
    for group in tqdm(batches, desc="posterior of the readouts", unit="batch", leave=False, disable=quiet):
        batch = batch_graphs(group).to(potential.hidden_bias.device)
        energy, forces = jacobian(potential, batch)
        if sigma_energy > 0:
            root_n = batch.ptr.diff().double().sqrt().cpu()
            rows = energy[:, batch.has_energy.cpu()] / (root_n[batch.has_energy.cpu()] * sigma_energy)
            precision += rows @ rows.T
        if sigma_forces > 0:
            rows = forces[:, batch.has_forces[batch.batch].cpu()].flatten(1) / sigma_forces
            precision += rows @ rows.T
    precision *= len(graphs) / len(chosen)
    identity = torch.eye(len(precision), dtype=torch.float64)
    lower = torch.linalg.cholesky(precision + identity / readout_weights(potential).square().mean())
    root = torch.linalg.solve_triangular(lower, identity, upper=False).T  # H⁻¹ = L⁻ᵀ L⁻¹
    return root.to(potential.hidden_bias)


def readout_weights(potential: Potential) -> Tensor:
    """Return the weights of all readouts, shape (F,), float64, on the CPU."""
    readouts: Any = [*potential.readouts, potential.output]
    return torch.cat([readout.weight.detach().flatten() for readout in readouts]).double().cpu()


def jacobian(potential: Potential, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the derivatives of energies and forces by the weights, (F, B) and (F, N, 3), float64, on the CPU.

    The energy is linear in the weights, so its derivatives are sums of features, and those of the forces are the features'
    derivatives: in forward mode, as many passes as the largest structure has coordinates, however many features there are.
    """
    graph, vec = potential.inputs(batch), pair_vectors(batch, 2 * potential.config.cutoff)
    n_species, scale = len(potential.config.elements), float(potential.energy_scale)
    place = graph.batch * n_species + graph.species

    def by_weight(values: Tensor) -> Tensor:
        """Sum per-atom values over each structure and element, shape (B, F)."""
        zeros = values.new_zeros((graph.n_graphs * n_species, values.shape[1]), dtype=torch.float64)
        return scale * zeros.index_add(0, place, values.double()).reshape(graph.n_graphs, -1).cpu()

    def moved(direction: Tensor) -> Tensor:
        """Return the derivative of the features when atoms move."""
        change = (direction[graph.nbr] - direction[:, None]) * batch.nbr_used[..., None]
        derivative: Tensor = torch.func.jvp(lambda v: potential.features(v, graph), (vec,), (change,))[1]
        return derivative

    local = torch.arange(batch.num_nodes, device=vec.device) - batch.ptr[graph.batch]
    forces = torch.zeros(potential.n_readout, batch.num_nodes, 3, dtype=torch.float64)
    with torch.no_grad():
        energy = by_weight(potential.features(vec, graph)).T
        columns = [(atom, axis) for atom in range(int(local.max()) + 1) for axis in range(3)]
        for first in range(0, len(columns), CHUNK):
            chosen = columns[first : first + CHUNK]
            directions = vec.new_zeros(len(chosen), batch.num_nodes, 3)
            for row, (atom, axis) in zip(directions, chosen, strict=True):
                row[local == atom, axis] = 1.0
            for (atom, axis), values in zip(chosen, torch.func.vmap(moved)(directions), strict=True):
                atoms = (local == atom).nonzero()[:, 0].cpu()
                forces[:, atoms, axis] = -by_weight(values)[batch.batch[atoms].cpu()].T
    return energy, forces


def _held_errors(potential: Potential, held: Sequence[AtomicGraph]) -> tuple[float, float]:
    """Return the root mean square errors of energies per √N [eV] and of force components [eV/Å]; 0 where there is no label."""
    energies: list[Tensor] = []
    forces: list[Tensor] = []
    for group in group_by_atoms(held, BATCH_ATOMS):
        batch = batch_graphs(group).to(potential.hidden_bias.device)
        found = derive(potential, batch)
        root_n = batch.ptr.diff().double().sqrt()
        energies.append(((found.energy - batch.energy) / root_n)[batch.has_energy])
        forces.append((found.forces - batch.forces)[batch.has_forces[batch.batch]].flatten())
    energy, force = (float(torch.cat(x).double().square().mean().sqrt().nan_to_num()) for x in (energies, forces))
    if not energy and not force:
        raise ValueError("the posterior of the readouts needs held-out frames with energies or forces")
    return energy, force


def _evenly(graphs: Sequence[AtomicGraph], frames: int) -> list[AtomicGraph]:
    """Return graphs at even distances, as many as ``frames`` and ``ATOMS`` allow, at least ten."""
    mean = sum(graph.num_nodes for graph in graphs) / len(graphs)
    n = min(len(graphs), frames, max(10, round(ATOMS / mean)))
    return [graphs[k * len(graphs) // n] for k in range(n)]
