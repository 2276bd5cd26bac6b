"""The data contracts, checked at run time with jaxtyping and beartype."""

from __future__ import annotations

from typing import Any

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Float64, Int64, jaxtyped
from torch import Tensor


def check_graph(graph: Any) -> None:
    """Assert the shapes and types of an ``AtomicGraph``."""
    names = (
        "z",
        "pos",
        "cell",
        "pbc",
        "edge_index",
        "edge_shift",
        "edge_reverse",
        "energy",
        "forces",
        "stress",
    )
    _graph(*(graph[name] for name in names))


def check_batch(batch: Any) -> None:
    """Assert the shapes and types of the padded layout."""
    _batch(
        batch.pos,
        batch.batch,
        batch.cell,
        batch.pbc,
        batch.nbr,
        batch.nbr_reverse,
        batch.nbr_shift,
        batch.nbr_used,
    )


def check_derived(derived: Any, n_graphs: int, n_atoms: int, samples: int | None = None) -> None:
    """Assert the shapes of energies and derivatives; the sample axis comes first."""
    if samples is None:
        derived = [x[None] for x in derived]
    _derived(*derived)
    assert derived[2].shape[:2] == (samples or 1, n_atoms)
    assert derived[0].shape == (samples or 1, n_graphs)


@jaxtyped(typechecker=beartype)
def _graph(
    z: Int64[Tensor, N],
    pos: Float[Tensor, "N 3"],
    cell: Float[Tensor, "1 3 3"],
    pbc: Bool[Tensor, "1 3"],
    edge_index: Int64[Tensor, "2 E"],
    edge_shift: Int64[Tensor, "E 3"],
    edge_reverse: Int64[Tensor, E],
    energy: Float64[Tensor, 1],
    forces: Float[Tensor, "N 3"],
    stress: Float[Tensor, "1 6"],
) -> None:
    assert torch.equal(edge_index[:, edge_reverse], edge_index.flip(0))
    assert torch.equal(edge_shift[edge_reverse], -edge_shift)


@jaxtyped(typechecker=beartype)
def _batch(
    pos: Float[Tensor, "N 3"],
    batch: Int64[Tensor, N],
    cell: Float[Tensor, "B 3 3"],
    pbc: Bool[Tensor, "B 3"],
    nbr: Int64[Tensor, "N M"],
    nbr_reverse: Int64[Tensor, "N M"],
    nbr_shift: Int64[Tensor, "N M 3"],
    nbr_used: Bool[Tensor, "N M"],
) -> None:
    flat = nbr_reverse.reshape(-1)
    assert torch.equal(flat[flat], torch.arange(len(flat)))


@jaxtyped(typechecker=beartype)
def _derived(
    energy: Float64[Tensor, "K B"],
    energies: Float64[Tensor, "K N"],
    forces: Float[Tensor, "K N 3"],
    stress: Float[Tensor, "K B 6"],
) -> None:
    pass
