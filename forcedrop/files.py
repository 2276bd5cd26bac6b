"""The one way to write a file: whole or not at all, and what is added to one is there or is not.

A new file is written beside its place, flushed to the disk and measured, then renamed: a reader, or whoever comes after a kill,
finds the old file or the new one. What a kill leaves half written is called ``.NAME.part``, or ``.NAME.PROCESS.part`` where
several processes may write at once; :func:`remove_parts` removes it. Errors leave nothing; they are :class:`WriteError`, which
names the file and says why: a full disk, a quota, a lost device, no permission.
"""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from forcedrop.door import Refused, check_zip, door, reason

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EIO: "the disk failed (input/output error)",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
"""Errors that are the disk's, whatever was to be written."""


class WriteError(OSError):
    """A file cannot be written; its text names the file and says why."""

    def __str__(self) -> str:
        reason = _REASONS.get(self.errno or 0, self.strerror)
        advice = ", make room and go on" if self.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{reason}: cannot write {self.filename}{advice}"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error of the system within into a :class:`WriteError` that names the file.

    Raises:
        WriteError: for an ``OSError`` that is none yet.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise WriteError(error.errno, os.strerror(error.errno), str(path)) from error


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        WriteError: if that cannot be.
    """
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


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
    """Give a place to write a file to; what is there at the end is renamed to ``path``. After an error nothing is.

    Args:
        path: where it belongs; folders are made.
        shared: whether other processes may be writing the same file.

    Raises:
        WriteError: if it cannot be written.
    """
    path = Path(os.path.realpath(path))  # where a link leads to; the link stays
    make_folder(path.parent)
    if (
        path.exists() and not path.is_file() and not path.is_dir()
    ):  # such as /dev/stdout, which has no place to rename to
        with writing(path):
            yield path
        return
    temporary = _beside(path, shared)
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, WriteError) and error.filename == str(temporary):
            raise WriteError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: str | Path, data: bytes | memoryview, *, shared: bool = False) -> None:
    """Write a file, whole or not at all; see :func:`whole`.

    Raises:
        WriteError: if it cannot be written, or is not as long as it should be afterwards.
    """
    with whole(path, shared=shared) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
        finally:
            os.close(handle)
        if temporary.is_file() and temporary.stat().st_size != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_text(path: str | Path, text: str, *, shared: bool = False) -> None:
    """Write a file of text as UTF-8, whole or not at all; see :func:`write_bytes`."""
    write_bytes(path, text.encode(), shared=shared)


def append_bytes(path: str | Path, data: bytes, *, sync: bool = False) -> None:
    """Add to the end of a file, which is made if missing; after an error the file ends where it did.

    Args:
        path: the file.
        data: what to add.
        sync: whether to wait until it is on the disk.

    Raises:
        WriteError: if it cannot be written.
    """
    path = Path(path)
    make_folder(path.parent)
    before = path.stat().st_size if path.exists() else None
    try:
        with writing(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                write_at(handle, before or 0, data)
                if sync:
                    os.fsync(handle)
            finally:
                os.close(handle)
    except BaseException:
        with suppress(OSError):
            if before is None:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, before)
        raise


def write_at(handle: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of some bytes to a place in an open file."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def cut(path: str | Path, size: int) -> None:
    """Let a file end after ``size`` bytes.

    Raises:
        ValueError: if it ends before.
        WriteError: if that cannot be.
    """
    with writing(path):
        have = os.stat(path).st_size
        if have > size:
            os.truncate(path, size)
    if have < size:
        raise ValueError(f"{path} ends after {have} bytes, at least {size} are wanted: something is lost")


def sync(path: str | Path) -> None:
    """Wait until a file is on the disk.

    Raises:
        WriteError: if it does not get there.
    """
    with writing(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a place to make a folder at, which is renamed to ``path`` at the end; if that is there by then, the new one goes.

    After an error nothing is left of it.
    """
    temporary = _beside(path, shared=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.is_dir():
            raise WriteError(error.errno, os.strerror(error.errno or 0), str(path)) from error


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
    """Write tensors and plain values, atomically.

    Raises:
        WriteError: if the file cannot be written.
    """
    import torch  # not above: processes that label write files too, and start in a moment

    stream = BytesIO()  # torch's own writer dies of a full disk with an error of its own, and leaves what it began
    torch.save(values, stream)
    write_bytes(path, stream.getbuffer())


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
