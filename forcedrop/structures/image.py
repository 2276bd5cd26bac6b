"""What HDF5 writes, held back in memory until it can be brought to disk as a whole.

HDF5 changes a file in many places and in an order of its own, and swallows the errors of its last writes: a full disk or a
kill would leave a damaged file, and Python without its senses. Here HDF5 writes to an :class:`Image`, which never fails; what has
changed goes to disk in one step, :meth:`Image.commit`:

1. behind the end of the file come the bytes by which it grows, then a *journal* of all changes further ahead, with a checksum;
2. the changes are made in their places;
3. the journal is cut off.

An error in the first step is undone by cutting the file where it ended. After a kill, or an error in the second, the journal is
whole, and whoever opens the file next reads it through the journal; after a kill in the first, it is not, and what lies behind
the end of an HDF5 file means nothing. So the file is that of before or that of after at every moment, also for readers beside.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from forcedrop.files import write_at

_PAGE = 4096
_MAGIC = b"forcedrop-jn"
_TRAILER = struct.Struct("<QQI12s")
"""Bytes of the journal, of the file when it is applied, the journal's checksum, the magic word."""
_CHANGE = struct.Struct("<QQ")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = 48
_FLAGS = 11  # where the superblock notes that somebody writes to the file

Change = tuple[int, bytes]


class Image:
    """A file for HDF5 to read and write, as h5py takes it: the bytes of a file on disk under those that were written since.

    Args:
        handle: of the file on disk, open to read, and to write if it is to be committed; None for a new one in memory.

    Attributes:
        error: the first error of reading; zeros were given instead.
    """

    def __init__(self, handle: int | None = None) -> None:
        self._handle = handle
        self._base = 0 if handle is None else os.fstat(handle).st_size
        self._end, self._at = self._base, 0
        self._pages: dict[int, bytearray] = {}
        self._written: list[tuple[int, int]] = []
        self.error: OSError | None = None
        self._pending = None if handle is None else _journal(handle, self._base)
        if self._pending is not None:
            changes, self._end = self._pending
            for offset, data in changes:
                self._put(offset, data)
        head = self._bytes(0, min(_SUPERBLOCK, self._end))
        if (closed := _closed(head)) != head:
            self._put(0, closed)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Return the bytes from the place on."""
        data = self._bytes(self._at, self._end if count < 0 else self._at + count)
        self._at += len(data)
        return data

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readinto(self, into: memoryview) -> int:
        """Read from the place on; beyond the end are zeros."""
        try:
            data = self._bytes(self._at, self._at + len(into))
        except OSError as error:
            self.error = self.error or error
            data = bytes(len(into))
        into[:] = data
        self._at += len(into)
        return len(into)

    def write(self, data: memoryview | bytes) -> int:
        """Write at the place, to memory."""
        self._put(self._at, bytes(data))
        self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the end."""
        self._end = self._at if size is None else size
        return self._end

    def flush(self) -> None:
        """Do nothing: see :meth:`commit`."""

    def content(self) -> bytes:
        """Return all bytes, as of a file that nobody has open."""
        return _closed(self._bytes(0, _SUPERBLOCK)) + self._bytes(_SUPERBLOCK, self._end)

    def head(self, count: int) -> bytes:
        """Return the first bytes."""
        return self._bytes(0, min(count, self._end))

    def recover(self) -> None:
        """Make the changes of a journal that a kill has left, and cut it off.

        Raises:
            OSError: if that cannot be written; the journal stays.
        """
        if self._pending is not None:
            self._apply(*self._pending)
            self._pending = None

    def commit(self) -> None:
        """Bring what was written to disk.

        Raises:
            OSError: if that cannot be; the file is the one of before, or whoever opens it next makes it the one of after.
        """
        assert self._handle is not None
        changes = list(self._changes(min(self._base, self._end)))
        grown = self._bytes(self._base, self._end) if self._end > self._base else b""
        journal = _packed(changes, self._end) if changes or self._end < self._base else b""
        try:
            write_at(self._handle, self._base, grown)
            write_at(self._handle, self._base + len(grown), journal)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, self._base)
            raise
        self._apply(changes, self._end)

    def _apply(self, changes: list[Change], end: int) -> None:
        assert self._handle is not None
        for offset, data in changes:
            write_at(self._handle, offset, data)
        os.ftruncate(self._handle, end)
        self._base = end
        self._pages.clear()
        self._written.clear()

    def _put(self, offset: int, data: bytes) -> None:
        self._written.append((offset, offset + len(data)))
        self._end = max(self._end, offset + len(data))
        done = 0
        while done < len(data):
            number, within = divmod(offset + done, _PAGE)
            if number not in self._pages:
                self._pages[number] = bytearray(self._on_disk(number * _PAGE, (number + 1) * _PAGE))
            part = data[done : done + _PAGE - within]
            self._pages[number][within : within + len(part)] = part
            done += len(part)

    def _bytes(self, low: int, high: int) -> bytes:
        """Return the bytes from one place to another."""
        pages = range(low // _PAGE, (high + _PAGE - 1) // _PAGE)
        mine = [n for n in pages if n in self._pages] if len(pages) < len(self._pages) else sorted(self._pages)
        if not mine:
            return self._on_disk(low, high)
        found = bytearray(self._on_disk(low, high))
        for number in mine:
            start = number * _PAGE
            first, last = max(low, start), min(high, start + _PAGE)
            if first < last:
                found[first - low : last - low] = self._pages[number][first - start : last - start]
        return bytes(found)

    def _on_disk(self, low: int, high: int) -> bytes:
        """Return what the file on disk holds there, and zeros behind its end."""
        end = max(low, min(high, self._base))
        parts, at = [], low
        while self._handle is not None and at < end:
            part = os.pread(self._handle, end - at, at)
            if not part:
                break
            parts.append(part)
            at += len(part)
        return b"".join(parts) + bytes(high - at)

    def _changes(self, limit: int) -> Iterator[Change]:
        """Yield what was written ahead of ``limit``, every byte once."""
        merged: list[list[int]] = []
        for low, high in sorted(self._written):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        if merged and merged[0][0] < _SUPERBLOCK <= limit:  # its checksum is of all of it
            merged[0] = [0, max(merged[0][1], _SUPERBLOCK)]
        for low, high in merged:
            if low < limit:
                data = self._bytes(low, min(high, limit))
                yield low, _closed(data[:_SUPERBLOCK]) + data[_SUPERBLOCK:] if low == 0 else data


def _packed(changes: list[Change], end: int) -> bytes:
    """Return a journal."""
    body = b"".join(_CHANGE.pack(offset, len(data)) + data for offset, data in changes)
    return body + _TRAILER.pack(len(body), end, zlib.crc32(body), _MAGIC)


def _journal(handle: int, size: int) -> tuple[list[Change], int] | None:
    """Return the changes of a whole journal at the end of a file, and how long the file is with them; None without."""
    if size < _TRAILER.size:
        return None
    length, end, checksum, magic = _TRAILER.unpack(os.pread(handle, _TRAILER.size, size - _TRAILER.size))
    start = size - _TRAILER.size - length
    if magic != _MAGIC or start < 0:
        return None
    body = os.pread(handle, length, start)
    if len(body) != length or zlib.crc32(body) != checksum:
        return None
    changes, at = [], 0
    while at < length:
        offset, count = _CHANGE.unpack_from(body, at)
        at += _CHANGE.size + count
        changes.append((offset, body[at - count : at]))
    return changes, end


def _closed(superblock: bytes) -> bytes:
    """Return the start of an HDF5 file without the note that somebody writes to it, which would keep readers away."""
    if superblock[:9] != _SIGNATURE + b"\x03" or len(superblock) < _SUPERBLOCK or not superblock[_FLAGS]:
        return superblock
    if lookup3(superblock[:44]) != int.from_bytes(superblock[44:], "little"):
        return superblock  # damaged; HDF5 will say so
    body = superblock[:_FLAGS] + b"\0" + superblock[_FLAGS + 1 : 44]
    return body + lookup3(body).to_bytes(4, "little")


def lookup3(data: bytes) -> int:
    """Return the checksum that HDF5 gives its metadata: ``hashlittle`` of Bob Jenkins (lookup3.c, 2006), from 0."""
    word = 0xFFFFFFFF

    def turned(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & word

    blocks = max(1, (len(data) + 11) // 12)
    words = struct.unpack(f"<{3 * blocks}I", data.ljust(12 * blocks, b"\0"))
    x = y = z = (0xDEADBEEF + len(data)) & word
    for k in range(0, len(words), 3):
        x, y, z = (x + words[k]) & word, (y + words[k + 1]) & word, (z + words[k + 2]) & word
        if k + 3 < len(words):
            for by in (4, 6, 8, 16, 19, 4):
                x, z = ((x - z) & word) ^ turned(z, by), (z + y) & word
                x, y, z = y, z, x
    for by in (14, 11, 25, 16, 4, 14, 24):
        z = ((z ^ y) - turned(y, by)) & word
        x, y, z = y, z, x
    return y
