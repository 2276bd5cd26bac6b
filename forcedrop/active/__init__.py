"""Which structures to label next, and the loop that labels them and learns.

The names below are the menu; each is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import lazily

if TYPE_CHECKING:
    from forcedrop.active.config import ActiveConfig, load_active_config
    from forcedrop.active.flagging import Flags, flag, resolve_threshold
    from forcedrop.active.loop import ActiveLoop
    from forcedrop.active.oracles import Oracle, find_oracle

_MENU = {
    "ActiveConfig": "forcedrop.active.config",
    "ActiveLoop": "forcedrop.active.loop",
    "Flags": "forcedrop.active.flagging",
    "Oracle": "forcedrop.active.oracles",
    "find_oracle": "forcedrop.active.oracles",
    "flag": "forcedrop.active.flagging",
    "load_active_config": "forcedrop.active.config",
    "resolve_threshold": "forcedrop.active.flagging",
}

__all__ = [
    "ActiveConfig",
    "ActiveLoop",
    "Flags",
    "Oracle",
    "find_oracle",
    "flag",
    "load_active_config",
    "resolve_threshold",
]

__getattr__ = lazily(__name__, _MENU)
