"""What starting costs: whoever predicts waits for nothing that only training, drawing or reading files needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parent.parent / "data" / "ethanol.pt"
HEAVY = {
    "forcedrop.active", "forcedrop.evaluation", "forcedrop.metrics", "forcedrop.report", "forcedrop.training",
    "chemiscope", "h5py", "matplotlib", "pandas", "pydantic", "pymatgen", "scipy", "tensorboard", "torch_geometric", "yaml",
}  # fmt: skip


def imported(code: str) -> set[str]:
    """Return what a fresh process has imported after it ran ``code``."""
    code = f"import json, sys\n{code}\nprint('\\n' + json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_calculator_is_light() -> None:
    found = imported("import forcedrop\nfrom forcedrop import DropoutCalculator, load_model")
    assert "forcedrop.calculator" in found
    assert not found & HEAVY


def test_info_about_a_model_is_light() -> None:
    command = f"from forcedrop.cli import app\napp(['info', {str(MODEL)!r}], standalone_mode=False)"
    found = imported(command)
    assert "forcedrop.report.tables" in found
    # the rule of integration on the sphere is SciPy's; newer versions of typer read arguments with pydantic
    assert not found & (HEAVY - {"forcedrop.report", "scipy", "pydantic"})


@pytest.mark.parametrize(
    "names",
    [
        "from forcedrop import evaluate, flag, run_md",
        "from forcedrop.report import evaluation_table, parity_figure, report_page",
        "from forcedrop.md import Guard, adversarial, band_from_calibration",
        "from forcedrop.uncertainty.calibrate import calibrate",
    ],
)
def test_nothing_that_predicts_imports_the_trainer(names: str) -> None:
    found = imported(names)
    assert "forcedrop.uncertainty.calibration" in found
    assert not found & {"forcedrop.training", "pydantic", "tensorboard", "pymatgen", "torch_geometric"}


def test_it_would_be_seen() -> None:
    assert {"forcedrop.training", "pydantic", "tensorboard"} <= imported("from forcedrop import train")


def test_every_name_of_every_menu_is_there() -> None:
    import forcedrop
    from forcedrop import active, md, report, structures, training

    for package in (forcedrop, active, md, report, structures, training):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
