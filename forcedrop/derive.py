r"""The only place that differentiates: energies, forces and stress of one potential or of K at once.

The plain network, and functions that differ only at the end of the network, go the way that is written out by hand in
``potential/pullback.py``; masks further within, and training, go through automatic differentiation.

The energy depends on the positions through the pair vectors alone, so one gradient g = ∂E/∂(pair vectors) gives everything:
the force on atom i is the sum of g over the pairs that leave i minus the sum over those that reach it, the stress is
Σ vec ⊗ g / V (symmetric part), with ASE's sign (positive under tension: σ = ∂E/∂ε / V).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Batch

from forcedrop.graph import pair_vectors
from forcedrop.potential import GraphInputs, Masks, Potential
from forcedrop.potential.neighbours import sum_incoming
from forcedrop.potential.pullback import late_gradients, late_sites

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


def derive(potential: Potential, batch: Batch, masks: Masks | None = None, *, create_graph: bool = False) -> Derived:
    """Return the energy and its derivatives of one function: the plain network, or one with the given masks.

    Args:
        potential: the network.
        batch: from ``forcedrop.graph.batch_graphs``, on the network's device and in its precision.
        masks: one per site; see ``Potential.forward``.
        create_graph: whether the result is to be differentiated again, by the parameters (training).
    """
    graph, vec = potential.inputs(batch), pair_vectors(batch, 2 * potential.config.cutoff)
    masks = masks or {}
    if create_graph or not _late(potential, masks, 1):
        return derive_pairs(potential, graph, vec, batch.volume, masks, create_graph=create_graph)
    one = _derive_late(potential, graph, vec, batch.volume, {name: mask[None] for name, mask in masks.items()})
    return Derived(*(x[0] for x in one))


def derive_pairs(
    potential: Potential,
    graph: GraphInputs,
    vec: Tensor,
    volume: Tensor,
    masks: Masks | None = None,
    *,
    create_graph: bool = False,
) -> Derived:
    """Return the same from plain tensors: pair vectors [Å], shape (N, M, 3), and volumes [Å³], shape (B,)."""
    vec = vec.detach().requires_grad_(True)
    with torch.enable_grad():
        local = potential(vec, graph, masks)
        (gradient,) = torch.autograd.grad(local.sum(), vec, create_graph=create_graph)
    if not create_graph:
        local = local.detach()
    return _assemble(potential, graph, vec.detach(), volume, local, gradient)


def derive_samples(potential: Potential, batch: Batch, masks: Masks) -> Derived:
    """Return the same for K functions in one pass; geometry and all that precedes the first mask is computed once.

    Args:
        potential: the network.
        batch: as in :func:`derive`.
        masks: one per site, sample axis first: (K, C), (K, N, C) or for edges (K, N, M).
    """
    graph, vec = potential.inputs(batch), pair_vectors(batch, 2 * potential.config.cutoff)
    if not _late(potential, masks, 2):
        return derive_pairs_samples(potential, graph, vec, batch.volume, masks)
    return _derive_late(potential, graph, vec, batch.volume, masks)


def _late(potential: Potential, masks: Masks, n_axes: int) -> bool:
    """Say whether nothing but the end of the network is masked, and that for every atom alike."""
    return set(masks) <= late_sites(potential) and all(mask.dim() == n_axes for mask in masks.values())


def _derive_late(potential: Potential, graph: GraphInputs, vec: Tensor, volume: Tensor, masks: Masks) -> Derived:
    local, gradient = late_gradients(potential, vec, graph, masks)
    parts = [_assemble(potential, graph, vec, volume, e, g) for e, g in zip(local, gradient, strict=True)]
    return Derived(*(torch.stack(x) for x in zip(*parts, strict=True)))


def derive_pairs_samples(
    potential: Potential, graph: GraphInputs, vec: Tensor, volume: Tensor, masks: Masks
) -> Derived:
    """Return the K functions' results from plain tensors; shapes as in :func:`derive_pairs`, masks with a sample axis."""

    def total(vec: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        local = potential(vec, graph, masks)
        return local.sum(), local

    per_sample = torch.func.vmap(torch.func.grad(total, has_aux=True), in_dims=(None, 0))
    gradient, local = per_sample(vec, dict(masks))
    assemble = torch.func.vmap(lambda e, g: _assemble(potential, graph, vec, volume, e, g))
    return Derived(*assemble(local, gradient))


def _assemble(
    potential: Potential, graph: GraphInputs, vec: Tensor, volume: Tensor, local: Tensor, gradient: Tensor
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
