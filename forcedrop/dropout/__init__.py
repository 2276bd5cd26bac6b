"""General dropout for PyTorch: it imports torch and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MENU = {
    "banks": ("MaskBankDropout", "mask_bank_dropout", "masksembles_masks", "overlap"),
    "concrete": ("ConcreteDropout", "concrete_dropout"),
    "elementwise": (
        "ClassicDropout", "Dropout", "GaussianDropout", "classic_dropout", "dropout", "gaussian_dropout",
    ),
    "equivariant": ("IrrepsDropout", "TensorDropout", "irreps_dropout", "tensor_dropout"),
    "attention": ("AttentionDropout", "ValueDropout", "attention_dropout", "dropout_attention", "value_dropout"),
    "freeze": ("dropout_sites", "frozen"),
    "function": ("FunctionSample",),
    "graphs": (
        "EdgeDropout", "NodeDropout", "NodeFeatureDropout", "drop_edges", "edge_dropout", "node_dropout",
        "node_feature_dropout",
    ),
    "init": ("dropout_kaiming_normal_", "dropout_kaiming_uniform_"),
    "masks": ("edge_identity", "edge_mask", "feature_mask"),
    "montecarlo": ("mc_samples",),
    "cells": ("RecurrentMasks", "gru_cell", "lstm_cell"),
    "recurrent": ("DropoutGRU", "DropoutLSTM"),
    "schedule": ("LinearSchedule", "linear_rate"),
    "sequence": ("LockedDropout", "Zoneout", "locked_dropout", "zoneout"),
    "site": ("DropoutSite",),
    "structured": (
        "ChannelDropout", "DropBlock1d", "DropBlock2d", "DropBlock3d", "DropPath", "channel_dropout", "drop_block",
        "drop_path",
    ),
    "summaries": ("classification_summary", "regression_summary"),
}  # fmt: skip
_ROOM = {name: room for room, names in _MENU.items() for name in names}
__all__ = sorted(_ROOM)


def __getattr__(name: str) -> Any:
    if name in _ROOM:
        return getattr(import_module(f"{__name__}.{_ROOM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
