"""How frames lie in the HDF5 file of a :class:`~forcedrop.structures.store.FrameStore`.

Per-atom arrays of all frames lie behind one another with offsets ``ptr`` (n + 1), per-frame arrays have one row each, and texts
(JSON of ``info``, constraints and the source) are bytes with offsets ``text_ptr``; ``check`` holds a checksum of everything that
belongs to a frame. All data sets are chunked and grow, ``committed`` says how many frames count.
"""

from __future__ import annotations

import datetime
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

import forcedrop
from forcedrop.structures.frame import Frame

FORMAT = 2
READABLE = (1, 2)
"""Files of format 1 have no checksums of frames."""
VERSION = ("v110", "v110")
"""Of HDF5 that reads the files: its metadata have checksums."""
UNITS = {"length": "Angstrom", "energy": "eV", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3"}
PER_ATOM = {"z": ((), "i2"), "pos": ((3,), "f8"), "forces": ((3,), "f8")}
PER_FRAME = {
    "cell": ((3, 3), "f8"), "pbc": ((3,), "?"), "energy": ((), "f8"), "stress": ((6,), "f8"),
    "has_energy": ((), "?"), "has_forces": ((), "?"), "has_stress": ((), "?"),
}  # fmt: skip
OFFSETS = ("ptr", "text_ptr")
CHECK = "check"
_SPARE, _FACTOR = 2**28, 30
"""Numbers and texts may take up to this many bytes more, or times as many, in memory as the file on disk."""
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}

Columns = dict[str, tuple[tuple[int, ...], str]]


def create(file: h5py.File, extra: Columns, provenance: Mapping[str, Any], compressed: bool) -> None:
    """Make a store without frames in an empty file.

    Args:
        file: empty, open to write.
        extra: shapes of a row and types of the further per-atom arrays.
        provenance: plain values.
        compressed: whether chunks are packed.
    """
    stamp = {"forcedrop": forcedrop.__version__, "created": datetime.datetime.now(datetime.UTC).isoformat()}
    file.attrs["forcedrop_store"] = FORMAT
    file.attrs["units"] = json.dumps(UNITS)
    file.attrs["provenance"] = np.bytes_(
        json.dumps({**stamp, **provenance}).encode()
    )  # of fixed length, see read_provenance
    file.create_dataset("committed", data=np.zeros(1, np.int64))
    for name, (shape, kind) in {**PER_ATOM, **PER_FRAME, CHECK: ((), "u4")}.items():
        _dataset(file, name, shape, kind, compressed)
    _dataset(file, "text", (), "u1", compressed, rows=32)
    for name in OFFSETS:
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


def extra_columns(frames: Sequence[Frame]) -> Columns:
    """Return the further per-atom arrays of frames, as they are stored.

    Raises:
        ValueError: if one does not have a row for every atom.
    """
    layout: Columns = {}
    for frame in frames:
        for name, values in frame.arrays.items():
            array = np.asarray(values)
            if array.shape[:1] != (len(frame),):
                raise ValueError(f"{frame.source}: array {name!r} needs {len(frame)} rows, got shape {array.shape}")
            if array.dtype.kind in "fiub":
                layout.setdefault(name, (array.shape[1:], "f8"))
    return layout


def columns(file: h5py.File) -> Columns:
    """Return the further per-atom arrays that a file has."""
    return {name: (data.shape[1:], data.dtype.str) for name, data in file["extra"].items()}


def write_rows(file: h5py.File, start: int, frames: Sequence[Frame]) -> None:
    """Write frames from row ``start`` on, over whatever is there, and count them in."""
    first, text_first = int(file["ptr"][start]), int(file["text_ptr"][start])
    sizes = np.array([len(f) for f in frames])
    values: dict[str, np.ndarray] = {
        "z": np.concatenate([f.z for f in frames]),
        "pos": np.concatenate([f.pos for f in frames]),
        "forces": np.concatenate([np.zeros((len(f), 3)) if f.forces is None else f.forces for f in frames]),
        "cell": np.stack([f.cell for f in frames]),
        "pbc": np.stack([f.pbc for f in frames]),
        "energy": np.array([f.energy or 0.0 for f in frames]),
        "stress": np.stack([np.zeros(6) if f.stress is None else f.stress for f in frames]),
    }
    for name in ("energy", "forces", "stress"):
        values[f"has_{name}"] = np.array([getattr(f, name) is not None for f in frames])
    for name, column in file["extra"].items():
        blank = [np.full((len(f), *column.shape[1:]), np.nan) for f in frames]
        rows = [np.asarray(f.arrays.get(name, b), float) for f, b in zip(frames, blank, strict=True)]
        values[f"extra/{name}"] = np.concatenate(rows)
    data = {name: file[name] for name in (*values, *OFFSETS, "text", CHECK)}
    values = {name: np.ascontiguousarray(x, dtype=data[name].dtype) for name, x in values.items()}
    texts = [json.dumps(_text(f), default=_plain).encode() for f in frames]

    def put(name: str, row: int, rows: np.ndarray) -> None:
        data[name].resize(row + len(rows), axis=0)
        data[name][row:] = rows

    for name, new in values.items():
        put(name, start if name in PER_FRAME else first, new)
    put("text", text_first, np.frombuffer(b"".join(texts), np.uint8))
    put("text_ptr", start + 1, text_first + np.cumsum([len(t) for t in texts]))
    put("ptr", start + 1, first + np.cumsum(sizes))
    put(CHECK, start, np.array(_checksums(values, [0, *np.cumsum(sizes).tolist()], texts), np.uint32))
    file["committed"][0] = start + len(frames)


def forget_rows(file: h5py.File, n: int) -> None:
    """Count only the first ``n`` frames in."""
    file[CHECK].resize(n, axis=0)
    file["committed"][0] = n


def _checksums(values: Mapping[str, np.ndarray], cuts: Sequence[int], texts: Sequence[bytes]) -> list[int]:
    """Return a checksum of everything that belongs to each frame, without what it has nothing of."""
    names = sorted(values)
    found = []
    for k, text in enumerate(texts):
        total = zlib.crc32(text)
        for name in names:
            rows = values[name][k : k + 1] if name in PER_FRAME else values[name][cuts[k] : cuts[k + 1]]
            if name.startswith("extra/") and np.isnan(rows).all():  # a column that came later
                continue
            total = zlib.crc32(np.ascontiguousarray(rows).data if rows.size else b"", zlib.crc32(name.encode(), total))
        found.append(total)
    return found


def read_rows(file: h5py.File, low: int, high: int, path: Any) -> list[Frame]:
    """Read the frames low … high − 1 with one access per data set.

    Raises:
        ValueError: if they are not what was written.
    """
    ptr, text_ptr = (_offsets(file, name, low, high) for name in OFFSETS)
    lengths = [len(data) for data in (*(file[name] for name in PER_ATOM), *file["extra"].values())]
    if ptr[-1] > min(lengths) or text_ptr[-1] > len(file["text"]):
        raise ValueError(f"frames {low} to {high - 1} reach beyond the end of the data")
    atoms = slice(ptr[0], ptr[-1])
    cuts = [p - ptr[0] for p in ptr]
    values: dict[str, np.ndarray] = {name: file[name][atoms] for name in PER_ATOM}
    values |= {name: file[name][low:high] for name in PER_FRAME}
    values |= {f"extra/{name}": data[atoms] for name, data in file["extra"].items()}
    joined = file["text"][text_ptr[0] : text_ptr[-1]].tobytes()
    texts = [joined[text_ptr[k] - text_ptr[0] : text_ptr[k + 1] - text_ptr[0]] for k in range(high - low)]
    if CHECK in file:
        found, wanted = _checksums(values, cuts, texts), file[CHECK][low:high].tolist()
        for k in range(high - low):
            if found[k] != wanted[k]:
                raise ValueError(f"frame {low + k} is not what was written (its checksum is wrong)")
    return [_frame(values, k, slice(cuts[k], cuts[k + 1]), texts[k], f"{path}#{low + k}") for k in range(high - low)]


def _offsets(file: h5py.File, name: str, low: int, high: int) -> list[int]:
    """Return where frames begin and end."""
    found = file[name][low : high + 1]
    if (np.diff(found) < 0).any() or found[0] < 0 or (low == 0 and found[0] != 0):
        raise ValueError(f"{name!r} does not grow")
    offsets: list[int] = found.tolist()
    return offsets


def _frame(values: Mapping[str, np.ndarray], k: int, mine: slice, text: bytes, source: str) -> Frame:
    about = json.loads(text)
    if not isinstance(about, dict) or not isinstance(about.get("info"), dict):
        raise ValueError(f"the text of {source} is not what was written")
    origin = {} if about.get("source", "<memory>") == "<memory>" else {"source": str(about["source"])}
    constraints = about.get("constraints", [])
    if not isinstance(constraints, list):
        raise ValueError(f"the constraints of {source} are not what was written")
    arrays = {name[len("extra/") :]: rows[mine] for name, rows in values.items() if name.startswith("extra/")}
    return Frame(
        z=values["z"][mine].astype(np.int64),
        pos=values["pos"][mine],
        cell=values["cell"][k],
        pbc=values["pbc"][k],
        energy=float(values["energy"][k]) if values["has_energy"][k] else None,
        forces=values["forces"][mine] if values["has_forces"][k] else None,
        stress=values["stress"][k] if values["has_stress"][k] else None,
        info={**origin, **about["info"]},
        arrays={name: rows for name, rows in arrays.items() if not np.isnan(rows).all()},
        constraints=constraints,
        source=source,
    )


def check_file(file: h5py.File, size: int) -> None:
    """Check that a file is a store, and that its data sets fit together, without reading them.

    Args:
        file: open.
        size: of the file on disk.

    Raises:
        ValueError: if it is not, or they do not.
    """
    if "forcedrop_store" not in file.attrs or file.attrs.get_id("forcedrop_store").dtype.kind not in "iu":
        raise NotAStore
    if file.attrs["forcedrop_store"] not in READABLE:
        raise NotAStore
    if file.attrs["forcedrop_store"] != 1:
        if CHECK not in file:
            raise ValueError("it has no checksums")
        read_provenance(file)
    if not isinstance(file["extra"], h5py.Group):
        raise ValueError("'extra' is not a group")
    atoms = {**PER_ATOM, **{f"extra/{name}": (None, "f8") for name in file["extra"]}}
    frames = {**PER_FRAME, **({CHECK: ((), "u4")} if CHECK in file else {})}
    others = {"text": ((), "u1"), **dict.fromkeys((*OFFSETS, "committed"), ((), "i8"))}
    wanted: Mapping[str, tuple[tuple[int, ...] | None, str]] = {**atoms, **frames, **others}
    declared = sum(_checked(file, name, shape, kind) for name, (shape, kind) in wanted.items())
    if declared > max(size + _SPARE, _FACTOR * size):
        raise ValueError(f"it declares {declared / 1e9:.3g} GB of data in a file of {size / 1e6:.3g} MB")
    n, rows = int(file["committed"][0]), {name: len(file[name]) for name in wanted}
    if CHECK in file and rows[CHECK] != n:
        raise ValueError(f"it counts {n} frames and has checksums of {rows[CHECK]}")
    if n < 0 or any(rows[name] < n for name in frames) or any(rows[name] < n + 1 for name in OFFSETS):
        raise ValueError(f"it counts {n} frames, and some data sets have fewer")


def read_provenance(file: h5py.File, heap: bytes = b"") -> dict[str, Any]:
    """Return what was noted when a file was made.

    HDF5 keeps texts of any length in heaps without checksums, and reads some damaged ones for ever; a file of format 1 has such.

    Args:
        file: open.
        heap: the start of the file, with the heaps of one of format 1.

    Raises:
        ValueError: if the note, or a heap, is damaged.
    """
    if file.attrs.get_id("provenance").dtype.kind != "S":
        if file.attrs["forcedrop_store"] != 1:
            raise ValueError("its provenance is not a text of fixed length")
        _walk_heaps(heap)
    note = json.loads(file.attrs["provenance"])
    if not isinstance(note, dict):
        raise ValueError("its provenance is not a table")
    return note


def _walk_heaps(data: bytes) -> None:
    """Check that HDF5 comes to the end of every global heap: objects of 16 bytes and their size, in steps of 8."""
    start = data.find(b"GCOL")
    while start >= 0:
        size, at = int.from_bytes(data[start + 8 : start + 16], "little"), start + 16
        end = start + size
        while at + 16 <= min(end, len(data)):
            index = int.from_bytes(data[at : at + 2], "little")
            length = int.from_bytes(data[at + 8 : at + 16], "little")
            step = length if index == 0 else 16 + (length + 7) // 8 * 8
            if step < 16 or at + step > end:
                raise ValueError("a heap of texts is damaged")
            at += step
        start = data.find(b"GCOL", start + 4)


class NotAStore(ValueError):
    """An HDF5 file of something else."""


def _checked(file: h5py.File, name: str, shape: tuple[int, ...] | None, kind: str) -> int:
    """Return the bytes of a data set, in memory."""
    data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"there is no data set {name!r}")
    want = np.dtype(kind)
    if data.dtype.kind != want.kind or (shape is not None and data.shape[1:] != shape) or data.ndim < 1:
        raise ValueError(f"data set {name!r} holds {data.dtype} of shape {data.shape}")
    made = data.id.get_create_plist()
    filters = {made.get_filter(k)[0] for k in range(made.get_nfilters())}
    grows = name == "committed" or data.maxshape[0] is None
    if data.is_virtual or data.external or filters - _FILTERS or not grows:
        raise ValueError(f"data set {name!r} is stored in a way that no store is")
    if data.chunks is not None and np.prod(data.chunks, dtype=float) * want.itemsize > _SPARE:
        raise ValueError(f"data set {name!r} comes in chunks of {data.chunks} rows")
    return int(np.prod(data.shape, dtype=float)) * want.itemsize


def _text(frame: Frame) -> dict[str, Any]:
    constraints = {"constraints": frame.constraints} if frame.constraints else {}
    return {"info": frame.info, "source": frame.source, **constraints}


def _plain(value: Any) -> Any:
    """Turn numpy values in ``info`` into JSON; anything else into its text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value)
