"""Molecular dynamics with error bars, under guard."""

from forcedrop.md.alarms import autocorrelation_time, band_from_calibration, rate_for_chance
from forcedrop.md.band import Band
from forcedrop.md.ensembles import NPT, NVE, NVT, Ensemble
from forcedrop.md.guard import Event, Guard, GuardStop, Kind, RollBack, Stop, run_guarded
from forcedrop.md.recorder import Drift, energy_drift, recorded_frame
from forcedrop.md.run import GuardSettings, MDRun, run_md
from forcedrop.md.search import Adversary, Bias, BiasedCalculator, adversarial

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
