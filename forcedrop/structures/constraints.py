"""Constraints of ASE as plain dictionaries, which every file can hold."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

if TYPE_CHECKING:  # not above: they bring SciPy, which whoever predicts need not wait for
    from ase.constraints import FixConstraint

XYZ_COLUMN = ("FixAtoms", "FixCartesian")
"""Names of the constraints that an extended XYZ file holds in its column ``move_mask``."""


def described(atoms: Atoms) -> list[dict[str, Any]]:
    """Return the constraints of ``atoms`` as dictionaries of numbers, texts and lists, with ASE's ``name`` and ``kwargs``.

    Atoms held along the same Cartesian directions become one entry. A constraint that has no such form is left out, with a
    warning.
    """
    found: list[dict[str, Any]] = []
    if not atoms.constraints:
        return found
    for constraint in _merged(atoms.constraints):
        try:
            found.append(json.loads(json.dumps(constraint.todict(), default=_plain)))
        except (AttributeError, NotImplementedError, TypeError):
            warnings.warn(
                f"a constraint of kind {type(constraint).__name__} cannot be written down; it is left out", stacklevel=3
            )
    return found


def restored(constraints: Iterable[Mapping[str, Any]]) -> list[FixConstraint]:
    """Return ASE's constraints from their dictionaries.

    Raises:
        ValueError: for a dictionary that describes none.
    """
    import ase.constraints
    from ase.constraints import FixConstraint, dict2constraint

    found = []
    for values in constraints:
        kind = getattr(ase.constraints, str(values.get("name")), None) if isinstance(values, Mapping) else None
        if not (isinstance(kind, type) and issubclass(kind, FixConstraint)):
            raise ValueError(f"no constraint that ASE knows: {values!r}")
        try:
            found.append(dict2constraint(dict(values)))
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"not a constraint of kind {kind.__name__}: {values!r} ({error})") from error
    return found


def _merged(constraints: Sequence[FixConstraint]) -> list[FixConstraint]:
    """Join the many of one atom each that a column ``move_mask`` of three is read as; those that hold nothing fall out."""
    from ase.constraints import FixAtoms, FixCartesian

    held: dict[tuple[bool, ...], list[int]] = defaultdict(list)
    others: list[FixConstraint] = []
    for constraint in constraints:
        if type(constraint) is FixCartesian:
            held[tuple(constraint.mask.tolist())] += constraint.index.tolist()
        else:
            others.append(constraint)
    joined = [
        FixAtoms(indices) if all(mask) else FixCartesian(indices, mask) for mask, indices in held.items() if any(mask)
    ]
    return [*others, *joined]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")
