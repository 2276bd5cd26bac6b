"""General dropout for PyTorch: it imports torch and nothing else."""

from forcedrop.dropout.masks import edge_identity, edge_mask, feature_mask

__all__ = ["edge_identity", "edge_mask", "feature_mask"]
