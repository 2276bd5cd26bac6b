"""Going on with a loop that is over because something failed: what ended it is undone when it is started again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from forcedrop.active.config import ActiveConfig
from forcedrop.active.state import State
from forcedrop.files import remove_folder

STOPPED = "stopped.json"


def looking(config: ActiveConfig) -> str:
    """Return a hash of the settings that decide what an exploration finds and what is picked of it."""
    values = config.model_dump(include={"explore", "pick"}, mode="json")
    for section, free in (("explore", "workers"), ("pick", "batch")):
        values[section].pop(free)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def reopen(state: State, config: ActiveConfig, last: int) -> None:
    """Undo the end of a loop, if it was one that whoever starts it again wants to see tried again.

    Rounds at the end none of whose labels succeeded are labelled again, as are start frames; a round that found nothing to
    pick explores anew if settings of exploring or picking have changed.

    Args:
        state: the folder.
        config: of now.
        last: the last round that is over.
    """
    start, label = state.result(0, "append"), state.result(0, "label")
    if start is None and label is not None and not label["labelled"] and not state.result(0, "pick")["ready"]:
        _forget_failures(state, 0)
    if not (state.folder / STOPPED).exists():
        return
    first = last + 1
    while first > 1 and _all_failed(state, first - 1):
        first -= 1
    if first <= last:
        _forget_rounds(state, first)
        _forget_failures(state, first)
    elif last > 0 and _looked_otherwise(state.result(last, "pick"), config):
        _forget_rounds(state, last)
        _forget_stages(state, last, "roles", "append", "judge", "label", "pick", "explore")
        remove_folder(state.round(last) / "runs")
    (state.folder / STOPPED).unlink()


def _all_failed(state: State, number: int) -> bool:
    return bool(state.result(number, "pick")["picked"]) and not state.result(number, "label")["labelled"]


def _looked_otherwise(pick: Mapping[str, Any], config: ActiveConfig) -> bool:
    """Return whether nothing was picked, by other settings than those of now."""
    return not pick["picked"] and pick.get("looking") != looking(config)


def _forget_failures(state: State, number: int) -> None:
    """Forget that labels of a round failed."""
    _forget_stages(state, number, "roles", "append", "judge", "label")
    for key, record in state.records(number).items():
        if record.get("status") != "labelled":
            (state.round(number) / "labels" / f"{key}.json").unlink()


def _forget_stages(state: State, number: int, *stages: str) -> None:
    """The last first: a stage that is over has those before it."""
    for stage in stages:
        (state.round(number) / f"{stage}.json").unlink(missing_ok=True)


def _forget_rounds(state: State, after: int) -> None:
    """Remove the rounds after one, the last first; what they know they can find again."""
    for number in reversed(state.rounds()):
        if number > after:
            remove_folder(state.round(number))
