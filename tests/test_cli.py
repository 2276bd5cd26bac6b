import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from forcedrop.cli import app
from forcedrop.structures import read_frames, write_frames
from tests.conftest import emt_frames, settings

runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def folder(trained_folder) -> Path:
    write_frames(trained_folder / "test.h5", emt_frames(8, seed=3))
    return trained_folder


def test_train_and_resume(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(16))
    values = settings(tmp_path, epochs=2)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    assert "model.pt: validation RMSE" in run("train", tmp_path / "t.yaml")
    assert (tmp_path / "run" / "training.png").stat().st_size > 5000
    assert "error: " in run("train", tmp_path / "t.yaml", code=1)
    run("train", tmp_path / "t.yaml", "--resume")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values, "sead": 1}))
    assert "unknown key `sead`; did you mean `seed`?" in run("train", tmp_path / "bad.yaml", code=1)


def test_evaluate(folder, tmp_path) -> None:
    model = folder / "run" / "model.pt"
    out = run(
        "evaluate",
        model,
        folder / "test.h5",
        "--output",
        tmp_path,
        "--write",
        tmp_path / "p.xyz",
        "--samples",
        4,
    )
    assert "force component [meV/Å]" in out
    assert "AUROC" in out
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["frames"] == 8
    assert f"{1e3 * values['forces']['rmse']:.2f}" in out
    assert (tmp_path / "parity.png").stat().st_size > 5000
    assert (tmp_path / "sigma.png").stat().st_size > 5000
    assert "forces_uncertainty" in read_frames(tmp_path / "p.xyz")[0].arrays


def test_compare(folder, tmp_path) -> None:
    model = folder / "run" / "model.pt"
    other = tmp_path / "other.pt"
    other.write_bytes(model.read_bytes())
    out = run("compare", model, f"{model}+{other}", "--test", folder / "test.h5", "--output", tmp_path, code=1)
    assert "members 1 and 2 of the ensemble are equal" in out
    out = run("compare", model, other, "--test", folder / "test.h5", "--output", tmp_path, "--samples", 4)
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["model"] for row in rows] == ["run", "other"]
    assert rows[0]["forces_nll"] == rows[1]["forces_nll"]
    assert "CRPS" in out
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    assert "given twice" in run("compare", model, model, "--test", folder / "test.h5", code=1)


def test_md_and_flag(folder, tmp_path) -> None:
    model = folder / "run" / "model.pt"
    out = run(
        "md", model, folder / "test.h5", "--output", tmp_path / "md", "--steps", 20, "--timestep", 2, "--samples", 4,
        "--ensemble", "npt", "--repeat", 2, 1, 1,
    )  # fmt: skip
    assert "pressure" in out
    assert (tmp_path / "md" / "md.png").stat().st_size > 5000
    out = run(
        "flag", model, tmp_path / "md" / "md.xyz", "--threshold", 0, "--output", tmp_path / "f.xyz", "--samples", 4,
        "--ranking", tmp_path / "r.csv", "--plot", tmp_path / "f.png",
    )  # fmt: skip
    assert "3 of 3 frames" in out
    assert len(read_frames(tmp_path / "f.xyz")) == 3
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_guarded_md_and_resume(folder, tmp_path) -> None:
    model = folder / "run" / "model.pt"
    common = ["md", model, folder / "test.h5", "--timestep", 2, "--samples", 4, "--output", tmp_path, "--steps"]
    band = ["--low", 0.001, "--high", 50, "--on-high", "rollback", "--spacing", 4]
    out = run(*common, 20, *band)
    assert "are in flagged.h5" in out
    assert "`guard.band.low` was 0.001, now it is 0.002" in run(*common, 20, "--resume", "--low", 0.002, code=1)
    out = run(*common, 30, *band, "--resume")
    assert "4 of 4 recorded steps are flagged" in out
    assert "not both" in run(*common, 5, "--overwrite", "--low", 1, "--false-flags", 1, "--false-stops", 0.1, code=1)
    assert "give --false-flags and --false-stops together" in run(*common, 5, "--overwrite", "--false-flags", 1, code=1)
    out = run(*common, 5, "--overwrite", "--false-flags", 1, "--false-stops", 0.1, code=1)
    assert "a level from false alarms needs at least 10 calibration frames, got 4" in out


def test_info(folder) -> None:
    out = run("info", folder / "run" / "model.pt")
    assert "elements: Cu" in out
    assert "calibration: σ =" in out
    out = run("info", folder / "test.h5")
    assert "8 frames of 4 to 4 atoms, 8 periodic" in out
    assert "stress 8" in out


def test_errors_are_one_message(folder, tmp_path) -> None:
    model = folder / "run" / "model.pt"
    assert "error: no such file: nowhere.pt" in run("info", "nowhere.pt", code=1)
    assert "no such file" in run("evaluate", model, "nowhere.xyz", code=1)
    assert "no such file" in run("evaluate", "nowhere.pt", folder / "test.h5", code=1)
    (tmp_path / "si.xyz").write_text('1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3\nSi 0 0 0\n')
    assert "si.xyz#0: z: atom 0 is Si; the model knows Cu" in run("flag", model, tmp_path / "si.xyz", code=1)
    assert "holds 8 frames, asked for frame 9" in run("md", model, folder / "test.h5", "--index", 9, code=1)
    assert "bare.xyz: no frame has an energy or forces" in run("evaluate", model, bare(tmp_path), code=1)


def bare(folder: Path) -> Path:
    path = folder / "bare.xyz"
    path.write_text('1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nCu 0 0 0\n')
    return path


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "compare", "fill", "md", "flag", "active", "report", "info"]
)
def test_help(command: str) -> None:
    assert "Usage" in run(command, "--help")


def test_scripts_are_the_same_doors(folder) -> None:
    import subprocess
    import sys

    for script in ("train", "evaluate", "predict", "compare", "run_md", "flag", "active_learning", "report"):
        out = subprocess.run(
            [sys.executable, f"scripts/{script}.py", "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert "Usage: forcedrop" in out
