"""Menus of names that are imported on first use, so that whoever needs one of them does not wait for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, menu: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: its ``__name__``.
        menu: for every name the module that it is in.
    """

    def find(name: str) -> Any:
        if name in menu:
            return getattr(import_module(menu[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def chosen(menu: Mapping[str, str], name: str, what: str) -> Any:
    """Return what a menu of ``module:attribute`` has under a name.

    Args:
        menu: name → place.
        name: the choice.
        what: is chosen, for the error.

    Raises:
        ValueError: if there is no such name.
    """
    if name not in menu:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(menu)}")
    module, _, attribute = menu[name].partition(":")
    return getattr(import_module(module), attribute)
