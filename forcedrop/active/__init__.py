"""Which structures to label next, and the loop that labels them and learns.

The names below are the menu; each is imported on first use, so that the processes that label start in a moment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forcedrop.active.config import ActiveConfig, load_active_config
    from forcedrop.active.flagging import UNITS, Flags, flag, resolve_threshold
    from forcedrop.active.loop import ActiveLoop
    from forcedrop.active.oracles import Oracle, find_oracle

_MENU = {
    "ActiveConfig": "config",
    "ActiveLoop": "loop",
    "Flags": "flagging",
    "Oracle": "oracles",
    "UNITS": "flagging",
    "find_oracle": "oracles",
    "flag": "flagging",
    "load_active_config": "config",
    "resolve_threshold": "flagging",
}

__all__ = [
    "UNITS",
    "ActiveConfig",
    "ActiveLoop",
    "Flags",
    "Oracle",
    "find_oracle",
    "flag",
    "load_active_config",
    "resolve_threshold",
]


def __getattr__(name: str) -> Any:
    if name in _MENU:
        return getattr(import_module(f"forcedrop.active.{_MENU[name]}"), name)
    raise AttributeError(f"module 'forcedrop.active' has no attribute {name!r}")
