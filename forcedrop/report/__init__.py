"""Figures, tables and the page of results."""

from forcedrop.report.active import active_figure, rounds_table
from forcedrop.report.figures import (
    comparison_figure,
    detection_figure,
    flag_figure,
    md_figure,
    parity_figure,
    save_figure,
    sigma_figure,
    training_figure,
)
from forcedrop.report.page import results_page
from forcedrop.report.tables import (
    comparison_rows,
    comparison_table,
    describe_frames,
    describe_model,
    evaluation_table,
    format_table,
    ranking_csv,
    symbols_formula,
)

__all__ = [
    "active_figure",
    "comparison_figure",
    "comparison_rows",
    "comparison_table",
    "describe_frames",
    "describe_model",
    "detection_figure",
    "evaluation_table",
    "flag_figure",
    "format_table",
    "md_figure",
    "parity_figure",
    "ranking_csv",
    "results_page",
    "rounds_table",
    "save_figure",
    "sigma_figure",
    "symbols_formula",
    "training_figure",
]
