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
from forcedrop.potential.limits import filled
from forcedrop.potential.repulsion import TightBindingRepulsion

FRAMES = 1000
"""Frames at even distances that are looked at, at most."""
WORTH = 0.9
"""Share of the forces' root mean square that may be left: of more, pairs are not worth it, and act only inside."""
WIDTH = 2.0
"""Of a coefficient's prior [√eV]."""


def fit_bonds(potential: EnergyModel, graphs: Sequence[AtomicGraph]) -> None:
    """Set the coefficients of the pairs below a network, on the CPU; 0 where there is nothing to learn them from."""
    repulsion = potential.repulsion
    if not isinstance(repulsion, TightBindingRepulsion):
        return
    if not getattr(potential.shape, "bonds", True):
        repulsion.only_inside(_shortest(potential, graphs), potential.cutoff)
        return
    n, s = min(len(graphs), FRAMES), len(potential.elements)
    row, column = torch.triu_indices(s, s)
    place = torch.zeros(s, s, dtype=torch.int64)
    place[row, column] = place[column, row] = torch.arange(len(row))
    size = len(row) + s
    every, forces, raw = _Normal(size), _Normal(size), 0.0
    for k in range(n):
        graph = graphs[k * len(graphs) // n]
        for rows, left in _rows(potential, repulsion, graph, place, len(row)):
            every.add(rows, left)
            if len(left) > 1:
                forces.add(rows, left)
        raw += float(graph.forces.double().square().sum())
    if not every.right.any():
        return
    found, noise = torch.zeros_like(every.right), every.squares / every.count
    for _ in range(3):  # the noise is what is left: each time of better coefficients
        ridge = torch.full((size,), 1e-9 * float(every.matrix.diagonal().max()), dtype=torch.float64)
        ridge[: len(row)] += noise / WIDTH**2
        found = torch.linalg.solve(every.matrix + torch.diag(ridge), every.right)
        noise = every.left_over(found) / every.count
    repulsion.bond.copy_(found[: len(row)][place])
    if raw and forces.left_over(found) > WORTH**2 * raw:
        repulsion.only_inside(_shortest(potential, graphs), potential.cutoff)


class _Normal:
    """Normal equations of least squares with so many unknowns."""

    def __init__(self, size: int) -> None:
        self.matrix = torch.zeros(size, size, dtype=torch.float64)
        self.right = torch.zeros(size, dtype=torch.float64)
        self.squares, self.count = 0.0, 0

    def add(self, rows: Tensor, left: Tensor) -> None:
        """Add labels, (m,), with their derivatives by the unknowns, (m, size)."""
        self.matrix += rows.T @ rows
        self.right += rows.T @ left
        self.squares, self.count = self.squares + float(left.square().sum()), self.count + len(left)

    def left_over(self, found: Tensor) -> float:
        """Return the sum of squares that a solution leaves."""
        return max(self.squares - float(found @ (2 * self.right - self.matrix @ found)), 0.0)


def _shortest(potential: EnergyModel, graphs: Sequence[AtomicGraph]) -> Tensor:
    """Return the shortest distance of each pair of elements in training [Å], or a covalent one where two never met."""
    s = len(potential.elements)
    found = torch.full((s * s,), float("inf"), dtype=torch.float64)
    for graph in graphs:
        inputs, vec = geometry(potential, batch_graphs([graph]))
        pair = inputs.species[:, None] * s + inputs.species[inputs.nbr]
        found.scatter_reduce_(0, pair.flatten(), lengths(vec.double()).flatten(), "amin")
    table = found.view(s, s)
    table = torch.minimum(table, table.T)
    met = torch.where(table < potential.cutoff, table, torch.zeros_like(table))
    return filled(met, potential.elements).to(potential.dtype)


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
