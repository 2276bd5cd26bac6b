r"""The attraction of pairs below a network, found from the training labels by least squares before training begins.

Unknown are one coefficient for each pair of elements (``potential/repulsion.py``) and an energy for each element; known are
forces, and energies per √N, minus the repulsion's. A coefficient's prior is a Gaussian about 0 of width 2 √eV (bonds have 1 to
1.5), the labels' noise what the fit leaves of them: a pair of elements that hardly meets in training stays without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forcedrop.derive import geometry
from forcedrop.graph import AtomicGraph, batch_graphs
from forcedrop.potential import EnergyModel
from forcedrop.potential.contract import lengths
from forcedrop.potential.repulsion import TightBindingRepulsion

FRAMES = 1000
"""Frames at even distances that are looked at, at most."""
WIDTH = 2.0
"""Of a coefficient's prior [√eV]."""


def fit_bonds(potential: EnergyModel, graphs: Sequence[AtomicGraph]) -> None:
    """Set the coefficients of the pairs below a network, on the CPU; 0 where there is nothing to learn them from."""
    repulsion = potential.repulsion
    if not isinstance(repulsion, TightBindingRepulsion):
        return
    n, s = min(len(graphs), FRAMES), len(potential.elements)
    row, column = torch.triu_indices(s, s)
    place = torch.zeros(s, s, dtype=torch.int64)
    place[row, column] = place[column, row] = torch.arange(len(row))
    size = len(row) + s
    matrix, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    squares, n_labels = 0.0, 0
    for k in range(n):
        for rows, left in _rows(potential, repulsion, graphs[k * len(graphs) // n], place, len(row)):
            matrix += rows.T @ rows
            right += rows.T @ left
            squares, n_labels = squares + float(left.square().sum()), n_labels + len(left)
    if not right.any():
        return
    found, noise = torch.zeros_like(right), squares / n_labels
    for _ in range(3):  # the noise is what is left: each time of better coefficients
        ridge = torch.full((size,), 1e-9 * float(matrix.diagonal().max()), dtype=torch.float64)
        ridge[: len(row)] += noise / WIDTH**2
        found = torch.linalg.solve(matrix + torch.diag(ridge), right)
        noise = max(squares - float(found @ (2 * right - matrix @ found)), 0.0) / n_labels
    repulsion.bond.copy_(found[: len(row)][place])


def _rows(
    potential: EnergyModel, repulsion: TightBindingRepulsion, graph: AtomicGraph, place: Tensor, n_pairs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield derivatives of forces (3N, unknowns) and of the energy per √N (1, unknowns), each with what the labels leave."""
    inputs, vec = geometry(potential, batch_graphs([graph]))
    own, other = inputs.species[:, None], inputs.species[inputs.nbr]
    with torch.enable_grad():
        r = lengths(vec).double().requires_grad_(True)
        wall, root = repulsion.parts(r, own, other, potential.cutoff)
        steep, fall = (torch.autograd.grad(x.sum(), r, retain_graph=True)[0] for x in (wall, root))
    unit = vec.double() / r.detach()[..., None]
    atoms, pair = torch.arange(len(r))[:, None], place[own, other]
    if bool(graph.has_forces):
        push = unit.new_zeros(len(r) * n_pairs, 3)
        push.index_add_(0, (atoms * n_pairs + pair).flatten(), (fall[..., None] * unit).flatten(0, 1))
        rows = push.view(len(r), n_pairs, 3).transpose(1, 2).flatten(0, 1)
        left = graph.forces.double() - (steep[..., None] * unit).sum(1)
        yield torch.cat([rows, rows.new_zeros(len(rows), len(place))], dim=1), left.flatten()
    if bool(graph.has_energy):
        share = len(r) ** -0.5
        sums = unit.new_zeros(n_pairs).index_add(0, pair.flatten(), 0.5 * root.detach().flatten())
        counts = torch.bincount(inputs.species, minlength=len(place)).double()
        left = graph.energy - potential.isolated_energy(inputs.species).sum() - 0.5 * wall.detach().sum()
        yield share * torch.cat([sums, counts])[None], share * left
