"""The band of σ: below, nothing happens; inside, frames are flagged; above, the run ends or goes back."""

from __future__ import annotations

from dataclasses import dataclass

from forcedrop.uncertainty.calibration import CRITERIA


@dataclass(frozen=True)
class Band:
    """Two thresholds of one criterion.

    Attributes:
        low: σ above which a frame is flagged, in the criterion's unit: [eV/Å], or [eV] per atom.
        high: σ above which a run must not go on.
        criterion: one of ``forcedrop.uncertainty.calibration.CRITERIA``.
        note: how the thresholds were found.
    """

    low: float
    high: float = float("inf")
    criterion: str = "max_force"
    note: str = ""

    def __post_init__(self) -> None:
        """Make the thresholds plain numbers and check their order.

        Raises:
            ValueError: unless 0 ≤ low ≤ high, or for an unknown criterion.
        """
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        if not 0 <= self.low <= self.high:
            raise ValueError(f"a band needs 0 ≤ low ≤ high, got {self.low} and {self.high}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known are {', '.join(CRITERIA)}")
