"""Folders as the commands leave them, of a small model of copper."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from forcedrop.cli import app
from forcedrop.structures import write_frames
from tests.conftest import emt_frames


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="package")
def dynamics_folder(trained_folder: Path) -> Path:
    """A run of 24 steps, each of them recorded; some, but not all, are flagged."""
    write_frames(trained_folder / "start.h5", emt_frames(1, seed=5))
    run(
        "md", trained_folder / "run" / "model.pt", trained_folder / "start.h5", "--output", trained_folder / "dynamics",
        "--steps", 24, "--timestep", 2, "--record-every", 1, "--samples", 6, "--quantile", 0.5, "--temperature", 300,
    )  # fmt: skip
    return trained_folder / "dynamics"


@pytest.fixture(scope="package")
def evaluation_folder(trained_folder: Path) -> Path:
    write_frames(trained_folder / "labelled.h5", emt_frames(12, seed=6))
    run(
        "evaluate", trained_folder / "run" / "model.pt", trained_folder / "labelled.h5",
        "--output", trained_folder / "evaluation", "--samples", 4,
    )  # fmt: skip
    return trained_folder / "evaluation"
