"""Rates that grow linearly: over training steps (scheduled DropBlock) or over depth (drop path)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from forcedrop.dropout.checks import check_integer, check_rate, shown
from forcedrop.dropout.site import DropoutSite


def linear_rate(step: int, n_steps: int, p: float, start: float = 0.0) -> float:
    """Return a rate that goes linearly from ``start`` at step 0 to ``p`` at step ``n_steps``, and stays there.

    Over training steps: DropBlock's schedule (Ghiasi et al., section 3). Over the blocks 1 … L of a residual network: the
    linear decay of survival (Huang et al., equation 4).

    Raises:
        ValueError: if a rate is not in [0, 1), ``n_steps`` is below 1, or ``step`` is negative.
    """
    p, start = check_rate(p), check_rate(start, "start")
    step, n_steps = check_integer(step, "step"), check_integer(n_steps, "n_steps")
    if n_steps < 1 or step < 0:
        raise ValueError(f"`n_steps` must be at least 1 and `step` at least 0, got {n_steps} and {step}")
    fraction = min(step / n_steps, 1.0)
    return start + (p - start) * fraction


class LinearSchedule:
    """Set the rate of some layers to :func:`linear_rate`, one step at a time, as a torch scheduler does for learning rates.

    ``LinearSchedule((m for m in model.modules() if isinstance(m, DropBlock)), p=0.1, n_steps=5000)``

    Args:
        layers: layers whose ``p`` is set, at once (to ``start``) and at every step.
        p: the last rate, in [0, 1).
        n_steps: after how many steps it is reached.
        start: the first rate, in [0, 1).

    Raises:
        ValueError: if there are no layers, a rate is not in [0, 1), or ``n_steps`` is below 1.
    """

    def __init__(self, layers: Iterable[DropoutSite], p: float, n_steps: int, start: float = 0.0) -> None:
        if isinstance(layers, DropoutSite):
            raise TypeError(f"layers must be several, such as [layer], got {type(layers).__name__}")
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers must be several dropout layers, got {shown(layers)}")
        self.layers = list(layers)
        for layer in self.layers:
            if not isinstance(layer, DropoutSite | nn.modules.dropout._DropoutNd):
                raise TypeError(f"layers must be dropout layers, got {shown(layer)}")
        if not self.layers:
            raise ValueError("LinearSchedule needs at least one layer, got none")
        self.p, self.n_steps, self.start = p, n_steps, start
        self.load_state_dict({"steps": 0})

    def step(self) -> float:
        """Go one step on and return the new rate."""
        return self.load_state_dict({"steps": self.steps + 1})

    def state_dict(self) -> dict[str, int]:
        """Return how many steps were made."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> float:
        """Go to where :meth:`state_dict` was and return the rate there.

        Raises:
            ValueError: if ``state`` is no such state.
        """
        if not isinstance(state, dict) or "steps" not in state:
            raise ValueError(f"the state of a LinearSchedule is {{'steps': a number}}, got {shown(state)}")
        rate = linear_rate(state["steps"], self.n_steps, self.p, self.start)
        self.steps = state["steps"]
        for layer in self.layers:
            layer.p = rate
        return rate
