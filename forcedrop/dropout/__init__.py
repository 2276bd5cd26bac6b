"""General dropout for PyTorch: it imports torch and nothing else.

The theory is in ``forcedrop.dropout.theory``, single cells for own recurrent loops in ``forcedrop.dropout.cells``.
"""

from forcedrop.dropout.attention import (
    AttentionDropout,
    ValueDropout,
    attention_dropout,
    dropout_attention,
    value_dropout,
)
from forcedrop.dropout.banks import MaskBankDropout, mask_bank_dropout, masksembles_masks, overlap
from forcedrop.dropout.cells import RecurrentMasks, gru_cell, lstm_cell
from forcedrop.dropout.concrete import ConcreteDropout, concrete_dropout
from forcedrop.dropout.cuts import EdgeCutDropout, edge_cut_dropout
from forcedrop.dropout.elementwise import (
    ClassicDropout,
    Dropout,
    GaussianDropout,
    classic_dropout,
    dropout,
    gaussian_dropout,
)
from forcedrop.dropout.equivariant import (
    IrrepsDropout,
    SphericalDropout,
    TensorDropout,
    irreps_dropout,
    tensor_dropout,
)
from forcedrop.dropout.exact import ExactDropout, exact_masks, exact_weights
from forcedrop.dropout.freeze import dropout_sites, frozen
from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.graphs import (
    EdgeDropout,
    NodeDropout,
    NodeFeatureDropout,
    drop_edges,
    edge_dropout,
    node_dropout,
    node_feature_dropout,
)
from forcedrop.dropout.init import dropout_kaiming_normal_, dropout_kaiming_uniform_
from forcedrop.dropout.masks import edge_identity, edge_mask, feature_mask, normal_noise
from forcedrop.dropout.montecarlo import mc_samples
from forcedrop.dropout.recurrent import DropoutGRU, DropoutLSTM
from forcedrop.dropout.schedule import LinearSchedule, linear_rate
from forcedrop.dropout.sequence import LockedDropout, Zoneout, locked_dropout, zoneout
from forcedrop.dropout.site import DropoutSite
from forcedrop.dropout.structured import (
    ChannelDropout,
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    DropPath,
    channel_dropout,
    drop_block,
    drop_path,
)
from forcedrop.dropout.summaries import classification_summary, regression_summary

__all__ = [
    "AttentionDropout",
    "ChannelDropout",
    "ClassicDropout",
    "ConcreteDropout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "Dropout",
    "DropoutGRU",
    "DropoutLSTM",
    "DropoutSite",
    "EdgeCutDropout",
    "EdgeDropout",
    "ExactDropout",
    "FunctionSample",
    "GaussianDropout",
    "IrrepsDropout",
    "LinearSchedule",
    "LockedDropout",
    "MaskBankDropout",
    "NodeDropout",
    "NodeFeatureDropout",
    "RecurrentMasks",
    "SphericalDropout",
    "TensorDropout",
    "ValueDropout",
    "Zoneout",
    "attention_dropout",
    "channel_dropout",
    "classic_dropout",
    "classification_summary",
    "concrete_dropout",
    "drop_block",
    "drop_edges",
    "drop_path",
    "dropout",
    "dropout_attention",
    "dropout_kaiming_normal_",
    "dropout_kaiming_uniform_",
    "dropout_sites",
    "edge_cut_dropout",
    "edge_dropout",
    "edge_identity",
    "edge_mask",
    "exact_masks",
    "exact_weights",
    "feature_mask",
    "frozen",
    "gaussian_dropout",
    "gru_cell",
    "irreps_dropout",
    "linear_rate",
    "locked_dropout",
    "lstm_cell",
    "mask_bank_dropout",
    "masksembles_masks",
    "mc_samples",
    "node_dropout",
    "node_feature_dropout",
    "normal_noise",
    "overlap",
    "regression_summary",
    "tensor_dropout",
    "value_dropout",
    "zoneout",
]
