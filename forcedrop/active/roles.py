"""What a label is for: to train on, to stop on, or to calibrate on; drawn once, and kept when later rounds add more.

A network that is fine-tuned must not be calibrated by frames that trained it in a round before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forcedrop.active.state import State, write_frames_atomically


def role_files(state: State, number: int, shares: Mapping[str, float], seed: int) -> tuple[dict[str, list[Path]], int]:
    """Write the files of labels that are not there yet, one a round and role.

    Args:
        state: of the loop.
        number: the round that is to be trained; its files are those of the rounds before.
        shares: to hold out, by role.
        seed: of the draw.

    Returns:
        The files to ``train`` on and those of each of ``shares``, and the number of labels to train on.

    Raises:
        ValueError: if nothing is left to train on.
    """
    frames = state.frames()
    rounds = [int(frame.info["round"]) for frame in frames]
    roles = split_roles(rounds, [len(frame) > 1 or bool(frame.pbc.any()) for frame in frames], shares, seed)
    files: dict[str, list[Path]] = {"train": [], **{name: [] for name in shares}}
    for before in range(number):
        for role, paths in files.items():
            mine = [f for f, n, r in zip(frames, rounds, roles, strict=True) if (n, r) == (before, role)]
            path = state.round(before) / f"{role}.h5"
            if mine:
                paths.append(path)
                if not path.exists():
                    write_frames_atomically(path, mine)
    return files, roles.count("train")


def split_roles(rounds: Sequence[int], held: Sequence[bool], shares: Mapping[str, float], seed: int) -> list[str]:
    """Return what each label is for: ``train``, or one of ``shares``.

    A label keeps what it was given when later rounds add more; the shares hold of all labels together, and each has at least one.

    Args:
        rounds: of every label, in the order of the store.
        held: which labels may be held out (single atoms may not).
        shares: to hold out.
        seed: of the draw.

    Raises:
        ValueError: if nothing is left to train on.
    """
    roles, counts, seen = ["train"] * len(rounds), dict.fromkeys(shares, 0), 0
    for number in sorted(set(rounds)):
        mine = [k for k, n in enumerate(rounds) if n == number and held[k]]
        order = np.random.default_rng([seed, number, 2]).permutation(mine).tolist()
        seen += len(mine)
        for name, share in shares.items():
            count = max(0, max(1, round(share * seen)) - counts[name]) if share else 0
            for k in order[:count]:
                roles[k] = name
            counts[name] += len(order[:count])
            order = order[count:]
    if "train" not in roles:
        raise ValueError(f"{len(roles)} labels are too few to hold out shares of {dict(shares)} of them")
    return roles
