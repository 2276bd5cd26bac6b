"""The door for files of structures: what may come in, one frame after another, and what is refused before anything is unpacked.

Limits: a packed file (gz, bz2, xz, npz) may unpack to what ``forcedrop.door.may_unpack`` says; a frame of an xyz file may be as
long as the file. Whatever is wrong within one frame is a :class:`Problem` of that frame, so that it can be dropped alone.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from ase import Atoms
from ase.io.extxyz import read_xyz

from forcedrop.door import Refused, check_zip, door, may_unpack, one_line, reason, short, too_large
from forcedrop.structures.checks import Problem
from forcedrop.structures.header import require_columns

_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COUNT = re.compile(r"\s*\d{1,18}\s*")
_PROPERTIES = re.compile(r"""Properties\s*=\s*["']?([^\s"']+)""", re.IGNORECASE)


def check_packed(path: Path) -> None:
    """Check that a packed file is whole and unpacks to no more than is allowed; another file passes.

    Raises:
        Refused: naming the file.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        check_zip(path)
    elif suffix in _PACKED:
        limit, found = may_unpack(path), 0
        with door(path), _PACKED[suffix](path, "rb") as stream:
            while block := stream.read(2**20):
                found += len(block)
                if found > limit:
                    raise too_large(path, limit)


def open_text(path: Path) -> TextIO:
    """Open a file of text, packed or not; bytes that are not UTF-8 become surrogates, which :func:`require_text` finds."""
    opener: Callable[..., TextIO] = _PACKED.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8", errors="surrogateescape")


def require_text(text: str) -> None:
    """Check that a text was UTF-8.

    Raises:
        Refused: with the first byte that was not.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused(f"a byte is not UTF-8 text: {ord(text[error.start]) - 0xDC00:#x}") from None


@dataclass
class _Lines:
    """The lines of a stream, with the number of the last one; a line may be given back."""

    stream: TextIO
    number: int = 0
    _back: str = ""

    def next(self) -> str:
        """Return the next line, empty at the end."""
        line, self._back = self._back or self.stream.readline(), ""
        self.number += bool(line)
        return line

    def give_back(self, line: str) -> None:
        """Let a line be the next one again."""
        self._back, self.number = line, self.number - bool(line)


def xyz_images(path: Path, read_comment: Callable[[str], dict[str, Any]]) -> Iterator[Atoms | Problem]:
    """Yield the structures of an extended XYZ file; in the place of one that cannot be read stands what is wrong with it.

    A frame that is cut off, or declares another number of atoms than it has, is one bad frame: the next begins where a line holds
    a single number. Blank lines between frames are skipped.

    Args:
        path: the file.
        read_comment: turns the second line of a frame into names and values.
    """
    index = 0
    with open_text(path) as stream:
        lines = _Lines(stream)
        while (line := lines.next()) and not line.strip():
            pass
        while line:
            image: Atoms | Problem
            source, first = f"{path}#{index}", lines.number
            try:
                image = _image(_frame_text(line, lines), read_comment)
            except Exception as error:
                image = Problem(source, f"line {first}" if isinstance(error, Refused) else "frame", reason_of(error))
            line, stray = _next_header(lines)
            if stray is not None and not isinstance(image, Problem):
                text = f"a line with a number of atoms should follow the {len(image)} atoms, not {short(stray[1])}"
                image = Problem(source, f"line {stray[0]}", text)
            yield image
            index += 1


def reason_of(error: Exception) -> str:
    """Return a phrase about what is wrong with a frame."""
    if isinstance(error, Refused):
        return one_line(str(error))
    return one_line(reason(error).replace("ase.io.extxyz: ", "").removeprefix("XYZError: "))


def _next_header(lines: _Lines) -> tuple[str, tuple[int, str] | None]:
    """Return the line that begins the next frame, empty at the end, and the first that should not be there, with its number."""
    stray = None
    while line := lines.next():
        if _COUNT.fullmatch(line):
            return line, stray
        if stray is None and line.strip():
            stray = lines.number, line
    return "", stray


def _frame_text(header: str, lines: _Lines) -> str:
    """Return all lines of a frame whose first line is given.

    Raises:
        Refused: if they are fewer than they should be.
    """
    if not _COUNT.fullmatch(header):
        raise Refused(f"the number of atoms should stand here, got {short(header.strip())}")
    n, comment = int(header), lines.next()
    if not comment:
        raise Refused(f"it declares {n} atoms, and the file ends there")
    text = [header, comment]
    for done in range(n):
        line = lines.next()
        if not line.strip() or _COUNT.fullmatch(line):
            lines.give_back(line)
            end = "the file ends after" if not line else "there are only"
            raise Refused(f"it declares {n} atoms, {end} {done}")
        text.append(line)
    while (line := lines.next()).lstrip().startswith("VEC"):
        text.append(line)
    lines.give_back(line)
    return "".join(text)


def _image(text: str, read_comment: Callable[[str], dict[str, Any]]) -> Atoms:
    """Return the atoms of one frame."""
    require_text(text)
    header, comment, *rows = text.splitlines()
    if declared := _PROPERTIES.search(comment):
        require_columns(declared[1], rows[: int(header)])
    images: Iterator[Atoms] = iter(read_xyz(StringIO(text), slice(None), read_comment))
    return next(images)
