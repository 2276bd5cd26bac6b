"""Blocks of atoms on the way back: as many as stay in a processor's cache."""

from __future__ import annotations

import torch

BLOCK_BYTES = 20 * 2**20
"""What a block of atoms may take on a processor: larger blocks leave the cache, smaller ones cost more calls."""
GPU_BLOCK_BYTES = 2**30
"""The same on a GPU, which wants large ones: there it only limits memory."""


def blocks_of(n_atoms: int, bytes_per_atom: int, device: torch.device) -> list[slice]:
    """Cut atoms into blocks of about :data:`BLOCK_BYTES`, on a GPU of :data:`GPU_BLOCK_BYTES`."""
    size = max(1, (BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES) // bytes_per_atom)
    return [slice(first, min(first + size, n_atoms)) for first in range(0, n_atoms, size)]
