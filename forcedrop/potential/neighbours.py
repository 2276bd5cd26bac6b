"""Moving features along neighbour lists: the gather, and its adjoint without any scatter.

Every list is symmetric: the pair (i, j, S) comes with (j, i, −S), and ``reverse`` says where. So the sum over the pairs that
point *to* an atom is a gather over the pairs that leave it, which is fast on every device and gives the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AlongLists(torch.autograd.Function):
    """What a gather and its adjoint keep: the lists, for either mode of differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, nbr, reverse = inputs
        ctx.save_for_backward(nbr, reverse)
        ctx.save_for_forward(nbr, reverse)


class _Gather(_AlongLists):
    @staticmethod
    def forward(x: Tensor, nbr: Tensor, reverse: Tensor) -> Tensor:
        return x.index_select(0, nbr.reshape(-1)).reshape(*nbr.shape, *x.shape[1:])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        nbr, reverse = ctx.saved_tensors
        moved: Tensor = _Gather.apply(tangent, nbr, reverse)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        nbr, reverse = ctx.saved_tensors
        return _SumReverse.apply(grad, nbr, reverse), None, None


class _SumReverse(_AlongLists):
    @staticmethod
    def forward(edges: Tensor, nbr: Tensor, reverse: Tensor) -> Tensor:
        flat = edges.reshape(-1, *edges.shape[2:])
        return flat.index_select(0, reverse.reshape(-1)).reshape(edges.shape).sum(1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        nbr, reverse = ctx.saved_tensors
        moved: Tensor = _SumReverse.apply(tangent, nbr, reverse)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        nbr, reverse = ctx.saved_tensors
        return _Gather.apply(grad, nbr, reverse), None, None


def gather_neighbours(x: Tensor, nbr: Tensor, reverse: Tensor) -> Tensor:
    """Return the features of every atom's neighbours.

    Args:
        x: per-atom features, shape (N, …).
        nbr: neighbour of each slot, shape (N, M).
        reverse: flat index of the slot that holds the reversed pair, shape (N, M); an empty slot points to itself.

    Returns:
        shape (N, M, …).
    """
    return _Gather.apply(x, nbr, reverse)


def sum_incoming(edges: Tensor, nbr: Tensor, reverse: Tensor) -> Tensor:
    """Return the sum over all pairs that point to each atom, shape (N, …), of values on slots (N, M, …)."""
    return _SumReverse.apply(edges, nbr, reverse)
