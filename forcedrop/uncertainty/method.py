"""The contract of an uncertainty method: what a training calls, and what it leaves, a bank of functions in the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from forcedrop.graph import AtomicGraph
from forcedrop.potential import EnergyModel


@dataclass(frozen=True)
class Labels:
    """What functions are found from.

    Attributes:
        train: labelled graphs that trained the network.
        held: labelled graphs that did not, to measure errors and to choose by.
        stress: whether stress labels count.
        quiet: without a progress bar.
    """

    train: Sequence[AtomicGraph]
    held: Sequence[AtomicGraph]
    stress: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Method:
    """A way to functions; base of all. A method is a frozen dataclass of its settings, which is what a YAML file may say.

    Attributes:
        functions: how many there shall be.
        seed: of everything that is drawn for them.
    """

    name: ClassVar[str]
    keeps_masks: ClassVar[bool] = False
    """Whether masks within the network make its functions; else their rates are 0 once it is trained."""
    gives_error_bars: ClassVar[bool] = True
    learns: ClassVar[bool] = False
    """Whether its functions learn together with the network: one that is trained already cannot be given them."""

    functions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: for fewer than 2 functions.
        """
        if self.gives_error_bars and self.functions < 2:
            raise ValueError(f"`functions` must be at least 2, got {self.functions}")

    def prepare(self, potential: EnergyModel) -> None:
        """Change a network before it is trained, if the method needs that.

        Raises:
            ValueError: if this network cannot have it.
        """

    def training_functions(self, rates: Sequence[float]) -> int | None:
        """Return of how many functions each structure of a step takes one; None for any number, 0 for the plain network.

        Args:
            rates: of the network's dropout sites.
        """
        return None if any(rates) else 0

    def fill(self, potential: EnergyModel, labels: Labels) -> dict[str, Any]:
        """Find the functions of a trained network, put them into it, and return how they were found, in plain values.

        Raises:
            ValueError: if the network or the labels do not allow it.
        """
        raise NotImplementedError


def find_functions(potential: EnergyModel, method: Method, labels: Labels) -> dict[str, Any]:
    """Fill a trained network with a method's functions; return which method, how many, their seed, and what it chose."""
    found = method.fill(potential, labels)
    return {"method": method.name, "functions": method.functions, "seed": method.seed, **found}
