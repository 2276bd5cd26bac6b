"""One door for what comes from outside: whatever goes wrong in reading a file becomes one line that names it.

Files of other people are read by other people's libraries, which raise whatever they like at a damaged byte. :func:`door` turns
all of it into a ``ValueError`` with the file's name and the reason; the first error stays its cause, and
``FORCEDROP_TRACEBACK=1`` shows both. How large a file may be once it is unpacked is :func:`max_bytes`.
"""

from __future__ import annotations

import math
import os
import reprlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**30
"""A packed file is read if it unpacks to no more than this; ``FORCEDROP_MAX_BYTES`` in the environment says another limit."""
MAX_RATIO = 200
"""Nor may it hold more than so many times its own size, or 64 MiB: real numbers pack 2 to 20 times."""
_SMALL = 64 * 2**20
_MOST = 300


class Refused(ValueError):
    """A file, or a part of one, that cannot be used; the message is a sentence of its own."""


def max_bytes() -> int:
    """Return how many bytes a packed file may unpack to.

    Raises:
        Refused: if ``FORCEDROP_MAX_BYTES`` is no positive number.
    """
    text = os.environ.get("FORCEDROP_MAX_BYTES")
    if text is None:
        return MAX_BYTES
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise Refused(f"FORCEDROP_MAX_BYTES must be a positive number of bytes, got {short(text)}")
    return int(limit)


def may_unpack(path: Path) -> int:
    """Return how many bytes may come out of a packed file: :func:`max_bytes`, less for a file that is small itself."""
    limit = max_bytes()
    if "FORCEDROP_MAX_BYTES" in os.environ:
        return limit
    return min(limit, max(_SMALL, MAX_RATIO * path.stat().st_size))


def too_large(path: Path, limit: int) -> Refused:
    """Return the error about a file that unpacks to more than ``limit`` bytes."""
    return Refused(
        f"{path} has {path.stat().st_size} bytes and unpacks to more than {limit}: is it damaged? If not, set "
        "FORCEDROP_MAX_BYTES to what may come out of it"
    )


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple, _repr.maxset = 3, 4, 6, 6, 6
_repr.maxstring = _repr.maxother = _repr.maxlong = 100


def short(value: Any) -> str:
    """Return the ``repr`` of anything, cut to a length that fits into a message, whatever the value's own size."""
    return one_line(_repr.repr(value), 120)


def one_line(text: str, most: int = _MOST) -> str:
    """Return a text without line breaks and control characters, cut in the middle."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * most]).split())
    return plain if len(plain) <= most else f"{plain[: most // 2]} … {plain[-most // 2 :]}"


def reason(error: BaseException) -> str:
    """Return a short phrase for what went wrong."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not {error.encoding} text (byte {error.start})"
    if isinstance(error, KeyError) and error.args:
        return f"it lacks {short(error.args[0])}"
    text = one_line(str(error))
    if isinstance(error, EOFError) and not text:
        return "it ends too early"
    if text and type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def door(path: str | Path, doing: str = "read") -> Iterator[None]:
    """Turn every error within into a ``ValueError`` that names the file.

    Errors that say all that is needed, a ``ValueError`` whose message names the file, pass as they are.

    Args:
        path: the file.
        doing: what was tried, for the message.

    Raises:
        ValueError: for whatever went wrong.
    """
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        plain = isinstance(error, Refused)
        raise Refused(f"cannot {doing} {path}: {error if plain else reason(error)}") from error
    except Exception as error:
        raise Refused(f"cannot {doing} {path}: {reason(error)}") from error


def check_zip(path: Path, *, members: int = 100_000) -> None:
    """Check that a zip file is whole: its checksums are right, and what it unpacks to is within the limit.

    Raises:
        Refused: naming the file, and the member that is damaged.
    """
    with door(path), zipfile.ZipFile(path) as file:
        entries, limit = file.infolist(), may_unpack(path)
        if len(entries) > members or sum(entry.file_size for entry in entries) > limit:
            raise too_large(path, limit)
        if len({entry.filename for entry in entries}) != len(entries):
            raise Refused("a part of it is there twice")
        if damaged := file.testzip():
            raise Refused(f"{short(damaged)} in it is damaged: its checksum is wrong")
