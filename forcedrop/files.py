"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed.

A reader, or whoever comes after a kill, finds the old file or the new one. What a kill leaves half written is called
``.NAME.part``, or ``.NAME.PROCESS.part`` where several processes may write at once; :func:`remove_parts` removes it.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forcedrop.door import Refused, check_zip, door, reason


def claim(
    outputs: Iterable[str | Path | None],
    inputs: Iterable[str | Path | None] = (),
    *,
    overwrite: bool = False,
    otherwise: str = "--overwrite replaces it",
) -> None:
    """Refuse, before anything is computed, to write where something is that would be lost: the one rule of all commands.

    Args:
        outputs: files that will be written; None is left out.
        inputs: files that are read, which must not be among them, whatever ``overwrite`` says; links are followed.
        overwrite: whether files that exist may be replaced.
        otherwise: what can be done about a file that exists, for the error.

    Raises:
        ValueError: naming the file, if it exists, is read besides, is asked for twice, or cannot be made in its folder.
    """
    read = {Path(path).resolve() for path in inputs if path is not None}
    seen: set[Path] = set()
    for path in (Path(output) for output in outputs if output is not None):
        place = path.resolve()
        if place in read:
            raise ValueError(f"{path} is read and would be written, too; choose another output")
        if place in seen:
            raise ValueError(f"{path} would be written twice; choose another name for one of the outputs")
        seen.add(place)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a file that could be written")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; {otherwise}, or choose another output")
        folder = next(parent for parent in place.parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{path} cannot be written: no permission to write in {folder}")


def require_suffix(path: str | Path | None, suffixes: Iterable[str]) -> None:
    """Refuse a file name of another kind than can be written.

    Raises:
        ValueError: naming what can be.
    """
    known = tuple(suffixes)
    if path is not None and Path(path).suffix.lower() not in known:
        raise ValueError(f"{path}: the name must end with one of {' '.join(known)}")


def set_aside(path: Path) -> Path:
    """Rename a file to the first of ``NAME.1``, ``NAME.2`` … that is free, and return that."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(kept)
    return kept


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
    """Read tensors and plain values only (``weights_only=True``), from a file whose checksums are right.

    Raises:
        ValueError: if the file is not there, is damaged, or holds anything else.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    other = f"{path} is not a forcedrop model or checkpoint, or is damaged"
    with door(path):
        if not zipfile.is_zipfile(path):
            raise Refused(other)
        check_zip(path)
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Refused(f"{other} ({reason(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a forcedrop model or checkpoint")
    return values
