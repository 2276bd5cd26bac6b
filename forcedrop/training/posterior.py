r"""The posterior of the readouts: how far weights of what energies are read from could move without the training data noticing.

Features are the invariant products of every layer and the hidden channels of the last, each with a weight for every element
(``Potential.features``): more than the trained readouts use, so that what the products of an unknown structure do shows in the
spread. The energy is linear in the F weights w, so for Gaussian errors the posterior is Gaussian with precision

.. math:: H = \sum_{frames} \frac{J_E J_E^T}{N\,\sigma_E^2} + \frac{J_F J_F^T}{\sigma_F^2} + \frac{1}{\langle w^2\rangle}\,1,

and of virials where they are labelled; :math:`J = \partial(\text{energy, forces})/\partial w`, σ the root mean square errors on
frames that did not train (energies and virials per √N); the last term is the prior, of the variance that the trained readouts
have. Source: the last-layer Laplace approximation (Daxberger et al., NeurIPS 2021, arXiv 2106.14806), for potentials Bigi, Chong,
Ceriotti & Grasselli, Mach. Learn.: Sci. Technol. 5, 045018 (2024). Samples of it are potentials; the spread of their forces grows
where features do that the training data did not hold fast.

The mean is that of linear regression on what the network left of its training labels. Its prior is wider than that of the spread,
by 10⁴: on cold and hot frames of ethanol, as in ``benchmarks/honesty.py``, the wide one gave the best mean and the narrow one the
most honest spread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch
from tqdm import tqdm

from forcedrop.derive import VOIGT, derive
from forcedrop.graph import AtomicGraph, batch_graphs, group_by_atoms, pair_vectors
from forcedrop.potential import READOUT_SHIFT, Potential

ROWS = 12
"""Labels per weight that are enough: of more, frames at even distances are left out."""
WIDE = 1e4
"""Variance of the mean's prior, in units of the trained readouts' mean square."""
CHUNK = 8
BATCH_ATOMS = 256


class Posterior(NamedTuple):
    """Gaussian posterior of the weights, in the network's unit.

    Attributes:
        mean: shape (F,); zero where it would make held-out errors larger.
        root: R of the covariance R Rᵀ, shape (F, F).
    """

    mean: Tensor
    root: Tensor


class Jacobian(NamedTuple):
    """Derivatives by the weights, float64, on the CPU: of energies (F, B), forces (F, N, 3) and virials V·stress (F, B, 6)."""

    energy: Tensor
    forces: Tensor
    virial: Tensor


class Scales(NamedTuple):
    """Root mean square errors on held-out frames: energies and virials per √N [eV], forces [eV/Å]; 0 where no label counts."""

    energy: float
    forces: float
    virial: float


def fit_posterior(
    potential: Potential,
    graphs: Sequence[AtomicGraph],
    held: Sequence[AtomicGraph],
    *,
    frames: int | None = None,
    with_stress: bool = True,
    quiet: bool = False,
) -> Posterior:
    """Return the posterior of the weights; the network is left as it is.

    Args:
        potential: a trained network, without a posterior yet.
        graphs: what trained it, labelled.
        held: labelled frames that did not, for σ and to judge the mean by.
        frames: how many of ``graphs`` to use at most; by default as many as give 12 force components a weight.
        with_stress: whether stress labels count.
        quiet: without a progress bar.

    Raises:
        ValueError: if ``held`` has neither energies nor forces.
    """
    scales = _held_errors(potential, held, None, with_stress)
    if not scales.energy and not scales.forces:
        raise ValueError("the posterior of the readouts needs held-out frames with energies or forces")
    chosen = _evenly(graphs, frames or len(graphs), potential.n_readout * ROWS / 3)
    precision = torch.zeros(potential.n_readout, potential.n_readout, dtype=torch.float64)
    pull = torch.zeros(potential.n_readout, dtype=torch.float64)
    batches = group_by_atoms(sorted(chosen, key=lambda graph: graph.num_nodes), BATCH_ATOMS)
    for group in tqdm(batches, desc="posterior of the readouts", unit="batch", leave=False, disable=quiet):
        batch = batch_graphs(group).to(potential.hidden_bias.device)
        for rows, residual in _labelled(potential, batch, scales):
            precision += rows @ rows.T
            pull += rows @ residual
    share = len(graphs) / len(chosen)
    precision, pull = share * precision, share * pull
    prior = 1 / readout_weights(potential).square().mean()
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(min=0)  # rounding
    mean = vectors @ ((vectors.T @ pull) / (values + prior / WIDE))
    root = (vectors / (values + prior).sqrt()) @ vectors.T  # symmetric: no sign of a vector is left to chance
    after = _held_errors(potential, held, mean.to(potential.hidden_bias), with_stress)
    worse = sum((b / a) ** 2 for a, b in zip(scales, after, strict=True) if a) > sum(a > 0 for a in scales)
    return Posterior(
        (torch.zeros_like(mean) if worse else mean).to(potential.hidden_bias), root.to(potential.hidden_bias)
    )


def readout_weights(potential: Potential) -> Tensor:
    """Return the weights of all trained readouts, float64, on the CPU."""
    readouts: Any = [*potential.readouts, potential.output]
    return torch.cat([readout.weight.detach().flatten() for readout in readouts]).double().cpu()


def jacobian(potential: Potential, batch: Batch) -> Jacobian:
    """Return the derivatives of energies, forces and virials by the weights.

    The energy is linear in the weights, so its derivatives are sums of features, and those of forces and virials are the
    features' derivatives by positions and strain: in forward mode, as many passes as the largest structure has coordinates, and
    six, however many features there are.
    """
    graph, vec = potential.inputs(batch), pair_vectors(batch, 2 * potential.config.cutoff)
    n_species, scale = len(potential.config.elements), float(potential.energy_scale)
    place = graph.batch * n_species + graph.species

    def by_weight(values: Tensor) -> Tensor:
        """Sum per-atom values over each structure and element, shape (B, F)."""
        zeros = values.new_zeros((graph.n_graphs * n_species, values.shape[1]), dtype=torch.float64)
        return scale * zeros.index_add(0, place, values.double()).reshape(graph.n_graphs, -1).cpu()

    def along(change: Tensor) -> Tensor:
        """Return the derivative of the features when the pair vectors change so."""
        derivative: Tensor = torch.func.jvp(lambda v: potential.features(v, graph), (vec,), (change,))[1]
        return derivative

    def moved(direction: Tensor) -> Tensor:
        """Return the derivative of the features when atoms move."""
        return along((direction[graph.nbr] - direction[:, None]) * batch.nbr_used[..., None])

    def strained(strain: Tensor) -> Tensor:
        return along((vec @ strain) * batch.nbr_used[..., None])

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
        strains = vec.new_zeros(6, 3, 3)
        for row, i, j in zip(strains, *VOIGT, strict=True):
            row[i, j] += 0.5
            row[j, i] += 0.5
        virial = torch.stack([by_weight(values).T for values in torch.func.vmap(strained)(strains)], dim=2)
    return Jacobian(energy, forces, virial)


def _labelled(potential: Potential, batch: Batch, scales: Scales) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield derivatives (F, n) and residuals (n,) of every kind of label that counts, in units of its σ."""
    found, derivatives = residuals(potential, batch), jacobian(potential, batch)
    root_n = batch.ptr.diff().double().sqrt().cpu()
    energy, forces, stress = (batch.has_energy.cpu(), batch.has_forces[batch.batch].cpu(), batch.has_stress.cpu())
    if scales.energy:
        yield (derivatives.energy / root_n / scales.energy)[:, energy], found.energy / scales.energy
    if scales.forces:
        yield (derivatives.forces / scales.forces)[:, forces].flatten(1), found.forces / scales.forces
    if scales.virial:
        rows = derivatives.virial / root_n[:, None] / scales.virial
        yield rows[:, stress].flatten(1), found.virial / scales.virial


class Residuals(NamedTuple):
    """Label minus prediction of what has one, flat, float64, on the CPU: energies and virials per √N [eV], forces [eV/Å]."""

    energy: Tensor
    forces: Tensor
    virial: Tensor


def residuals(potential: Potential, batch: Batch, shift: Tensor | None = None) -> Residuals:
    """Return what a network, or one with shifted weights, leaves of the labels."""
    found = derive(potential, batch, None if shift is None else {READOUT_SHIFT: shift})
    root_n = batch.ptr.diff().double().sqrt()
    virial = (batch.stress - found.stress).double() * (batch.volume / root_n)[:, None]
    parts = (
        ((batch.energy - found.energy) / root_n)[batch.has_energy],
        (batch.forces - found.forces)[batch.has_forces[batch.batch]],
        virial[batch.has_stress],
    )
    return Residuals(*(part.detach().double().flatten().cpu() for part in parts))


def _held_errors(potential: Potential, held: Sequence[AtomicGraph], shift: Tensor | None, with_stress: bool) -> Scales:
    found = []
    for group in group_by_atoms(held, BATCH_ATOMS):
        batch = batch_graphs(group).to(potential.hidden_bias.device)
        found.append(residuals(potential, batch, shift))
    energy, forces, virial = (
        float(torch.cat(part).square().mean().sqrt().nan_to_num()) for part in zip(*found, strict=True)
    )
    return Scales(energy, forces, virial if with_stress else 0.0)


def _evenly(graphs: Sequence[AtomicGraph], frames: int, atoms: float) -> list[AtomicGraph]:
    """Return graphs at even distances, as many as ``frames`` and ``atoms`` in total allow, at least ten."""
    mean = sum(graph.num_nodes for graph in graphs) / len(graphs)
    n = min(len(graphs), frames, max(10, round(atoms / mean)))
    return [graphs[k * len(graphs) // n] for k in range(n)]
