"""Figures, tables and the page of results."""

from forcedrop.report.active import active_figure, rounds_table
from forcedrop.report.figures import (
    comparison_figure,
    detection_figure,
    flag_figure,
    md_figure,
    parity_figure,
    run_figure,
    save_figure,
    sigma_figure,
    training_figure,
)
from forcedrop.report.folder import folder_sections, report_page
from forcedrop.report.page import Picture, Plain, Section, Text, results_page
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
    "Picture",
    "Plain",
    "Section",
    "Text",
    "active_figure",
    "comparison_figure",
    "comparison_rows",
    "comparison_table",
    "describe_frames",
    "describe_model",
    "detection_figure",
    "evaluation_table",
    "flag_figure",
    "folder_sections",
    "format_table",
    "md_figure",
    "parity_figure",
    "ranking_csv",
    "report_page",
    "results_page",
    "rounds_table",
    "run_figure",
    "save_figure",
    "sigma_figure",
    "symbols_formula",
    "training_figure",
]
