"""Numbers for TensorBoard, written like every other file: what is added is there or is not, and an error names the file.

TensorBoard's own writer works in a thread of its own, where a full disk ends in a traceback.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from forcedrop.files import append_bytes


class Board:
    """A file of scalars, which TensorBoard shows while it grows.

    Args:
        folder: for the file, whose name says when it was begun, where, and by which process.

    Raises:
        WriteError: if it cannot be written, also later.
    """

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of a step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append_bytes(self.path, record.getvalue())
