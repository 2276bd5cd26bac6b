"""Nothing is overwritten silently: one rule for what every command writes."""

import os
import shutil
from pathlib import Path

import ase.io
import pytest
import yaml

from forcedrop import DropoutCalculator, read_frames, run_md
from forcedrop.files import claim
from forcedrop.structures import write_frames
from tests.conftest import emt_frames, settings
from tests.field.commands import run


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    write_frames(tmp_path / "in.xyz", emt_frames(6, seed=5))
    write_frames(tmp_path / "held.xyz", emt_frames(6, seed=6))
    return tmp_path / "in.xyz"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def commands(model: Path, frames: Path, out: Path) -> dict[str, list[object]]:
    return {
        "predict": ["predict", model, frames, "--samples", 4, "--output", out / "p.xyz"],
        "evaluate": ["evaluate", model, frames, "--samples", 4, "--output", out / "e", "--write", out / "w.xyz"],
        "compare": ["compare", model, "--test", frames, "--samples", 4, "--output", out / "c"],
        "fill": ["fill", model, "--data", frames, "--held-out", frames.with_name("held.xyz"), "--functions", 8, "--output",
                 out / "f.pt"],
        "md": ["md", model, frames, "--steps", 2, "--samples", 4, "--output", out / "md"],
        "ranking": ["flag", model, frames, "--threshold", 0, "--samples", 4, "--output", out / "f.xyz", "--ranking",
                    out / "r.csv"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["predict", "evaluate", "compare", "fill", "md", "ranking"])
def test_output_that_exists_is_refused_before_anything_is_computed(model, frames, tmp_path, name: str) -> None:
    command = commands(model, frames, tmp_path / "out")[name]
    run(*command)
    before = contents(tmp_path)
    assert len(before) > 1
    out = run(*command, code=1)
    assert "exists; " in out
    assert "--overwrite" in out
    assert contents(tmp_path) == before
    run(*command, "--overwrite")
    assert contents(tmp_path).keys() >= before.keys()


def test_report_is_refused_too(model, frames, tmp_path) -> None:
    run("evaluate", model, frames, "--samples", 4, "--output", tmp_path / "e")
    run("report", tmp_path / "e")
    assert "page.html exists" in run("report", tmp_path / "e", code=1)
    run("report", tmp_path / "e", "--overwrite")
    assert "must end with one of .html" in run("report", tmp_path / "e", "--output", tmp_path / "page.txt", code=1)


@pytest.mark.parametrize("name", ["predict", "evaluate", "flag"])
@pytest.mark.parametrize("link", [False, True])
def test_input_and_output_may_not_be_one_file(model, frames, tmp_path, name: str, link: bool) -> None:
    output = frames
    if link:
        output = tmp_path / "link.xyz"
        output.symlink_to(frames)
    option = {"predict": "--output", "evaluate": "--write", "flag": "--output"}[name]
    before = frames.read_bytes()
    for extra in ([], ["--overwrite"]):
        assert "is read and would be written" in run(name, model, frames, option, output, *extra, code=1)
    assert frames.read_bytes() == before
    assert len(read_frames(frames)) == 6


def test_fill_does_not_write_over_the_model(model, frames, tmp_path) -> None:
    own = tmp_path / "own.pt"
    shutil.copy(model, own)
    before = own.read_bytes()
    fill = ["fill", own, "--data", frames, "--held-out", frames.with_name("held.xyz"), "--functions", 8]
    assert "own_filled.pt" in run(*fill)
    assert own.read_bytes() == before
    assert "is read and would be written" in run(*fill, "--output", own, "--overwrite", code=1)


def test_flag_leaves_no_frames_of_an_earlier_call(model, frames, tmp_path) -> None:
    flag = ["flag", model, frames, "--samples", 4, "--output", tmp_path / "f.xyz"]
    run(*flag, "--threshold", 0)
    assert len(read_frames(tmp_path / "f.xyz")) == 6
    earlier = (tmp_path / "f.xyz").read_bytes()
    out = run(*flag, "--threshold", 1e5)
    assert "nothing is flagged" in out
    assert not (tmp_path / "f.xyz").exists()
    assert (tmp_path / "f.xyz.1").read_bytes() == earlier  # kept, under a name that nothing reads by accident
    run(*flag, "--threshold", 0)
    run(*flag, "--threshold", 1e5, "--overwrite")
    assert not (tmp_path / "f.xyz").exists()
    assert not (tmp_path / "f.xyz.2").exists()


@pytest.mark.parametrize("suffix", [".traj", ".db", ".json", ".h5"])
def test_an_earlier_flag_is_known_in_every_format(model, frames, tmp_path, suffix: str) -> None:
    flag = ["flag", model, frames, "--samples", 4, "--threshold", 0, "--output", tmp_path / f"f{suffix}"]
    run(*flag)
    assert f"f{suffix}.1" in run(*flag)


def test_flag_refuses_a_file_that_is_not_its_own(model, frames, tmp_path) -> None:
    write_frames(tmp_path / "mine.xyz", emt_frames(2))
    before = (tmp_path / "mine.xyz").read_bytes()
    out = run("flag", model, frames, "--samples", 4, "--threshold", 1e5, "--output", tmp_path / "mine.xyz", code=1)
    assert "mine.xyz exists" in out
    assert (tmp_path / "mine.xyz").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("flag", "--output", "f.csv"), ("flag", "--output", "f"), ("flag", "--ranking", "r.xyz"), ("flag", "--plot", "p.txt"),
        ("evaluate", "--write", "w.cif"), ("predict", "--output", "p.vasp"),
    ],
)  # fmt: skip
def test_a_wrong_suffix_is_refused_at_once(tmp_path, command: str, option: str, name: str) -> None:
    # neither model nor frames exist: nothing was read before the name was looked at
    more = [] if option == "--output" or command != "flag" else ["--output", tmp_path / "f.xyz"]
    out = run(command, "no.pt", "no.xyz", option, tmp_path / name, *more, code=1)
    assert name in out
    assert "no such file" not in out


def test_md_keeps_an_earlier_run(model, frames, tmp_path) -> None:
    md = ["md", model, frames, "--samples", 4, "--output", tmp_path / "md"]
    run(*md, "--steps", 20)
    before = contents(tmp_path / "md")
    assert "--resume goes on with the run" in run(*md, "--steps", 10, code=1)
    assert "started from another structure" in run(*md, "--steps", 30, "--resume", "--index", 1, code=1)
    assert "not both" in run(*md, "--steps", 30, "--resume", "--overwrite", code=1)
    assert contents(tmp_path / "md") == before
    run(*md, "--steps", 30, "--resume")
    lines = (tmp_path / "md" / "md.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["0.0", "10.0", "20.0", "30.0"]
    (tmp_path / "md" / "restart.pt").unlink()
    assert "cannot be resumed without restart.pt" in run(*md, "--steps", 30, "--resume", code=1)
    run(*md, "--steps", 10, "--overwrite")
    assert len((tmp_path / "md" / "md.csv").read_text().splitlines()) == 3


def test_run_md_in_python_follows_the_rule(trained, tmp_path) -> None:
    def start():
        return emt_frames(1)[0].to_atoms()

    atoms = start()
    run_md(atoms, DropoutCalculator(trained, 8), tmp_path, steps=2, timestep=2.0)
    with pytest.raises(ValueError, match=r"restart\.pt exists; --resume"):
        run_md(start(), DropoutCalculator(trained, 8), tmp_path, steps=2, timestep=2.0)
    run = run_md(
        atoms, DropoutCalculator(trained, 8), tmp_path, steps=4, timestep=2.0, resume=True
    )  # atoms it moved itself
    assert [row["step"] for row in run.rows] == [0, 2, 4]
    run_md(start(), DropoutCalculator(trained, 8), tmp_path, steps=1, timestep=2.0, overwrite=True)


def test_train_keeps_a_model_and_its_own_input(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(16))
    values = settings(tmp_path, epochs=1)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.pt").write_bytes(b"somebody's")  # without a checkpoint
    assert "model.pt exists; --resume goes on with the training" in run("train", tmp_path / "t.yaml", code=1)
    assert "no last.pt to go on from" in run("train", tmp_path / "t.yaml", "--resume", code=1)
    assert (tmp_path / "run" / "model.pt").read_bytes() == b"somebody's"
    run("train", tmp_path / "t.yaml", "--overwrite")
    assert (tmp_path / "run" / "model.pt").stat().st_size > 1000
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**values, "start": str(tmp_path / "run" / "model.pt")}))
    assert "is read and would be written" in run("train", tmp_path / "t.yaml", "--overwrite", code=1)


def test_claim_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="would be written twice"):
        claim([tmp_path / "a", tmp_path / "x" / ".." / "a"])
    with pytest.raises(ValueError, match="is a folder"):
        claim([tmp_path], overwrite=True)
    with pytest.raises(ValueError, match="is not a folder"):
        claim([tmp_path / "file" / "a.xyz"])
    claim([tmp_path / "new" / "a.xyz", None], [tmp_path / "file"])
    assert not (tmp_path / "new").exists()
    if os.geteuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="no permission"):
            claim([tmp_path / "shut" / "a"])


def test_a_failed_predict_leaves_nothing_behind(model, frames, tmp_path) -> None:
    images = ase.io.read(frames, ":")
    images[4].positions[0] = images[4].positions[1]
    ase.io.write(tmp_path / "bad.xyz", images, format="extxyz")
    before = set(tmp_path.iterdir())
    out = run("predict", model, tmp_path / "bad.xyz", "--samples", 4, "--output", tmp_path / "p.xyz", code=1)
    assert "bad.xyz#4" in out
    assert set(tmp_path.iterdir()) == before
    out = run("predict", model, tmp_path / "bad.xyz", "--samples", 4, "--output", tmp_path / "p.xyz", "--skip-bad")
    assert "wrote 5 frames" in out
    assert "skipped: " in out
