r"""The only place that turns gradients into forces and stress, of one potential or of K functions at once.

The energy depends on the positions through the pair vectors alone, so one gradient g = ∂E/∂(pair vectors) gives everything:
the force on atom i is the sum of g over the pairs that leave i minus the sum over those that reach it, the stress is
Σ vec ⊗ g / V (symmetric part), with ASE's sign (positive under tension: σ = ∂E/∂ε / V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from forcedrop.graph import Batch, pair_vectors
from forcedrop.potential import EnergyModel, GraphInputs
from forcedrop.potential.contract import lengths
from forcedrop.potential.limits import with_slopes
from forcedrop.potential.neighbours import sum_incoming

VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))


class Derived(NamedTuple):
    """Energies [eV] and derivatives; with K samples every field has the sample axis first.

    Attributes:
        energy: total energy, float64, shape (…, B).
        energies: energy of every atom, float64, shape (…, N).
        forces: [eV/Å], shape (…, N, 3).
        stress: [eV/Å³], Voigt order xx yy zz yz xz xy, shape (…, B, 6); zero where the structure has no volume.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor
    stress: Tensor


def derive(potential: EnergyModel, batch: Batch) -> Derived:
    """Return the energy and its derivatives of one function: the plain network, or that to which it is frozen.

    Args:
        potential: the network.
        batch: from ``forcedrop.graph.batch_graphs``, on the network's device and in its precision.
    """
    graph, vec = geometry(potential, batch)
    return _assemble(potential, graph, vec, batch.volume, *potential.gradients(vec, graph))


def geometry(potential: EnergyModel, batch: Batch) -> tuple[GraphInputs, Tensor]:
    """Return what a network is called with: neighbour lists, and pair vectors [Å] of shape (N, M, 3)."""
    return potential.inputs(batch), pair_vectors(batch, 2 * potential.cutoff, potential.dtype)


def pair_forces(potential: EnergyModel, batch: Batch) -> Tensor:
    """Return the forces [eV/Å] of the pair energies below the network alone, shape (N, 3)."""
    graph, vec = geometry(potential, batch)
    if (repulsion := potential.repulsion) is None:
        return torch.zeros_like(batch.forces)
    r = lengths(vec)
    energies, steep = with_slopes(lambda r: repulsion(r, graph.species, graph.nbr, potential.cutoff), r)
    return _assemble(potential, graph, vec, batch.volume, energies, (steep / r)[..., None] * vec).forces


def derive_pairs(potential: EnergyModel, graph: GraphInputs, vec: Tensor, volume: Tensor) -> Derived:
    """Return the same from plain tensors, to be differentiated again by the weights (training).

    Args:
        potential: the network, frozen or not.
        graph: neighbour lists.
        vec: pair vectors [Å], shape (N, M, 3).
        volume: [Å³], shape (B,).
    """
    vec = vec.detach().requires_grad_(True)
    with torch.enable_grad():
        local = potential(vec, graph)
        (gradient,) = torch.autograd.grad(local.sum(), vec, create_graph=True)
    return _assemble(potential, graph, vec.detach(), volume, local, gradient)


def derive_functions(
    potential: EnergyModel, batch: Batch, samples: Sequence[int], seed: int = 0
) -> tuple[Derived | None, Derived]:
    """Return the plain network's results, and those of the functions ``samples`` in one pass, sample axis first.

    Of a network whose functions differ in the weights of its features alone (``EnergyModel.centred``), energies are those of the
    whole bank, for they need no way back; and the plain network, which is the mean of all, comes with them. Of others it is None.

    Args:
        potential: the network.
        batch: as in :func:`derive`.
        samples: indices of the functions.
        seed: of masks that are drawn; a bank does not look at it.
    """
    graph, vec = geometry(potential, batch)
    chosen = torch.as_tensor(list(samples), dtype=torch.int64, device=vec.device)
    if not potential.centred or potential.correction is None:
        found = potential.function_gradients(vec, graph, chosen, seed)
        return None, _assemble_many(potential, graph, vec, batch.volume, *found)
    bank = potential.correction.bank
    weights = torch.cat([bank.new_zeros((1, *bank.shape[1:])), bank[chosen]])
    (local, gradient), features = potential.centred_gradients(vec, graph, weights)
    plain = _assemble(potential, graph, vec, batch.volume, local[0], gradient[0])
    own = _assemble_many(potential, graph, vec, batch.volume, local[1:], gradient[1:])
    energies = (local[0] + potential.energies_of(features, graph)).to(torch.float64)
    energies = energies + potential.isolated_energy(graph.species)
    energy = torch.stack([_sum_by_graph(own, graph) for own in energies])
    return plain, own._replace(energy=energy, energies=energies)


def _assemble_many(
    potential: EnergyModel, graph: GraphInputs, vec: Tensor, volume: Tensor, local: Tensor, gradient: Tensor
) -> Derived:
    parts = [_assemble(potential, graph, vec, volume, e, g) for e, g in zip(local, gradient, strict=True)]
    return Derived(*(torch.stack(x) for x in zip(*parts, strict=True)))


def _assemble(
    potential: EnergyModel, graph: GraphInputs, vec: Tensor, volume: Tensor, local: Tensor, gradient: Tensor
) -> Derived:
    energies = local.to(torch.float64) + potential.isolated_energy(graph.species)
    energy = _sum_by_graph(energies, graph)
    forces = gradient.sum(1) - sum_incoming(gradient, graph.nbr, graph.reverse)
    virial = _sum_by_graph((vec[..., :, None] * gradient[..., None, :]).sum(1).flatten(1), graph)
    virial = virial.unflatten(1, (3, 3))
    virial = 0.5 * (virial + virial.transpose(1, 2))
    virial = torch.stack([virial[:, i, j] for i, j in zip(*VOIGT, strict=True)], dim=1)
    volume = volume[:, None]
    stress = torch.where(volume > 0, virial / torch.where(volume > 0, volume, torch.ones_like(volume)), 0.0)
    return Derived(energy, energies, forces, stress)


def _sum_by_graph(values: Tensor, graph: GraphInputs) -> Tensor:
    """Sum per-atom values over each structure."""
    if graph.n_graphs == 1:
        return values.sum(0, keepdim=True)
    zeros = values.new_zeros((graph.n_graphs, *values.shape[1:]))
    return zeros.index_add(0, graph.batch, values)
