r"""The pair potential below a network, found from the training labels by least squares before training begins.

Unknown are the coefficients of every pair of elements and an energy of every element; known are forces, and energies per √N,
minus the repulsion's. A ridge of a millionth of the mean squared column keeps what the labels do not say at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forcedrop.derive import geometry
from forcedrop.graph import AtomicGraph, batch_graphs
from forcedrop.potential import EnergyModel
from forcedrop.potential.baseline import N_RADIAL
from forcedrop.potential.contract import lengths
from forcedrop.potential.limits import with_slopes

FRAMES = 1000
"""Frames at even distances that are looked at, at most."""
MOST_PAIRS = 500
"""Pairs of elements with coefficients of their own: the most frequent ones."""
RIDGE = 1e-6


def fit_baseline(potential: EnergyModel, graphs: Sequence[AtomicGraph]) -> None:
    """Set the coefficients of ``potential.baseline``, on the CPU; 0 where no labels speak for any."""
    if potential.baseline is None:
        return
    chosen = [graphs[k * len(graphs) // min(len(graphs), FRAMES)] for k in range(min(len(graphs), FRAMES))]
    place, n_pairs = _pairs(potential, chosen)
    n = n_pairs * N_RADIAL
    matrix = torch.zeros(n + len(potential.elements), n + len(potential.elements), dtype=torch.float64)
    right = torch.zeros(len(matrix), dtype=torch.float64)
    for graph in chosen:
        for rows, label in _rows(potential, graph, place, n_pairs):
            matrix += rows.T @ rows
            right += rows.T @ label
    if not right.any():
        return
    ridge = RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    solved = torch.linalg.solve(matrix + ridge, right)
    found = torch.cat([solved[:n].reshape(n_pairs, N_RADIAL), solved.new_zeros(1, N_RADIAL)])
    potential.baseline.set(found[place])


def _pairs(potential: EnergyModel, graphs: Sequence[AtomicGraph]) -> tuple[Tensor, int]:
    """Return the row of coefficients of every pair of elements, (elements, elements), and how many there are.

    Pairs that are not there, or too many, have the row behind the last.
    """
    s = len(potential.elements)
    counts = torch.zeros(s, s, dtype=torch.int64)
    for graph in graphs:
        own, other = potential.species_of_z[graph.z][graph.edge_index]
        counts.view(-1).index_add_(0, own * s + other, torch.ones_like(own))
    upper = torch.triu(counts)
    found = upper.flatten().argsort(descending=True)[:MOST_PAIRS]
    found = found[upper.flatten()[found] > 0]
    place = torch.full((s, s), len(found))
    place.view(-1)[found] = torch.arange(len(found))
    return torch.minimum(place, place.T), len(found)


def _rows(potential: EnergyModel, graph: AtomicGraph, place: Tensor, n_pairs: int) -> list[tuple[Tensor, Tensor]]:
    """Return derivatives of forces (3N, unknowns) and of the energy per √N (1, unknowns), each with what the labels leave."""
    inputs, vec = geometry(potential, batch_graphs([graph]))
    r = lengths(vec.double())
    unit = vec.double() / r[..., None]
    baseline, repulsion = potential.baseline, potential.repulsion
    assert baseline is not None
    pair = place[inputs.species[:, None], inputs.species[inputs.nbr]]
    value, slope = baseline.radial.with_slope(r)
    atoms, width = torch.arange(len(r))[:, None], n_pairs + 1
    wall, steep = (
        with_slopes(lambda r: repulsion(r, inputs.species, inputs.nbr, potential.cutoff), r)
        if repulsion is not None
        else (r.new_zeros(len(r)), torch.zeros_like(r))
    )
    rows: list[tuple[Tensor, Tensor]] = []
    counts = torch.bincount(inputs.species, minlength=len(potential.elements)).double()
    if bool(graph.has_forces):
        push = r.new_zeros(len(r) * width, 3 * N_RADIAL)
        each = (unit[..., :, None] * slope[..., None, :]).flatten(2)
        push.index_add_(0, (atoms * width + pair).flatten(), each.flatten(0, 1))
        own = push.view(len(r), width, 3, N_RADIAL)[:, :-1].permute(0, 2, 1, 3).reshape(3 * len(r), -1)
        left = graph.forces.double() - 2 * (steep[..., None] * unit).sum(1)
        rows.append((torch.cat([own, own.new_zeros(len(own), len(counts))], dim=1), left.flatten()))
    if bool(graph.has_energy):
        sums = r.new_zeros(width, N_RADIAL).index_add(0, pair.flatten(), 0.5 * value.flatten(0, 1))
        left = graph.energy - potential.isolated_energy(inputs.species).sum() - wall.sum()
        rows.append((torch.cat([sums[:-1].flatten(), counts])[None] / len(r) ** 0.5, left / len(r) ** 0.5))
    return rows
