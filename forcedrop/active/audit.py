"""The audit trail: a row a frame and a row a round, always made from what the stages left, never kept beside it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from forcedrop.active.state import State, frame_key
from forcedrop.files import write_text
from forcedrop.structures import FrameStore

AUDIT = (
    "key", "round", "status", "reason", "run", "temperature_K", "seed", "start", "time_fs", "score", "distance",
    "sigma_pick_eV_A", "sigma_energy_eV", "sigma_max_force_eV_A", "error_energy_eV", "error_max_force_eV_A",
    "error_force_rms_eV_A", "label_seconds", "attempts", "calls", "failures",
)  # fmt: skip
ROUNDS = (
    "round", "labels", "validation_forces_eV_A", "runs", "explored_ps", "stopped", "exploded", "threshold_eV_A",
    "candidates", "flagged", "picked", "labelled", "failed", "calls", "force_rmse_eV_A", "force_sigma_eV_A", "z2", "z2_low",
    "z2_high", "energy_rmse_eV_atom", "energy_z2", "verdict", "train_seconds", "explore_seconds", "label_seconds",
)  # fmt: skip


def audit_rows(state: State) -> list[dict[str, Any]]:
    """Return a row for every frame that was picked, whether it has got a label or not.

    ``attempts`` are those that ended, ``calls`` those that started: a kill in the middle of a label makes one more.
    """
    calls = Counter(line["key"] for line in state.journal.read() if line.get("event") == "label")
    rows = []
    for number in state.rounds():
        if state.result(number, "pick") is None:
            continue
        records, judged = state.records(number), (state.result(number, "judge") or {"each": {}})["each"]
        names = ["picks.h5", "ready.h5"] if number == 0 else ["picks.h5"]
        for name in names:
            with FrameStore(state.round(number) / name) as store:
                frames = store[:]
            for frame in frames:
                key, info = frame_key(frame), frame.info
                record, own = records.get(key, {"attempts": []}), judged.get(key, {})
                ready = {"status": "given"} if name == "ready.h5" else {"status": "waiting"}
                rows.append(
                    {
                        **dict.fromkeys(AUDIT),
                        **{k: info.get(k) for k in AUDIT if k in info},
                        "key": key,
                        "round": number,
                        "status": record.get("status", ready["status"]),
                        "start": info.get("start") or info.get("origin"),
                        "sigma_pick_eV_A": info.get("sigma_pick"),
                        "sigma_energy_eV": own.get("sigma_energy"),
                        "sigma_max_force_eV_A": own.get("sigma_max_force"),
                        "error_energy_eV": own.get("error_energy"),
                        "error_max_force_eV_A": own.get("error_max_force"),
                        "error_force_rms_eV_A": own.get("error_force_rms"),
                        "label_seconds": record.get("seconds"),
                        "attempts": len(record["attempts"]),
                        "calls": calls[key],
                        "failures": "; ".join(a["reason"] for a in record["attempts"] if a["reason"]),
                    }
                )
    return rows


def round_rows(state: State) -> list[dict[str, Any]]:
    """Return a row for every round that has a model, with what its stages have found so far."""
    calls: Counter[int] = Counter()
    for row in audit_rows(state):
        calls[row["round"]] += row["calls"]
    rows = []
    for number in state.rounds():
        found = {
            name: state.result(number, name) or {} for name in ("train", "explore", "pick", "label", "judge", "append")
        }
        if not found["train"]:
            continue
        judge = found["judge"] if found["append"] else {}
        rows.append(
            {
                **dict.fromkeys(ROUNDS),
                "round": number,
                "labels": found["train"]["labels"],
                "validation_forces_eV_A": found["train"]["validation_forces"],
                "train_seconds": found["train"]["seconds"],
                **{k: found["explore"].get(k) for k in ("runs", "stopped", "exploded")},
                "explored_ps": found["explore"].get("ps"),
                "threshold_eV_A": found["explore"].get("threshold"),
                "explore_seconds": found["explore"].get("seconds"),
                **{k: found["pick"].get(k) for k in ("candidates", "flagged", "picked")},
                **{k: found["label"].get(k) for k in ("labelled", "failed")},
                "label_seconds": found["label"].get("seconds"),
                "calls": calls[number],
                "force_rmse_eV_A": judge.get("force_rmse"),
                "force_sigma_eV_A": judge.get("force_sigma"),
                **{k: judge.get(k) for k in ("z2", "z2_low", "z2_high", "energy_z2", "verdict")},
                "energy_rmse_eV_atom": judge.get("energy_rmse"),
            }
        )
    return rows


def write_tables(state: State) -> list[dict[str, Any]]:
    """Write ``audit.csv`` and ``rounds.csv``; return the rows of the latter."""
    write_text(state.folder / "audit.csv", _csv(AUDIT, audit_rows(state)))
    rows = round_rows(state)
    write_text(state.folder / "rounds.csv", _csv(ROUNDS, rows))
    return rows


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()
