"""The project's own file: any number of structures of any size in one HDF5 file that survives being killed.

Layout: per-atom arrays of all structures behind one another with offsets ``ptr`` (n + 1), per-structure arrays with one row
each, and texts (JSON of ``info`` and the source) as bytes with offsets ``text_ptr``. All data sets are chunked and resizable.

Crash safety: a writer works in HDF5's single-writer mode, in which the file is consistent at every moment, and counts a batch in
(``committed``) after all of it is on disk. A killed writer leaves at most its last batch uncounted; readers never see it, the
next writer overwrites it, after rebuilding the file once beside itself (HDF5 marks a file that was not closed).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import h5py
import numpy as np

import forcedrop
from forcedrop.files import whole
from forcedrop.structures.frame import Frame

FORMAT = 1
UNITS = {"length": "Angstrom", "energy": "eV", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3"}
_PER_ATOM = {"z": ((), "i2"), "pos": ((3,), "f8"), "forces": ((3,), "f8")}
_PER_FRAME = {
    "cell": ((3, 3), "f8"), "pbc": ((3,), "?"), "energy": ((), "f8"), "stress": ((6,), "f8"),
    "has_energy": ((), "?"), "has_forces": ((), "?"), "has_stress": ((), "?"),
}  # fmt: skip
_OFFSETS = ("ptr", "text_ptr")
_BLOCK = 1024


class FrameStore:
    """A list of :class:`Frame` on disk; ``len``, indexing, slicing and iteration read, :meth:`append` writes.

    The file is opened at first use and in every worker process anew, so a store can be handed to data-loader workers.

    Args:
        path: the file.
        mode: ``"r"`` to read, ``"a"`` to append (made if missing), ``"w"`` to start over.
        provenance: plain values to keep with a new file, such as method and settings.
        compressed: of a new file. Not to be, where frames come one by one: every append then packs a block of rows anew, and
            what was there before stays in the file.

    Raises:
        ValueError: if the file is missing (``"r"``) or is not a frame store.
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
        if mode == "r" and not self.path.is_file():
            raise ValueError(f"no such file: {path}")
        if mode == "w" or (mode == "a" and not self.path.exists()):
            _create(self.path, {}, provenance or {}, compressed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "mode": "r", "_file": None}

    def close(self) -> None:
        """Close the file; it opens again when needed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def file(self) -> h5py.File:
        """The open HDF5 file."""
        if self._file is None:
            self._file = _open_to_read(self.path) if self.mode == "r" else _open_to_write(self.path)
        return self._file

    def __len__(self) -> int:
        if self.mode == "r":
            self.file["committed"].refresh()
        return int(self.file["committed"][0])

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

    @property
    def provenance(self) -> dict[str, Any]:
        """What was noted when the file was made."""
        return dict(json.loads(self.file.attrs["provenance"]))

    def append(self, frames: Sequence[Frame]) -> None:
        """Add frames; once this returns they are counted in.

        Raises:
            ValueError: if the store was opened to read, or an array of a frame does not have one row per atom.
        """
        if self.mode == "r":
            raise ValueError(f"{self.path} was opened to read; open it with mode='a' to append")
        if not frames:
            return
        new = _extra_layout(frames)
        if any(name not in self.file["extra"] for name in new):
            self._add_columns(new)
        file, start = self.file, len(self)
        _write_rows(file, start, frames)
        file.flush()
        file["committed"][0] = start + len(frames)
        file.flush()

    def truncate(self, n: int) -> None:
        """Forget all frames but the first ``n``.

        Raises:
            ValueError: if the store was opened to read, or holds fewer.
        """
        if self.mode == "r":
            raise ValueError(f"{self.path} was opened to read; open it with mode='a' to truncate")
        if not 0 <= n <= len(self):
            raise ValueError(f"{self.path} holds {len(self)} frames, {n} are to be kept")
        self.file["committed"][0] = n
        self.file.flush()

    def _add_columns(self, new: dict[str, tuple[tuple[int, ...], str]]) -> None:
        have = {name: (d.shape[1:], d.dtype.str) for name, d in self.file["extra"].items()}
        provenance = self.provenance
        self.close()
        with FrameStore(self.path) as old:
            _rebuild(self.path, old, {**new, **have}, provenance)

    def _read(self, low: int, high: int) -> list[Frame]:
        """Read the frames low … high − 1 with one access per data set."""
        file = self.file
        ptr = file["ptr"][low : high + 1]
        text_ptr = file["text_ptr"][low : high + 1]
        atoms = slice(int(ptr[0]), int(ptr[-1]))
        cuts = (ptr - ptr[0]).tolist()
        columns: dict[str, Any] = {name: file[name][atoms] for name in _PER_ATOM}
        columns |= {name: file[name][low:high] for name in _PER_FRAME}
        extra = {name: data[atoms] for name, data in file["extra"].items()}
        texts = file["text"][int(text_ptr[0]) : int(text_ptr[-1])].tobytes()
        frames = []
        for k in range(high - low):
            mine = slice(cuts[k], cuts[k + 1])
            text = json.loads(texts[text_ptr[k] - text_ptr[0] : text_ptr[k + 1] - text_ptr[0]])
            origin = {} if text["source"] == "<memory>" else {"source": text["source"]}
            arrays = {name: values[mine] for name, values in extra.items()}
            frames.append(
                Frame(
                    z=columns["z"][mine].astype(np.int64),
                    pos=columns["pos"][mine],
                    cell=columns["cell"][k],
                    pbc=columns["pbc"][k],
                    energy=float(columns["energy"][k]) if columns["has_energy"][k] else None,
                    forces=columns["forces"][mine] if columns["has_forces"][k] else None,
                    stress=columns["stress"][k] if columns["has_stress"][k] else None,
                    info={**origin, **text["info"]},
                    arrays={name: v for name, v in arrays.items() if not np.isnan(v).all()},
                    constraints=text.get("constraints", []),
                    source=f"{self.path}#{low + k}",
                )
            )
        return frames

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


def _open_to_read(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r", libver="latest", swmr=True)
    except OSError as error:
        raise ValueError(f"cannot read {path} as HDF5: {error}") from error
    if file.attrs.get("forcedrop_store") != FORMAT:
        file.close()
        raise ValueError(f"{path} is not a forcedrop frame store of format {FORMAT}")
    return file


def _open_to_write(path: Path) -> h5py.File:
    _open_to_read(path).close()
    try:
        file = h5py.File(path, "r+", libver="latest")
    except OSError as error:
        if "consistency flags" not in str(error) and "already open for write" not in str(error):
            raise ValueError(f"cannot write {path}: {error}") from error
        with FrameStore(path) as killed:  # its writer died: copy what it committed
            columns = {name: (d.shape[1:], d.dtype.str) for name, d in killed.file["extra"].items()}
            _rebuild(path, killed, columns, killed.provenance)
        file = h5py.File(path, "r+", libver="latest")
    file.swmr_mode = True
    return file


def _rebuild(
    path: Path,
    frames: FrameStore,
    extra: dict[str, tuple[tuple[int, ...], str]],
    provenance: dict[str, Any],
) -> None:
    """Write all frames, a block at a time, to a new file beside the old one and put it in its place."""
    with whole(path) as temporary:
        _create(temporary, extra, provenance, compressed=frames.file["pos"].compression is not None)
        with FrameStore(temporary, "a") as store:
            for low in range(0, len(frames), _BLOCK):
                store.append([_with_origin(frame) for frame in frames[low : low + _BLOCK]])


def _with_origin(frame: Frame) -> Frame:
    """Give a frame read from a store the source it had before, so that a copy is the same."""
    info = dict(frame.info)
    source = str(info.pop("source", "<memory>"))
    return Frame(**{**vars(frame), "info": info, "source": source})


def _create(
    path: Path, extra: dict[str, tuple[tuple[int, ...], str]], provenance: dict[str, Any], compressed: bool
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"forcedrop": forcedrop.__version__, "created": datetime.datetime.now(datetime.UTC).isoformat()}
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["forcedrop_store"] = FORMAT
        file.attrs["units"] = json.dumps(UNITS)
        file.attrs["provenance"] = json.dumps({**stamp, **provenance})
        file.create_dataset("committed", data=np.zeros(1, np.int64))
        for name, (shape, kind) in (_PER_ATOM | _PER_FRAME).items():
            _dataset(file, name, shape, kind, compressed)
        _dataset(file, "text", (), "u1", compressed, rows=32)
        for name in _OFFSETS:
            file.create_dataset(name, data=np.zeros(1, np.int64), maxshape=(None,), chunks=(4096,))
        group = file.create_group("extra")
        for name, (shape, kind) in extra.items():
            _dataset(group, name, shape, kind, compressed)


def _dataset(group: Any, name: str, shape: tuple[int, ...], kind: str, compressed: bool, rows: int = 1) -> None:
    """Make an empty data set, in chunks of ``rows`` times 2048 if it is compressed, else times 512."""
    packing = {"compression": "gzip", "shuffle": True} if compressed else {}
    chunk = rows * (2048 if compressed else 512)
    group.create_dataset(
        name, shape=(0, *shape), maxshape=(None, *shape), dtype=kind, chunks=(chunk, *shape), **packing
    )


def _extra_layout(frames: Sequence[Frame]) -> dict[str, tuple[tuple[int, ...], str]]:
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    for frame in frames:
        for name, values in frame.arrays.items():
            array = np.asarray(values)
            if array.shape[:1] != (len(frame),):
                raise ValueError(f"{frame.source}: array {name!r} needs {len(frame)} rows, got shape {array.shape}")
            if array.dtype.kind in "fiub":
                layout.setdefault(name, (array.shape[1:], "f8"))
    return layout


def _write_rows(file: h5py.File, start: int, frames: Sequence[Frame]) -> None:
    """Write frames from row ``start`` on, over whatever an uncommitted writer left there."""
    first = int(file["ptr"][start])
    sizes = np.array([len(f) for f in frames])
    atoms = first + int(sizes.sum())

    def put(name: str, row: int, values: np.ndarray) -> None:
        data = file[name]
        data.resize(row + len(values), axis=0)
        data[row:] = values

    put("z", first, np.concatenate([f.z for f in frames]))
    put("pos", first, np.concatenate([f.pos for f in frames]))
    put(
        "forces",
        first,
        np.concatenate([np.zeros((len(f), 3)) if f.forces is None else f.forces for f in frames]),
    )
    for name, data in file["extra"].items():
        blank = [np.full((len(f), *data.shape[1:]), np.nan) for f in frames]
        rows = [np.asarray(f.arrays.get(name, b), float) for f, b in zip(frames, blank, strict=True)]
        put(f"extra/{name}", first, np.concatenate(rows))
    put("cell", start, np.stack([f.cell for f in frames]))
    put("pbc", start, np.stack([f.pbc for f in frames]))
    put("energy", start, np.array([f.energy or 0.0 for f in frames]))
    put("stress", start, np.stack([np.zeros(6) if f.stress is None else f.stress for f in frames]))
    for name in ("energy", "forces", "stress"):
        put(f"has_{name}", start, np.array([getattr(f, name) is not None for f in frames]))
    texts = [json.dumps(_text(f), default=_plain).encode() for f in frames]
    lengths = np.array([len(t) for t in texts])
    text_first = int(file["text_ptr"][start])
    put("text", text_first, np.frombuffer(b"".join(texts), np.uint8))
    put("text_ptr", start + 1, text_first + np.cumsum(lengths))
    put("ptr", start + 1, first + np.cumsum(sizes))
    if file["pos"].shape[0] != atoms:
        raise ValueError(f"positions of {file['pos'].shape[0]} atoms written, expected {atoms}")


def _text(frame: Frame) -> dict[str, Any]:
    constraints = {"constraints": frame.constraints} if frame.constraints else {}
    return {"info": frame.info, "source": frame.source, **constraints}


def _plain(value: Any) -> Any:
    """Turn numpy values in ``info`` into JSON; anything else into its text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)
