"""Where functions come from, and what their spread is worth. A new method is one file here and one line in :data:`METHODS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import chosen

if TYPE_CHECKING:
    from forcedrop.uncertainty.method import Method

METHODS = {
    "exact_dropout": "forcedrop.uncertainty.exact_dropout:ExactDropout",
    "posterior": "forcedrop.uncertainty.posterior:Posterior",
    "heads": "forcedrop.uncertainty.masks:Heads",
    "masks": "forcedrop.uncertainty.masks:TrainedMasks",
    "none": "forcedrop.uncertainty.masks:Plain",
}
"""Name in a training file → where the method is. Deep ensembles are made of finished models: ``ensemble.py``."""


def method_of(name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        ValueError: if there is no such method.
    """
    found: type[Method] = chosen(METHODS, name, "uncertainty method")
    return found


__all__ = ["METHODS", "method_of"]
