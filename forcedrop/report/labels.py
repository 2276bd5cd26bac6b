"""Names and units of what is reported."""

from __future__ import annotations

LABEL = {
    "energy": ("energy", "eV/atom"),
    "difference": ("energy difference", "eV"),
    "forces": ("force component", "eV/Å"),
    "stress": ("stress component", "eV/Å³"),
}
"""What is compared: its name and unit."""
