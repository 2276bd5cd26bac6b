"""Where functions come from, and what their spread is worth. A new method is one file here and one line in :data:`METHODS`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
    if name not in METHODS:
        raise ValueError(f"unknown uncertainty method {name!r}; known are {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


__all__ = ["METHODS", "method_of"]
