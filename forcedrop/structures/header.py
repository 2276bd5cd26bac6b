"""The second line of a frame in an extended XYZ file, and whether the lines below fit it.

Programs that write and read such files for themselves spell its words in any case (GPUMD: ``lattice``, ``properties``; KLIFF:
``PBC``); ASE knows ``Lattice``, ``Properties`` and ``pbc``, and takes other spellings for remarks: cells, periodic directions and
columns would be lost without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from forcedrop.door import Refused

_WORDS = {"lattice": "Lattice", "properties": "Properties", "pbc": "pbc"}
_QUOTED_OR_WORD = re.compile(r"""("[^"]*"|'[^']*')|(?<!\S)(lattice|properties|pbc)(?=\s*=)""", re.IGNORECASE)


def spelt(header: str) -> str:
    """Return the line with its words as ASE spells them.

    Raises:
        Refused: if one of them is there twice.
    """
    found: list[str] = []

    def word(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        found.append(_WORDS[match[2].lower()])
        return found[-1]

    line = _QUOTED_OR_WORD.sub(word, header)
    if len(set(found)) < len(found):
        raise Refused(f"the header says {max(found, key=found.count)} twice")
    return line


def require_columns(properties: str, rows: Iterable[str]) -> None:
    """Check that each line of a frame has as many entries as its ``Properties`` declare: ASE drops what is too much.

    Args:
        properties: such as ``species:S:1:pos:R:3``.
        rows: the lines of the atoms.

    Raises:
        Refused: naming the first atom whose line has another number of entries.
    """
    widths = properties.split(":")[2::3]
    if not widths or not all(width.isdecimal() for width in widths):
        return  # no Properties: ASE says so
    columns = sum(map(int, widths))
    for atom, row in enumerate(rows):
        if (have := len(row.split())) != columns:
            raise Refused(f"its Properties declare {columns} columns, atom {atom} has {have}")
