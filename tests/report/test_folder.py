"""Folders and the page of each kind."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from forcedrop.cli import app
from forcedrop.report.folder import KINDS, recognise, report_page
from forcedrop.report.numbers import cell_of, errors_table, read_rows, summary_table, title_of
from forcedrop.structures import read_frames, write_frames
from tests.conftest import emt_frames
from tests.report.conftest import run
from tests.report.test_page import assert_offline


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


def test_dynamics(dynamics_folder: Path, tmp_path: Path) -> None:
    out = run("report", dynamics_folder, "--output", tmp_path / "p.html", "--frames", 4, "--title", "A <b>")
    assert f"wrote {tmp_path / 'p.html'} (" in out
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert_offline(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    assert "<title>A &lt;b&gt;</title>" in text
    flagged = {t / 2 for t in json.loads((dynamics_folder / "md.json").read_text())["flagged_fs"]}
    assert 0 < len(flagged) < 25
    data = data_of(tmp_path / "p.html")
    shown = np.array(data["properties"]["frame"]["values"])
    sigma = {k: float(row["max_force_sigma_eV_A"]) for k, row in enumerate(read_rows(dynamics_folder / "md.csv"))}
    worst = set(sorted(flagged, key=lambda k: -sigma[int(k)])[:4])
    assert worst | {0, 8, 16, 24} == set(shown)
    words = dict(zip(shown, data["properties"]["flag"]["values"], strict=True))
    assert {k for k, word in words.items() if word == "flagged"} == worst
    assert f"Shown are {len(shown)} of 25 recorded steps" in text
    assert "max force σ [eV/Å]" in text
    assert "temperature_K: 300" in text


def test_a_run_that_was_killed(dynamics_folder: Path, tmp_path: Path) -> None:
    """No md.json, no picture, a table ahead of the frames and torn in its last line: a page all the same."""
    folder = tmp_path / "killed"
    folder.mkdir()
    write_frames(folder / "md.h5", read_frames(dynamics_folder / "md.h5", predictions="keep")[:3])
    rows = (dynamics_folder / "md.csv").read_text().splitlines()
    (folder / "md.csv").write_text("\n".join([*rows[:5], rows[5][:12]]))
    text = report_page(folder).read_text(encoding="utf-8")
    assert "was not finished" in text
    assert "Shown are all 3 recorded steps" in text
    assert "data:image/png" in text
    assert data_of(folder / "page.html")["properties"]["time"]["values"] == [0, 2, 4]


def test_more_keys_in_the_summary_do_no_harm(dynamics_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "guarded"
    shutil.copytree(dynamics_folder, folder)
    summary = json.loads((folder / "md.json").read_text())
    summary["settings"]["guard"] = {"band": {"low": 0.123, "high": None, "criterion": "max_force"}}
    summary["events"] = [{"step": 3, "kind": "high", "sigma": 0.5, "detail": "a < b", "back_to": None}]
    (folder / "md.json").write_text(json.dumps(summary))
    text = report_page(folder).read_text(encoding="utf-8")
    assert "flagged above 0.123 eV/Å" in text
    assert "a &lt; b" in text
    assert "back to" in text


def test_evaluation(evaluation_folder: Path, tmp_path: Path) -> None:
    frames = read_frames(evaluation_folder / "frames.h5")
    assert len(frames) == 12
    page = report_page(evaluation_folder, tmp_path / "p.html", most=3)
    text = page.read_text(encoding="utf-8")
    found = json.loads((evaluation_folder / "evaluation.json").read_text())
    assert f"{1e3 * found['forces']['rmse']:.2f}" in text
    assert f"{found['forces']['z2']:.2f}" in text
    assert "forces on Cu" in text
    assert text.count("data:image/png") == 3
    assert "labelled.h5" in text
    data = data_of(page)
    error = [np.linalg.norm(f.arrays["forcedrop_forces"] - f.forces, axis=1).max() for f in frames]
    shown = np.array(data["properties"]["frame"]["values"], dtype=int)
    assert set(np.argsort(error)[-3:]) | {0, 11} <= set(shown)
    np.testing.assert_allclose(data["properties"]["largest force error"]["values"], np.array(error)[shown], rtol=1e-4)
    shutil.copytree(evaluation_folder, tmp_path / "old")
    (tmp_path / "old" / "frames.h5").unlink()
    assert "no frames.h5" in report_page(tmp_path / "old").read_text(encoding="utf-8")


def test_evaluation_does_not_write_over_what_it_reads(trained_folder: Path, tmp_path: Path) -> None:
    write_frames(tmp_path / "frames.h5", emt_frames(3))
    arguments = ["evaluate", trained_folder / "run" / "model.pt", tmp_path / "frames.h5", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1
    assert "is read and would be written" in result.output
    assert not read_frames(tmp_path / "frames.h5")[0].arrays


def test_training_and_comparison(trained_folder: Path, tmp_path: Path) -> None:
    text = report_page(trained_folder / "run", tmp_path / "t.html").read_text(encoding="utf-8")
    assert "elements: Cu" in text
    assert "for validation" in text
    rows = [{"model": "a <b>", "set": "hot", "forces_rmse_meV_A": 12.5, "forces_z2": 1.25}]
    (tmp_path / "comparison.json").write_text(json.dumps(rows))
    text = report_page(tmp_path).read_text(encoding="utf-8")
    assert "a &lt;b&gt;" in text
    assert "forces rmse [meV/Å]" in text


def test_active_learning(tmp_path: Path) -> None:
    frames = emt_frames(6)
    noted = [replace(f, info={"round": int(k > 1), "time_fs": 5.0 * k}) for k, f in enumerate(frames)]
    write_frames(tmp_path / "labels.h5", noted)
    predicted = {"forcedrop_forces": 0.1 + noted[0].forces, "forces_uncertainty": np.full((4, 3), 0.2)}
    judged = [replace(f, arrays={**predicted, "forcedrop_forces": 0.1 + f.forces}) for f in noted[2:]]
    for number in (1, 2):
        (tmp_path / "rounds" / f"00{number}").mkdir(parents=True)
        write_frames(tmp_path / "rounds" / f"00{number}" / "judged.h5", judged[2 * number - 2 : 2 * number])
    with (tmp_path / "rounds.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["round", "labels", "force_rmse_eV_A", "verdict"], [0, 2, "", ""], [1, 6, 0.0123, "go on"]])
    (tmp_path / "loop.json").write_text(json.dumps({"oracle": "emt", "settings": {}}))
    page = report_page(tmp_path)
    text = page.read_text(encoding="utf-8")
    data = data_of(page)
    np.testing.assert_allclose(data["properties"]["largest force error"]["values"], [0.1 * 3**0.5] * 4, rtol=1e-3)
    np.testing.assert_allclose(data["properties"]["atomic force σ"]["values"], [0.2 * 3**0.5] * 16, rtol=1e-3)
    assert data["settings"]["map"]["y"]["property"] == "largest force error"
    assert "The 2 start frames" in text
    assert "force rmse [eV/Å]" in text
    assert "0.0123" in text
    assert "oracle: emt" in text


def test_folders_of_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere"):
        report_page(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds nothing that a page could be made of") as error:
        report_page(tmp_path)
    assert all(name in str(error.value) for kind in KINDS for name in kind.signs)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "Traceback" not in result.output


def test_a_folder_may_be_several_things(evaluation_folder: Path, trained_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_folder / "run", tmp_path / "both")
    shutil.copy(evaluation_folder / "evaluation.json", tmp_path / "both")
    assert [kind.what for kind in recognise(tmp_path / "both")] == ["evaluation", "training"]
    with pytest.raises(ValueError, match="must be positive, got 0"):
        report_page(tmp_path / "both", most=0)


def test_names_and_cells() -> None:
    assert title_of("max_force_sigma_eV_A") == "max force σ [eV/Å]"
    assert title_of("val_energy_meV_atom") == "val energy [meV/atom]"
    assert title_of("volume_A3") == "volume [Å³]"
    assert title_of("stage") == "stage"
    assert [cell_of(x) for x in (0.123456, "1e-7", 3.0, "12", -309.6201, None, "", float("nan"), "word", True)] == [
        "0.1235", "1e-07", "3", "12", "-309.620", "–", "–", "–", "word", "yes",
    ]  # fmt: skip
    assert cell_of(float("inf")) == "inf"
    assert cell_of("421.7", "temperature_K") == "422"


def test_summary() -> None:
    rows = [
        {"step": "0", "a_eV": "1.5", "w": "x"},
        {"step": "1", "a_eV": "-0.5", "w": "y"},
        {"step": "2", "a_eV": "2", "w": "z"},
    ]
    table = summary_table(rows, left_out=("step",))
    assert table.rows == [["a [eV]", "1.5", "2", "1", "-0.5", "2"]]


def test_errors_in_thousandths() -> None:
    report = {
        "rmse": 0.01234, "mae": 0.01, "sigma_rms": 0.011, "z2": 1.5, "miscalibration_area": 0.05, "rll": 50.0, "spearman": 0.5,
        "intervals": {"z2": [1.25, 1.75]},
    }  # fmt: skip
    (row,) = errors_table({"forces": report}, "").rows
    assert row == [
        "force component [meV/Å]",
        "12.34",
        "10.00",
        "11.00",
        "1.50",
        "1.25 … 1.75",
        "0.050",
        "50.00",
        "0.50",
    ]
