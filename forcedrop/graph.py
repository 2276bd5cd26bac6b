r"""The one data contract: structures with their neighbour lists and labels, as tensors.

An :class:`AtomicGraph` of N atoms and E directed pairs holds

* ``z`` (N,) atomic numbers, ``pos`` (N, 3) positions [Å], ``cell`` (1, 3, 3) rows are vectors [Å], ``pbc`` (1, 3);
* ``edge_index`` (2, E): row 0 the centre i, row 1 the neighbour j, sorted by (i, j, shift);
* ``edge_shift`` (E, 3), integers: the neighbour sits at ``pos[j] + edge_shift @ cell``;
* ``edge_reverse`` (E,): the place of (j, i, −shift), so the list is symmetric by construction;
* labels ``energy`` (1,), ``forces`` (N, 3), ``stress`` (1, 6), zero where missing, with ``has_energy``, ``has_forces``,
  ``has_stress`` (1,).

Two structures, walked through: H₂ at 0.74 Å with a cutoff of 5 Å has N = 2, E = 2: ``edge_index = [[0, 1], [1, 0]]``, all
shifts 0, ``edge_reverse = [1, 0]``. A one-atom cubic cell of 4 Å has N = 1, E = 6: all pairs are (0, 0), told apart by their
shifts ±x, ±y, ±z; the reverse of +x is −x.

``batch_graphs`` joins B graphs into a :class:`Batch`, one after another, with the numbers of atoms and pairs counted on, so that
``cell`` is (B, 3, 3), ``energy`` (B,) and so on. It knows

* ``batch`` (N,): the graph of every atom, ``ptr`` (B + 1,): where the atoms of each graph begin, and at last N;

and adds the padded layout in which the potential works: M slots an atom.

* ``nbr`` (N, M): neighbour in the slot, ``nbr_shift`` (N, M, 3), ``nbr_used`` (N, M) whether the slot holds a pair,
* ``nbr_reverse`` (N, M): flat index i·M + m of the reversed pair. An empty slot points to its own atom and to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from forcedrop.structures.frame import Frame
from forcedrop.structures.search import PairSearch


@dataclass(eq=False)
class _Fields:
    """What one structure and several have alike."""

    z: Tensor
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    edge_index: Tensor
    edge_shift: Tensor
    edge_reverse: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    has_energy: Tensor
    has_forces: Tensor
    has_stress: Tensor
    volume: Tensor

    @property
    def num_nodes(self) -> int:
        """Number of atoms N."""
        return len(self.z)

    def __getitem__(self, name: str) -> Tensor:
        """Return a field by its name."""
        value: Tensor = getattr(self, name)
        return value

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Self:
        """Return the same on a device; what is there already is not copied."""
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the same in page-locked memory, from which a GPU copies without making the processor wait."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)})


@dataclass(eq=False)
class AtomicGraph(_Fields):
    """A structure, its neighbour list and its labels; see the module's page for the fields.

    Attributes:
        source: where it came from, for error messages.
    """

    source: str


@dataclass(eq=False)
class Batch(_Fields):
    """Several of them, and the padded neighbour layout; see the module's page for the fields.

    Attributes:
        source: of every structure.
    """

    source: list[str]
    batch: Tensor
    ptr: Tensor
    nbr: Tensor
    nbr_shift: Tensor
    nbr_used: Tensor
    nbr_reverse: Tensor

    @property
    def num_graphs(self) -> int:
        """Number of structures B."""
        return len(self.source)


class NeighbourFinder:
    """Symmetric neighbour lists, with a Verlet skin that is reused from call to call.

    The list that comes out does not depend on the calls before: pairs within the cutoff only, in a fixed order.

    Args:
        cutoff: [Å].
        skin: [Å]; pairs are searched anew once an atom has moved by skin/2. 0 searches at every call.
    """

    def __init__(self, cutoff: float, skin: float = 0.0) -> None:
        self.cutoff = float(cutoff)
        self.skin = float(skin)
        self._search = PairSearch(self.cutoff, self.skin)

    def __call__(
        self, pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray, *, closest: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ``edge_index`` (2, E), ``edge_shift`` (E, 3) and ``edge_reverse`` (E,), all int64.

        Raises:
            ValueError: if positions or cell are not finite, do not fit the periodic directions or crowd the atoms beyond reason,
                or two atoms are nearer than ``closest`` [Å].
        """
        pairs = self._search(pos, cell, pbc)
        if closest > 0 and pairs.d.size and pairs.d.min() < closest:
            one, other, distance = pairs.nearest()
            raise ValueError(f"atoms {one} and {other} are {distance:.3f} Å apart, less than {closest} Å")
        i, j, shift = pairs.i, pairs.j, pairs.shift
        half = len(i)
        first, second = np.concatenate([i, j]), np.concatenate([j, i])
        shifts = np.concatenate([shift, -shift])
        order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], second, first))
        place = np.empty(2 * half, dtype=np.int64)
        place[order] = np.arange(2 * half)
        reverse = place[(order + half) % (2 * half)] if half else place
        return np.stack([first[order], second[order]]), shifts[order], reverse


CLOSEST = 0.05
"""Atoms nearer than this [Å] are in one place: no direction from one to the other, and nothing to be learned."""

SIGHT = 0.8
"""Of the cutoff: what a network makes of a neighbour fades to nothing towards it. Where all are beyond, force and spread are down
to a few per cent of what they were, whatever was learned."""


def out_of_sight(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """Return which atoms have no neighbour, and no image of their own, within :data:`SIGHT` of the cutoff [Å], shape (N,).

    A network knows next to nothing of them, and neither does its σ, which is near 0 there.
    """
    edges, _, _ = NeighbourFinder(SIGHT * cutoff)(np.asarray(pos, float), np.asarray(cell, float), pbc)
    alone: np.ndarray = np.bincount(edges[0], minlength=len(pos)) == 0
    return alone


def build_graph(frame: Frame, finder: NeighbourFinder, dtype: torch.dtype = torch.float32) -> AtomicGraph:
    """Return the graph of one frame; forces and stress in ``dtype``, positions, cell and energies in float64.

    Raises:
        ValueError: for what :class:`NeighbourFinder` cannot search, or two atoms in one place; the message names the frame's
            source.
    """
    try:
        edge_index, edge_shift, reverse = finder(frame.pos, frame.cell, frame.pbc, closest=CLOSEST)
    except ValueError as error:
        raise ValueError(f"{frame.source}: {error}") from error
    n = len(frame)
    forces = np.zeros((n, 3)) if frame.forces is None else frame.forces
    stress = np.zeros(6) if frame.stress is None else frame.stress
    return AtomicGraph(
        z=torch.as_tensor(frame.z),
        pos=torch.as_tensor(frame.pos, dtype=torch.float64),
        cell=torch.as_tensor(frame.cell, dtype=torch.float64)[None],
        pbc=torch.as_tensor(frame.pbc)[None],
        edge_index=torch.as_tensor(edge_index),
        edge_shift=torch.as_tensor(edge_shift),
        edge_reverse=torch.as_tensor(reverse),
        energy=torch.tensor([frame.energy or 0.0], dtype=torch.float64),
        forces=torch.as_tensor(forces, dtype=dtype),
        stress=torch.as_tensor(stress, dtype=dtype)[None],
        has_energy=torch.tensor([frame.energy is not None]),
        has_forces=torch.tensor([frame.forces is not None]),
        has_stress=torch.tensor([frame.stress is not None]),
        volume=torch.tensor([frame.volume], dtype=dtype),
        source=frame.source,
    )


def batch_graphs(graphs: Sequence[AtomicGraph]) -> Batch:
    """Join graphs on the CPU into one :class:`Batch` (see the module's page).

    Raises:
        ValueError: if there is no graph.
    """
    if not graphs:
        raise ValueError("cannot batch zero graphs")
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    atoms_before = [0, *sizes.cumsum(0).tolist()]
    pairs_before = np.cumsum([0, *(len(graph.edge_reverse) for graph in graphs)]).tolist()
    edge_index = torch.cat([g.edge_index + before for g, before in zip(graphs, atoms_before, strict=False)], dim=1)
    edge_reverse = torch.cat([g.edge_reverse + before for g, before in zip(graphs, pairs_before, strict=False)])
    edge_shift = torch.cat([graph.edge_shift for graph in graphs])
    return Batch(
        **{name: torch.cat([graph[name] for graph in graphs]) for name in _AS_THEY_ARE},
        edge_index=edge_index,
        edge_shift=edge_shift,
        edge_reverse=edge_reverse,
        source=[graph.source for graph in graphs],
        batch=torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        ptr=torch.tensor(atoms_before),
        **_padded(edge_index, edge_shift, edge_reverse, atoms_before[-1]),
    )


_AS_THEY_ARE = (
    "z", "pos", "cell", "pbc", "energy", "forces", "stress", "has_energy", "has_forces", "has_stress", "volume",
)  # fmt: skip
"""Fields that are joined without counting on."""


def _padded(edge_index: Tensor, edge_shift: Tensor, edge_reverse: Tensor, n: int) -> dict[str, Tensor]:
    """Return the layout with slots, by field, of a list of pairs of ``n`` atoms."""
    centre, neighbour = edge_index
    degree = torch.bincount(centre, minlength=n)
    width = max(int(degree.max()), 1)
    first = torch.cumsum(degree, 0) - degree
    slot = centre * width + torch.arange(centre.shape[0]) - first[centre]
    nbr = torch.arange(n)[:, None].repeat(1, width).reshape(-1)
    nbr[slot] = neighbour
    reverse = torch.arange(n * width)
    reverse[slot] = slot[edge_reverse]
    shift = torch.zeros(n * width, 3, dtype=torch.int64)
    shift[slot] = edge_shift
    used = torch.zeros(n * width, dtype=torch.bool)
    used[slot] = True
    return {
        "nbr": nbr.reshape(n, width),
        "nbr_shift": shift.reshape(n, width, 3),
        "nbr_used": used.reshape(n, width),
        "nbr_reverse": reverse.reshape(n, width),
    }


def graph_loader(
    graphs: Sequence[AtomicGraph], batches: Iterable[list[int]], *, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Return a loader that yields one ``Batch`` for each list of indices in ``batches``, in their order."""
    dataset: Any = graphs
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=batch_graphs, num_workers=workers, pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed for workers; not from the global generator
    )  # fmt: skip


def pair_vectors(batch: Batch, pad: float, dtype: torch.dtype) -> Tensor:
    """Return the vectors from each atom to the neighbours in its slots [Å], shape (N, M, 3).

    Differences are taken in float64, then rounded: they do not depend on where a structure is, nor on which images of its atoms.

    Args:
        batch: positions and neighbours.
        pad: length of the vectors in empty slots [Å], to be chosen beyond the cutoff.
        dtype: of the result.
    """
    offset = torch.einsum("nmk,nkl->nml", batch.nbr_shift.to(batch.pos.dtype), batch.cell[batch.batch])
    vec = (batch.pos[batch.nbr] - batch.pos[:, None] + offset).to(dtype)
    empty = torch.cat([vec.new_full((1,), pad), vec.new_zeros(2)])  # made on the device: no waiting for a copy
    return torch.where(batch.nbr_used[..., None], vec, empty)


def group_by_atoms(graphs: Sequence[AtomicGraph], most: int) -> list[list[AtomicGraph]]:
    """Cut graphs, in order, into groups of at most ``most`` atoms; a larger graph is alone."""
    groups: list[list[AtomicGraph]] = []
    size = 0
    for graph in graphs:
        if not groups or size + graph.num_nodes > most:
            groups.append([])
            size = 0
        groups[-1].append(graph)
        size += graph.num_nodes
    return groups
