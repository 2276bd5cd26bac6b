"""Every layer with an input it takes, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop import dropout as d

ROWS, KINDS = 4, 3


def plain(*shape: int) -> Callable[[torch.dtype, int], tuple[Tensor, ...]]:
    """Inputs whose first axis is the batch."""

    def inputs(dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
        return (torch.ones(rows, *shape, dtype=dtype),)

    return inputs


def edges(dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    nodes = torch.arange(rows)
    return torch.stack([nodes, nodes + 1]), torch.ones(rows, dtype=dtype)


def pairs(dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    r = torch.linspace(1, 5, 6, dtype=torch.float32).expand(rows, 6).to(dtype)
    return r, (torch.arange(6) % KINDS).expand(rows, 6).clone()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype, int], tuple[Tensor, ...]]]] = {
    "AttentionDropout": (lambda: d.AttentionDropout(0.5), plain(2, 5, 5)),
    "ChannelDropout": (lambda: d.ChannelDropout(0.5), plain(6, 3)),
    "ClassicDropout": (lambda: d.ClassicDropout(0.5), plain(8)),
    "ConcreteDropout": (lambda: d.ConcreteDropout(0.5), plain(8)),
    "DropBlock1d": (lambda: d.DropBlock1d(0.5, 2), plain(3, 8)),
    "DropBlock2d": (lambda: d.DropBlock2d(0.5, 2), plain(3, 5, 5)),
    "DropBlock3d": (lambda: d.DropBlock3d(0.5, 2), plain(2, 4, 4, 4)),
    "DropPath": (lambda: d.DropPath(0.5), plain(3)),
    "Dropout": (lambda: d.Dropout(0.5), plain(8)),
    "DropoutGRU": (lambda: d.DropoutGRU(3, 4, batch_first=True, p_input=0.5, p_state=0.5), plain(5, 3)),
    "DropoutLSTM": (lambda: d.DropoutLSTM(3, 4, batch_first=True, p_update=0.5, p_weight=0.5), plain(5, 3)),
    "EdgeCutDropout": (lambda: d.EdgeCutDropout(KINDS, 5.0, 0.5), pairs),
    "EdgeDropout": (lambda: d.EdgeDropout(0.5), edges),
    "ExactDropout": (lambda: d.ExactDropout(6, 2, 0.5), plain(6)),
    "GaussianDropout": (lambda: d.GaussianDropout(0.5), plain(8)),
    "IrrepsDropout": (lambda: d.IrrepsDropout("3x0e+2x1o", 0.5, shared=True), plain(9)),
    "LockedDropout": (lambda: d.LockedDropout(0.5, batch_first=True), plain(5, 3)),
    "MaskBankDropout": (lambda: d.MaskBankDropout(8), plain(8)),
    "NodeDropout": (lambda: d.NodeDropout(0.5), plain(3)),
    "NodeFeatureDropout": (lambda: d.NodeFeatureDropout(0.5), plain(8)),
    "SphericalDropout": (
        lambda: d.SphericalDropout(1, 5, 0.5),
        lambda dtype, rows: (torch.ones(4, rows, 5, dtype=dtype),),
    ),
    "TensorDropout": (lambda: d.TensorDropout(1, 0.5, shared=False), plain(5, 3)),
    "ValueDropout": (lambda: d.ValueDropout(0.5), plain(4, 6)),
    "Zoneout": (
        lambda: d.Zoneout(0.5),
        lambda dtype, rows: (torch.ones(rows, 8, dtype=dtype), torch.zeros(rows, 8, dtype=dtype)),
    ),
}
"""Layer → how to make it, with a rate of about a half, and its inputs of a type with some rows."""

REAL_ONLY = ("AttentionDropout", "DropoutGRU", "DropoutLSTM", "EdgeCutDropout", "ExactDropout")
"""Layers of which a complex input makes no sense, or whose weights are real."""


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
