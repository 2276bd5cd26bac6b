"""Disks that fail when a test wants them to, without root: the calls of the system that bring bytes to disk are counted."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CALLS = ("write", "pwrite", "fsync", "replace", "ftruncate")


class Disk:
    """Lets calls pass until a limit, then fails them.

    Args:
        after: calls that pass; every one from then on fails.
        room: bytes that can be written; then a write takes what fits, and the next fails.
        code: of the error.
        only: names of the calls that are counted.
        watch: called before each of them, and in the middle of a write.
    """

    def __init__(
        self,
        *,
        after: int | None = None,
        room: int | None = None,
        code: int = errno.ENOSPC,
        only: tuple[str, ...] = CALLS,
        watch: Callable[[], None] | None = None,
    ) -> None:
        self.after, self.room, self.code, self.only, self.watch, self.calls = after, room, code, only, watch, 0

    def fail(self) -> None:
        raise OSError(self.code, os.strerror(self.code))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            self.calls += 1
            if self.watch is not None:
                self.watch()
            if self.after is not None and self.calls > self.after and not self.frees(name, first, rest):
                self.fail()
            if name not in ("write", "pwrite"):
                return real(first, *rest, **more)
            data = memoryview(rest[0])
            if self.room is not None:
                if not self.room and len(data):
                    self.fail()
                data = data[: self.room]
                self.room -= len(data)
            if self.watch is not None:
                data = data[: max(1, len(data) // 2)]
            return real(first, data, *rest[1:])

        return call

    @staticmethod
    def frees(name: str, first: Any, rest: tuple[Any, ...]) -> bool:
        """Return whether a call takes room from nobody: shortening a file works on a full disk."""
        return name == "ftruncate" and rest[0] <= os.fstat(first).st_size


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Put a disk in the place of the real one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in disk.only:
            patch.setattr(os, name, disk.wrap(name, getattr(os, name)))
        yield disk
