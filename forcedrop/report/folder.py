"""What a folder holds, and the page of it: dynamics, an evaluation, a training, a comparison, active learning."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from forcedrop.model import load_model
from forcedrop.report.figures import md_figure, training_figure
from forcedrop.report.numbers import coverage_table, errors_table, read_rows, rows_table, summary_table
from forcedrop.report.page import Block, Drawing, Picture, Plain, Section, Settings, Text, results_page
from forcedrop.report.tables import describe_frames, describe_model
from forcedrop.report.viewer import Viewer, choose_frames, look_at
from forcedrop.structures import Frame, FrameStore, read_frames

_MOST_ROWS = 20
_TOLD = (  # of flagged steps
    "time_fs", "max_force_sigma_eV_A", "mean_force_sigma_eV_A", "energy_sigma_eV", "potential_eV", "temperature_K",
    "pressure_GPa",
)  # fmt: skip
_WORST = 20
_AUDIT = (  # columns for reading; the file has all
    "key", "round", "status", "reason", "run", "temperature_K", "time_fs", "sigma_max_force_eV_A", "error_max_force_eV_A",
    "sigma_energy_eV", "error_energy_eV", "attempts", "failures",
)  # fmt: skip


class Kind(ABC):
    """A kind of folder.

    Attributes:
        what: its name in words.
        signs: files by which it is recognised; all of them must be there.
    """

    what: ClassVar[str]
    signs: ClassVar[tuple[str, ...]]

    def holds(self, folder: Path) -> bool:
        """Return whether the folder is of this kind."""
        return all((folder / name).is_file() for name in self.signs)

    @abstractmethod
    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return what there is to see.

        Args:
            folder: one of this kind.
            most: frames to show, apart from those that must be seen.
        """


class Dynamics(Kind):
    """What ``forcedrop md`` leaves, also when it was killed."""

    what = "molecular dynamics"
    signs = ("md.csv", "md.h5")

    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return structures, curves, tables, settings."""
        rows = read_rows(folder / "md.csv")
        summary = _json(folder / "md.json")
        times = {float(time) for time in summary.pop("flagged_fs", [])}
        threshold = _threshold(summary)
        flagged = [k for k, row in enumerate(rows) if float(row["time_fs"]) in times]
        flagged.sort(key=lambda k: -float(rows[k]["max_force_sigma_eV_A"]))
        with FrameStore(folder / "md.h5") as store:
            n_frames = min(len(store), len(rows))
            must = [k for k in flagged if k < n_frames][:most]
            chosen = choose_frames(n_frames, most, must)
            frames = [store[k] for k in chosen]
        viewer = Viewer(
            frames, chosen, [chosen.index(k) for k in must], threshold, trajectory=True, name=_identifier(folder)
        )
        seen = f"Shown are all {n_frames} recorded steps."
        if len(chosen) < n_frames:
            kind = "the flagged ones" if len(must) == len(flagged) else f"the {len(must)} flagged ones of largest σ"
            seen = f"Shown are {len(chosen)} of {n_frames} recorded steps, evenly spread" + (
                f", and {kind}." if must else "."
            )
        curves: Block = Picture(folder / "md.png")
        if not (folder / "md.png").is_file():
            numbers = [{key: float(value) for key, value in row.items()} for row in rows]
            curves = Drawing(md_figure(numbers, sorted(times), threshold), "md")
        tables: list[Block] = [summary_table(rows, left_out=("step",))]
        if flagged:
            caption = f"flagged: {len(flagged)} of {len(rows)} recorded steps" + (
                f"; the {_MOST_ROWS} of largest σ" if len(flagged) > _MOST_ROWS else ", largest σ first"
            )
            tables.append(rows_table([_some(rows[k], _TOLD) for k in flagged[:_MOST_ROWS]], caption))
        tables += [rows_table(summary.pop(key), key) for key in list(summary) if _is_rows(summary[key])]
        about = [Settings(summary)] if summary else [Text("There is no md.json: the run was not finished.")]
        return [
            Section("Structures", [viewer, Text(seen)]),
            Section("Along the run", [curves]),
            Section("Numbers", tables),
            Section("Settings and summary", about),
        ]


class Assessment(Kind):
    """What ``forcedrop evaluate --output`` leaves."""

    what = "evaluation"
    signs = ("evaluation.json",)

    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return structures, tables, pictures, settings."""
        values = _json(folder / "evaluation.json")
        found = [Section("Structures", self._structures(folder, most))]
        reports = {name: part for name, part in values.items() if isinstance(part, dict) and "rmse" in part}
        by_frame = reports.pop("forces_by_frame", None)
        kind = "calibrated σ" if values.get("calibrated") else "raw spread, not calibrated"
        if values.get("samples"):
            kind += f" of {values['samples']} functions"
        tables: list[Block] = [
            errors_table(reports, f"{values.get('frames', '?')} frames, {kind}; errors in thousandths")
        ]
        if elements := values.get("forces_by_element"):
            tables.append(errors_table({f"forces on {name}": r for name, r in elements.items()}, "by element"))
        if by_frame:
            tables.append(errors_table({"forces": by_frame}, "root mean squares of whole frames"))
        if coverage := values.get("coverage"):
            tables.append(coverage_table(coverage))
        if detection := values.get("detection"):
            tables.append(Text(_detection(detection)))
        found.append(Section("How wrong, and does it know it", tables))
        pictures = [folder / f"{name}.png" for name in ("parity", "sigma", "detection")]
        found.append(Section("Pictures", [Picture(path) for path in pictures if path.is_file()]))
        if settings := values.get("settings"):
            found.append(Section("Settings", [Settings(settings)]))
        return found

    def _structures(self, folder: Path, most: int) -> list[Block]:
        if not (folder / "frames.h5").is_file():
            return [Text("There is no frames.h5 in the folder, so no structures are shown.")]
        with FrameStore(folder / "frames.h5") as store:
            frames: list[Frame] = store[:]
        errors = [shown.error for shown in map(look_at, frames)]
        largest = np.array([-np.inf if error is None else error.max() for error in errors])
        worst = [int(k) for k in np.argsort(-largest, kind="stable")[:_WORST] if np.isfinite(largest[k])]
        return _chosen(frames, most, worst, f"the {len(worst)} of largest force error", folder)


class Training(Kind):
    """What ``forcedrop train`` leaves."""

    what = "training"
    signs = ("log.csv", "model.pt")

    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return the curves, the model in words, how the data were split."""
        rows = read_rows(folder / "log.csv")
        blocks: list[Block] = [Drawing(training_figure(folder / "log.csv"), "training")]
        blocks += [rows_table(rows[-1:], "last epoch"), Plain(describe_model(load_model(folder / "model.pt")))]
        if split := _json(folder / "split.json"):
            blocks.append(Text("Frames used: " + ", ".join(f"{len(part)} for {name}" for name, part in split.items())))
        return [Section("Training", blocks)]


class Comparison(Kind):
    """What ``forcedrop compare --output`` leaves."""

    what = "comparison"
    signs = ("comparison.json",)

    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return the table and the picture."""
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        return [Section("Models side by side", [rows_table(rows), *_pictures(folder, ["comparison"])])]


class ActiveLearning(Kind):
    """The state of a loop of rounds."""

    what = "active learning"
    signs = ("rounds.csv",)

    def sections(self, folder: Path, most: int) -> list[Section]:
        """Return what the rounds brought, the audit, what was labelled, the settings."""
        found = [Section("Rounds", [*_pictures(folder, ["rounds"]), rows_table(read_rows(folder / "rounds.csv"))])]
        if (folder / "audit.csv").is_file():
            rows = read_rows(folder / "audit.csv")
            caption = f"the last {_MOST_ROWS} of {len(rows)}" if len(rows) > _MOST_ROWS else ""
            last = [_some(row, _AUDIT) for row in rows[-_MOST_ROWS:]]
            found.append(Section("Audit", [*_pictures(folder, ["audit"]), rows_table(last, caption)]))
        if (folder / "labels.h5").is_file():
            with FrameStore(folder / "labels.h5") as store:
                frames: list[Frame] = store[:]
            if frames:
                judged = [f for path in sorted(folder.glob("rounds/*/judged.h5")) for f in read_frames(path)]
                blocks = _chosen(judged or frames, most, (), "", folder)
                starts = sum(frame.info.get("round") == 0 for frame in frames)
                if judged and starts:
                    blocks.append(Text(f"The {starts} start frames, which no model had judged, are left out."))
                found.append(Section("Labelled structures", [*blocks, Plain(describe_frames(frames))]))
        config = folder / "config.yaml"
        settings = (
            yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else _json(folder / "loop.json")
        )
        return [*found, Section("Settings", [Settings(settings)])] if settings else found


KINDS: tuple[Kind, ...] = (Dynamics(), Assessment(), ActiveLearning(), Comparison(), Training())
"""Everything that a page can be made of."""


def recognise(folder: str | Path) -> list[Kind]:
    """Return the kinds of a folder; it may be of several.

    Raises:
        ValueError: if there is no such folder, or nothing in it is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    if found := [kind for kind in KINDS if kind.holds(folder)]:
        return found
    known = "; ".join(f"{' and '.join(kind.signs)} ({kind.what})" for kind in KINDS)
    raise ValueError(f"{folder} holds nothing that a page could be made of; looked for {known}")


def folder_sections(folder: str | Path, most: int = 200) -> list[Section]:
    """Return the sections of a page of a folder, to be put on a page with others.

    Args:
        folder: what ``md``, ``evaluate``, ``train``, ``compare`` or an active-learning loop wrote.
        most: frames in the viewer, evenly spread; flagged ones (of an evaluation: the worst ones) come on top, at most as many.

    Raises:
        ValueError: see :func:`recognise`; or if ``most`` is not positive.
    """
    if most < 1:
        raise ValueError(f"the number of frames must be positive, got {most}")
    return [section for kind in recognise(folder) for section in kind.sections(Path(folder), most)]


def report_page(
    folder: str | Path, output: str | Path | None = None, *, most: int = 200, title: str | None = None
) -> Path:
    """Write one HTML file, which needs no network, of what is in a folder.

    Args:
        folder: see :func:`folder_sections`.
        output: the file; by default ``page.html`` in the folder.
        most: see :func:`folder_sections`.
        title: by default the name of the folder and what it is.

    Raises:
        ValueError: see :func:`folder_sections`.
    """
    folder = Path(folder)
    sections = folder_sections(folder, most)
    what = ", ".join(kind.what for kind in recognise(folder))
    return results_page(output or folder / "page.html", title or f"{folder.resolve().name}: {what}", sections)


def _chosen(frames: Sequence[Frame], most: int, always: Sequence[int], among: str, folder: Path) -> list[Block]:
    """Return the viewer of some of the frames, and a sentence on which."""
    chosen = choose_frames(len(frames), most, always[:most])
    viewer = Viewer([frames[k] for k in chosen], chosen, name=_identifier(folder))
    what = (
        f"{len(chosen)} of {len(frames)} frames, evenly spread"
        if len(chosen) < len(frames)
        else f"all {len(frames)} frames"
    )
    return [viewer, Text(f"Shown are {what}" + (f", {among}." if among and len(chosen) < len(frames) else "."))]


def _pictures(folder: Path, names: Sequence[str]) -> list[Block]:
    return [Picture(path) for name in names if (path := folder / f"{name}.png").is_file()]


def _some(row: dict[str, str], columns: Sequence[str]) -> dict[str, str]:
    """Return these columns of a row in this order; all of them where none is known."""
    return {key: row[key] for key in columns if key in row} or row


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _threshold(summary: dict[str, Any]) -> float | None:
    """Return the largest atomic force σ [eV/Å] above which a run flagged: the lower end of its guard's band."""
    band = ((summary.get("settings") or {}).get("guard") or {}).get("band") or {}
    return band.get("low") if band.get("criterion", "max_force") == "max_force" else None


def _is_rows(value: Any) -> bool:
    """Return whether a value is a list of records, which reads best as a table."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _detection(found: dict[str, Any]) -> str:
    low, high = found["auroc_interval"]
    return (
        f"σ finds the worst {100 * found['share']:.0f} % of the atoms (force error above {1e3 * found['threshold']:.0f} meV/Å) "
        f"with an AUROC of {found['auroc']:.3f} ({low:.3f} … {high:.3f}) and a precision of {found['precision']:.2f}."
    )


def _identifier(folder: Path) -> str:
    """Return a name for the viewer's elements: letters, digits and dashes only."""
    return "structures-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name)
