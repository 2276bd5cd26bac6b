"""The project's own file: any number of structures of any size in one HDF5 file that survives kills, full disks and lost ones.

How frames lie in it says :mod:`~forcedrop.structures.layout`, how changes come to disk :mod:`~forcedrop.structures.image`: an
append is there as a whole or not at all, at every moment, also for readers in other processes. What is read is checked.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import h5py
import numpy as np

from forcedrop.files import WriteError, whole, write_bytes, writing
from forcedrop.structures import layout
from forcedrop.structures.frame import Frame
from forcedrop.structures.image import Image

_BLOCK = 1024
_TRIES = 3
_HEAD = 2**20
"""Bytes at the start of a file of format 1 that hold its texts."""
_PATIENCE = 5.0
"""Seconds to try for, while somebody else changes the file."""

T = TypeVar("T")


class FrameStore:
    """A list of :class:`Frame` on disk; ``len``, indexing, slicing and iteration read, :meth:`append` writes.

    The file is opened at first use and in every worker process anew, so a store can be handed to data-loader workers. One process
    writes at a time; others may read meanwhile.

    Args:
        path: the file.
        mode: ``"r"`` to read, ``"a"`` to append (made if missing), ``"w"`` to start over.
        provenance: plain values to keep with a new file, such as method and settings.
        compressed: of a new file. Not to be, where frames come one by one: every append then packs a block of rows anew, and
            what was there before stays in the file.

    Raises:
        ValueError: if the file is missing (``"r"``), is not a frame store or is damaged, or somebody else writes to it; all
            methods say so with its name.
        WriteError: if it cannot be written; it holds what it held before.
    """

    def __init__(
        self,
        path: str | Path,
        mode: Literal["r", "a", "w"] = "r",
        provenance: dict[str, Any] | None = None,
        *,
        compressed: bool = True,
    ) -> None:
        self.path, self.mode = Path(path), mode
        self._file: h5py.File | None = None
        self._handle, self._image, self._seen = -1, Image(), (0, 0, 0)
        if mode == "r" and not self.path.is_file():
            raise ValueError(f"no such file: {path}")
        if mode == "w" or (mode == "a" and not self.path.exists()):
            write_bytes(self.path, _empty({}, provenance or {}, compressed))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "mode": "r", "_file": None, "_handle": -1}

    def __del__(self) -> None:
        self._drop()

    def close(self) -> None:
        """Close the file, after all of it is on the disk; it opens again when needed.

        Raises:
            WriteError: if something does not get to the disk.
        """
        try:
            if self._file is not None and self.mode != "r":
                with writing(self.path):
                    os.fsync(self._handle)
        finally:
            self._drop()

    def _drop(self) -> None:
        """Forget the open file; what was not brought to disk is lost."""
        if self._file is not None:
            with suppress(Exception):  # its last words go to memory
                self._file.close()
            self._file = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> h5py.File:
        """Return the open HDF5 file; one to read is opened anew when it has changed."""
        if self._file is not None and self.mode == "r" and self._seen != self._state():
            self._drop()
        if self._file is None:
            self._begin()
        assert self._file is not None
        return self._file

    def _begin(self) -> None:
        writes = self.mode != "r"
        with writing(self.path) if writes else nullcontext():
            self._handle = os.open(self.path, os.O_RDWR if writes else os.O_RDONLY)
        self._seen = self._state()
        if writes:
            _lock(self._handle, self.path)
        self._image = Image(self._handle)
        if writes:
            with writing(self.path):
                self._image.recover()
        cache = {"rdcc_nbytes": 0} if writes else {}  # rows go where they belong, not a chunk of them at a time
        self._file = h5py.File(self._image, "r+" if writes else "r", libver=layout.VERSION, **cache)
        layout.check_file(self._file, self._seen[1])
        n = int(self._file["committed"][0])
        if writes and n:  # what comes is put behind what the last frame says of its place
            layout.read_rows(self._file, n - 1, n, self.path)
        if writes and self._file.attrs["forcedrop_store"] != layout.FORMAT:
            self._rebuild({})

    def _state(self) -> tuple[int, int, int]:
        """Return what changes with the file."""
        found = os.stat(self.path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _do(self, read: Callable[[h5py.File], T]) -> T:
        """Read something; again where somebody else has changed the file meanwhile.

        Raises:
            ValueError: if it cannot be read.
        """
        start, tries = time.monotonic(), 0
        while True:
            try:
                found = read(self._open())
                if self._image.error is not None:
                    raise self._image.error
                return found
            except layout.NotAStore:
                self._drop()
                formats = " or ".join(map(str, layout.READABLE))
                raise ValueError(f"{self.path} is not a forcedrop frame store of format {formats}") from None
            except _Busy:
                self._drop()
                raise
            except FileNotFoundError:
                self._drop()
                raise ValueError(f"no such file: {self.path}") from None
            except Exception as error:  # whatever HDF5, JSON or numpy say about garbage
                before = self._seen
                self._drop()
                tries += 1
                with suppress(OSError):
                    changing = before != self._state()
                    fresh = time.time_ns() - before[2] < 1e9
                    if (changing and time.monotonic() - start < _PATIENCE) or (fresh and tries < _TRIES):
                        time.sleep(0.005)
                        continue
                raise _unreadable(self.path, error) from error

    def __len__(self) -> int:
        return self._do(lambda file: int(file["committed"][0]))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            wanted = range(*index.indices(len(self)))
            if not wanted:
                return []
            low, high = min(wanted), max(wanted) + 1
            block = self._read(low, high)
            return [block[i - low] for i in wanted]
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"{self.path} holds {n} frames, asked for frame {index}")
        return self._read(index % n, index % n + 1)[0]

    def __iter__(self) -> Iterator[Frame]:
        for low in range(0, len(self), _BLOCK):
            yield from self._read(low, min(low + _BLOCK, len(self)))

    def _read(self, low: int, high: int) -> list[Frame]:
        return self._do(lambda file: layout.read_rows(file, low, high, self.path))

    @property
    def provenance(self) -> dict[str, Any]:
        """What was noted when the file was made."""
        return self._do(lambda file: layout.read_provenance(file, self._image.head(_HEAD)))

    def append(self, frames: Sequence[Frame]) -> None:
        """Add frames; once this returns they are counted in, and survive a kill.

        Raises:
            ValueError: if the store was opened to read, or an array of a frame does not have one row per atom.
            WriteError: if they cannot be written; none of them is there then.
        """
        new = layout.extra_columns(frames)
        self._change("append", lambda file: self._append(file, new, frames))

    def _append(self, file: h5py.File, new: layout.Columns, frames: Sequence[Frame]) -> None:
        if any(name not in file["extra"] for name in new):
            self._rebuild(new)
            file = self._open()
        for low in range(0, len(frames), _BLOCK):
            layout.write_rows(file, int(file["committed"][0]), frames[low : low + _BLOCK])

    def truncate(self, n: int) -> None:
        """Forget all frames but the first ``n``.

        Raises:
            ValueError: if the store was opened to read, or holds fewer.
            WriteError: if that cannot be written.
        """

        def cut(file: h5py.File) -> None:
            if not 0 <= n <= file["committed"][0]:
                raise ValueError(f"{self.path} holds {file['committed'][0]} frames, {n} are to be kept")
            layout.forget_rows(file, n)

        self._change("truncate", cut)

    def _change(self, what: str, change: Callable[[h5py.File], None]) -> None:
        """Change the file in memory, then on disk."""
        if self.mode == "r":
            raise ValueError(f"{self.path} was opened to read; open it with mode='a' to {what}")
        self._do(lambda file: None)
        try:
            change(self._open())
            self._open().flush()
            with writing(self.path):
                self._image.commit()
        except (WriteError, ValueError):
            self._drop()
            raise
        except Exception as error:  # whatever HDF5 says about what it found
            self._drop()
            raise _unreadable(self.path, error) from error
        except BaseException:
            self._drop()
            raise

    def _rebuild(self, new: layout.Columns) -> None:
        """Write all frames, a block at a time, to a new file with further columns, and put it in the place of this one."""
        with whole(self.path, shared=True) as temporary, FrameStore(self.path) as old:
            have, provenance = old._do(layout.columns), old.provenance
            compressed = old._do(lambda file: file["pos"].compression is not None)
            write_bytes(temporary, _empty({**new, **have}, provenance, compressed))
            with FrameStore(temporary, "a") as store:
                for low in range(0, len(old), _BLOCK):
                    store.append([_with_origin(frame) for frame in old[low : low + _BLOCK]])
        self._drop()

    def content_hash(self) -> str:
        """Return the sha256 of all frames in order: all that they hold, without provenance and layout."""
        digest = hashlib.sha256()
        for frame in self:
            for values in (
                frame.z,
                frame.pos,
                frame.cell,
                frame.pbc,
                frame.energy,
                frame.forces,
                frame.stress,
            ):
                digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
            digest.update(json.dumps(frame.info, sort_keys=True).encode())
            for name in sorted(frame.arrays):
                digest.update(name.encode() + np.ascontiguousarray(frame.arrays[name]).tobytes())
            if frame.constraints:
                digest.update(json.dumps(frame.constraints, sort_keys=True).encode())
        return digest.hexdigest()


def _empty(extra: layout.Columns, provenance: dict[str, Any], compressed: bool) -> bytes:
    """Return the bytes of a store without frames."""
    image = Image()
    with h5py.File(image, "w", libver=layout.VERSION) as file:
        layout.create(file, extra, provenance, compressed)
    return image.content()


class _Busy(ValueError):
    """Somebody else writes to the file."""


def _lock(handle: int, path: Path) -> None:
    """Make sure that one process writes, where the system can tell; by a lock that plain HDF5, which reads, does not ask for."""
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _Busy(f"another process writes to {path}") from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    text = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return ValueError(f"cannot read {path} as a forcedrop frame store, it is damaged or is something else: {text}")


def _with_origin(frame: Frame) -> Frame:
    """Give a frame read from a store the source it had before, so that a copy is the same."""
    info = dict(frame.info)
    source = str(info.pop("source", "<memory>"))
    return Frame(**{**vars(frame), "info": info, "source": source})
