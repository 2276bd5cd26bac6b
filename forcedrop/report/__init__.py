"""Figures, tables and the page of results.

The names below are the menu; each is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import lazily

if TYPE_CHECKING:
    from forcedrop.report.active import active_figure, rounds_table
    from forcedrop.report.figures import (
        comparison_figure,
        detection_figure,
        flag_figure,
        functions_figure,
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
        describe_functions,
        describe_model,
        describe_validation,
        evaluation_table,
        format_table,
        ranking_csv,
        symbols_formula,
    )

_MENU = {
    "Picture": "forcedrop.report.page",
    "Plain": "forcedrop.report.page",
    "Section": "forcedrop.report.page",
    "Text": "forcedrop.report.page",
    "active_figure": "forcedrop.report.active",
    "comparison_figure": "forcedrop.report.figures",
    "comparison_rows": "forcedrop.report.tables",
    "comparison_table": "forcedrop.report.tables",
    "describe_frames": "forcedrop.report.tables",
    "describe_functions": "forcedrop.report.tables",
    "describe_model": "forcedrop.report.tables",
    "describe_validation": "forcedrop.report.tables",
    "detection_figure": "forcedrop.report.figures",
    "evaluation_table": "forcedrop.report.tables",
    "flag_figure": "forcedrop.report.figures",
    "functions_figure": "forcedrop.report.figures",
    "folder_sections": "forcedrop.report.folder",
    "format_table": "forcedrop.report.tables",
    "md_figure": "forcedrop.report.figures",
    "parity_figure": "forcedrop.report.figures",
    "ranking_csv": "forcedrop.report.tables",
    "report_page": "forcedrop.report.folder",
    "results_page": "forcedrop.report.page",
    "rounds_table": "forcedrop.report.active",
    "run_figure": "forcedrop.report.figures",
    "save_figure": "forcedrop.report.figures",
    "sigma_figure": "forcedrop.report.figures",
    "symbols_formula": "forcedrop.report.tables",
    "training_figure": "forcedrop.report.figures",
}

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
    "describe_functions",
    "describe_model",
    "describe_validation",
    "detection_figure",
    "evaluation_table",
    "flag_figure",
    "folder_sections",
    "format_table",
    "functions_figure",
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

__getattr__ = lazily(__name__, _MENU)
