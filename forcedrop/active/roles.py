"""What a label is for: to train on, to stop on, or to calibrate on; drawn once, and kept whatever comes later.

A network that is fine-tuned must not be calibrated by frames that trained it in a round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forcedrop.active.state import State, frame_key, read_json, write_json
from forcedrop.structures import Frame, is_isolated_atom, write_frames
from forcedrop.structures.copies import copies

TRAIN = "train"


def role_files(state: State, number: int, shares: Mapping[str, float], seed: int) -> tuple[dict[str, list[Path]], int]:
    """Write the files of labels that are not there yet, one a round and role.

    Args:
        state: of the loop.
        number: the round that is to be trained; its files are those of the rounds before.
        shares: to hold out, by role; of rounds whose labels have their roles already, changed shares change nothing.
        seed: of the draw.

    Returns:
        The files to ``train`` on and those of each of ``shares``, and the number of labels to train on.

    Raises:
        ValueError: if nothing is left to train on.
    """
    files: dict[str, list[Path]] = {TRAIN: [], **{name: [] for name in shares}}
    frames, known = state.frames(), dict[str, list[Frame]]()
    for before in range(number):
        own = [frame for frame in frames if int(frame.info["round"]) == before]
        path = state.round(before) / "roles.json"
        roles: dict[str, str] | None = read_json(path)
        if roles is None:
            drawn = draw_roles(own, known, shares, np.random.default_rng([seed, before, 2]))
            roles = {frame_key(frame): role for frame, role in zip(own, drawn, strict=True)}
            write_json(path, roles)
        for role in files:
            mine = [frame for frame in own if roles[frame_key(frame)] == role]
            if mine:
                known.setdefault(role, []).extend(mine)
                files[role].append(state.round(before) / f"{role}.h5")
                if not files[role][-1].exists():
                    write_frames(files[role][-1], mine)
    if all(is_isolated_atom(frame) for frame in known.get(TRAIN, [])):
        raise ValueError(f"{len(frames)} labels are too few to hold out shares of {dict(shares)} of them")
    return files, len(known[TRAIN])


def draw_roles(
    frames: Sequence[Frame], known: Mapping[str, Sequence[Frame]], shares: Mapping[str, float], rng: np.random.Generator
) -> list[str]:
    """Return what each new label is for: ``train``, or one of ``shares``.

    The shares hold of all labels together, at least one each. Single atoms, and frames with an element that no other frame
    trains, are not held out. A copy of a structure has the role that the structure has.

    Args:
        frames: the new ones.
        known: those of before, by role.
        shares: to hold out.
        rng: of the draw.
    """
    roles = [TRAIN] * len(frames)
    seen = sum(not is_isolated_atom(frame) for part in (frames, *known.values()) for frame in part)
    others = [(role, frame) for role, part in known.items() for frame in part]
    first = [k - len(others) for k in copies([*(frame for _, frame in others), *frames])[len(others) :].tolist()]
    alone = [is_isolated_atom(frame) for frame in frames]
    order = rng.permutation([k for k in range(len(frames)) if first[k] == k and not alone[k]]).tolist()
    elements = [set(frame.z.tolist()) for frame in frames]
    trained = Counter(z for frame in known.get(TRAIN, []) for z in set(frame.z.tolist()))
    trained.update(z for k in order for z in elements[k])
    for name, share in shares.items():
        left = max(1, round(share * seen)) - len(known.get(name, [])) if share else 0
        for k in list(order):
            if left <= 0:
                break
            if all(trained[z] > 1 for z in elements[k]):
                trained.subtract(elements[k])
                roles[k] = name
                order.remove(k)
                left -= 1
    for k, other in enumerate(first):
        if other != k and not alone[k]:
            roles[k] = roles[other] if other >= 0 else others[other][0]
    return roles
