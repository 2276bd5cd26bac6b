"""What the tests of this folder share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(trained_folder: Path) -> Path:
    """The file of the small trained model of copper."""
    return trained_folder / "run" / "model.pt"
