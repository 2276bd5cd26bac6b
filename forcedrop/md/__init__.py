"""Molecular dynamics with error bars, under guard.

The names below are the menu; each is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import lazily

if TYPE_CHECKING:
    from forcedrop.md.alarms import autocorrelation_time, band_from_calibration, rate_for_chance
    from forcedrop.md.astray import Kind
    from forcedrop.md.band import Band
    from forcedrop.md.ensembles import NPT, NVE, NVT, Ensemble
    from forcedrop.md.guard import Event, Guard, GuardStop, RollBack, Stop, run_guarded
    from forcedrop.md.recorder import Drift, energy_drift, recorded_frame
    from forcedrop.md.run import GuardSettings, MDRun, run_md
    from forcedrop.md.search import Adversary, Bias, BiasedCalculator, adversarial

_MENU = {
    "Adversary": "forcedrop.md.search",
    "Band": "forcedrop.md.band",
    "Bias": "forcedrop.md.search",
    "BiasedCalculator": "forcedrop.md.search",
    "Drift": "forcedrop.md.recorder",
    "Ensemble": "forcedrop.md.ensembles",
    "Event": "forcedrop.md.guard",
    "Guard": "forcedrop.md.guard",
    "GuardSettings": "forcedrop.md.run",
    "GuardStop": "forcedrop.md.guard",
    "Kind": "forcedrop.md.astray",
    "MDRun": "forcedrop.md.run",
    "NPT": "forcedrop.md.ensembles",
    "NVE": "forcedrop.md.ensembles",
    "NVT": "forcedrop.md.ensembles",
    "RollBack": "forcedrop.md.guard",
    "Stop": "forcedrop.md.guard",
    "adversarial": "forcedrop.md.search",
    "autocorrelation_time": "forcedrop.md.alarms",
    "band_from_calibration": "forcedrop.md.alarms",
    "energy_drift": "forcedrop.md.recorder",
    "rate_for_chance": "forcedrop.md.alarms",
    "recorded_frame": "forcedrop.md.recorder",
    "run_guarded": "forcedrop.md.guard",
    "run_md": "forcedrop.md.run",
}

__all__ = [
    "NPT",
    "NVE",
    "NVT",
    "Adversary",
    "Band",
    "Bias",
    "BiasedCalculator",
    "Drift",
    "Ensemble",
    "Event",
    "Guard",
    "GuardSettings",
    "GuardStop",
    "Kind",
    "MDRun",
    "RollBack",
    "Stop",
    "adversarial",
    "autocorrelation_time",
    "band_from_calibration",
    "energy_drift",
    "rate_for_chance",
    "recorded_frame",
    "run_guarded",
    "run_md",
]

__getattr__ = lazily(__name__, _MENU)
