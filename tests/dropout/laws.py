"""What the dropout tests share: statistical assertions with a stated confidence, and frozen layers without a context."""

import torch
from torch import Tensor

from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.site import DropoutSite

SIGMAS = 5.0
"""Standard errors allowed: a correct law fails once in 1.7 million normal draws; the seeds are fixed besides."""


def assert_mean(draws: Tensor, expected: Tensor | float) -> None:
    """Each component's mean over the first axis, of independent draws, lies within SIGMAS standard errors of ``expected``."""
    draws = draws.double()
    error = draws.std(0) / draws.shape[0] ** 0.5
    off = (draws.mean(0) - expected).abs()
    worst = float((off - SIGMAS * error).max())
    assert worst <= 1e-12, f"mean off by {float(off.max())}, standard error {float(error.max())}"


def assert_not_mean(draws: Tensor, expected: Tensor | float) -> None:
    """The sample is large enough to tell ``expected`` from the truth: :func:`assert_mean` fails."""
    try:
        assert_mean(draws, expected)
    except AssertionError:
        return
    raise AssertionError(f"the draws do not exclude {expected}")


def freeze(module: torch.nn.Module, sample: int | Tensor, seed: int = 0, prefix: str = "") -> torch.nn.Module:
    """Set the function sample of every site in ``module``, under its name."""
    for name, layer in module.named_modules():
        if isinstance(layer, DropoutSite):
            layer._function, layer._site = FunctionSample(seed, sample), prefix + name
    return module
