"""The labels of a round as they go into the store; and the store made anew from them, should it be damaged or lost."""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from forcedrop.active.labelling import labelled
from forcedrop.active.state import State, frame_key
from forcedrop.structures import Frame, FrameStore, write_frames


def fresh(state: State, number: int) -> list[Frame]:
    """Return what was picked in a round and has got its label."""
    with FrameStore(state.round(number) / "picks.h5") as store:
        frames = store[:]
    records = state.records(number)
    pairs = [(frame, records[frame_key(frame)]) for frame in frames]
    return [labelled(frame, record) for frame, record in pairs if record["status"] == "labelled"]


def gathered(state: State, number: int) -> list[Frame]:
    """Return all that a round adds to the store: fresh labels with what the model had predicted; at first those given, too."""
    frames = fresh(state, number)
    if number == 0:
        with FrameStore(state.round(0) / "ready.h5") as store:
            frames += store[:]
    judged = (state.result(number, "judge") or {"each": {}})["each"]
    return [replace(f, info={**f.info, **judged.get(frame_key(f), {}), "key": frame_key(f)}) for f in frames]


def mend(state: State) -> None:
    """Make the store anew from the labels of all rounds that are over, if it is damaged or gone, and say so.

    Raises:
        ValueError: if what it is to be made from is damaged, too.
        WriteError: if it cannot be written.
    """
    over = [number for number in state.rounds() if state.result(number, "append") is not None]
    if state.store.exists():
        try:
            state.frames()
        except ValueError as error:
            what = str(error)
        else:
            return
    elif over:
        what = f"{state.store} is gone"
    else:
        return
    frames = {frame_key(frame): frame for number in over for frame in gathered(state, number)}
    if frames:
        write_frames(state.store, list(frames.values()), provenance={"what": "active learning"})
    else:
        state.store.unlink()
    tqdm.write(f"{what}; made anew from {state.folder / 'rounds'}: {len(frames)} labels")
