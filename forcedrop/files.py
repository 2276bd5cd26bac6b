"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed.

A reader, or whoever comes after a kill, finds the old file or the new one. What a kill leaves half written is called
``.NAME.part``, or ``.NAME.PROCESS.part`` where several processes may write at once; :func:`remove_parts` removes it.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _beside(path: Path, shared: bool) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part" if shared else f".{path.name}.part")


@contextmanager
def whole(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a place to write a file to; what is there at the end is renamed to ``path``.

    Args:
        path: where it belongs; folders are made.
        shared: whether other processes may be writing the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, shared)
    yield temporary
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a place to make a folder at, which is renamed to ``path`` at the end; if that is there by then, the new one goes."""
    temporary = _beside(path, shared=True)
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    try:
        temporary.rename(path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, such that a kill leaves all of it, or what :func:`remove_parts` removes."""
    if path.exists():
        part = _beside(path, shared=True)
        path.rename(part)
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove, in a folder and those in it, what a kill left half written."""
    for path in folder.rglob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(values: dict[str, Any], path: str | Path) -> None:
    """Write tensors and plain values, atomically."""
    import torch  # not above: processes that label write files too, and start in a moment

    with whole(path) as temporary:
        torch.save(values, temporary)


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read tensors and plain values only (``weights_only=True``).

    Raises:
        ValueError: if the file is not there or holds anything else.
    """
    import torch

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a forcedrop model or checkpoint, or is damaged") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a forcedrop model or checkpoint")
    return values
