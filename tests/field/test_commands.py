"""What the commands say of themselves: help, version, exit codes, one meaning a word; and picks without a loop."""

import re

import numpy as np
import pytest
import yaml

import forcedrop
from forcedrop.active import flag
from forcedrop.active.flagging import select
from forcedrop.cli import app
from forcedrop.model import load_model
from forcedrop.structures import read_frames, write_frames
from forcedrop.training import parse_config, train
from tests.conftest import emt_frames, settings
from tests.field.commands import run

COMMANDS = ("train", "evaluate", "predict", "compare", "fill", "info", "md", "flag", "active", "report")


def test_version() -> None:
    assert run("--version").strip() == f"forcedrop {forcedrop.__version__}"


def documented_units(command: str) -> set[str]:
    """Every unit in brackets of the options' help texts, as they are written in the code."""
    import typer

    found = typer.main.get_command(app).commands[command]
    texts = [found.help or "", *(p.help or "" for p in found.params if getattr(p, "help", None))]
    return {unit for text in texts for unit in re.findall(r"\[[^\]]+\]", text)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_units(command: str) -> None:
    out = " ".join(run(command, "--help").split())
    for unit in documented_units(command):
        assert unit in out, unit


def test_md_has_its_units() -> None:
    assert {"[K]", "[GPa]", "[1/fs]", "[fs]", "[eV/Å]"} <= documented_units("md")


@pytest.mark.parametrize("command", COMMANDS)
def test_seed_means_one_thing(command: str) -> None:
    out = " ".join(run(command, "--help").split())
    for text in re.findall(r" --seed .*?(?= --)", out):
        assert "of what is drawn" in text
    for text in re.findall(r" --mask-seed .*?(?= --)", out):
        assert "dropout masks drawn at inference" in text
    assert (" --seed " in out) == (command in ("md", "fill"))
    assert (" --mask-seed " in out) == (command in ("md", "evaluate", "predict", "flag"))


def test_exit_codes(model, tmp_path) -> None:
    out = " ".join(run("--help").split())
    assert "Exit codes: 0 done; 1 refused or failed" in out
    assert "3 dynamics ended by its guard" in out
    write_frames(tmp_path / "a.xyz", emt_frames(1))
    md = ["md", model, tmp_path / "a.xyz", "--samples", 4, "--output", tmp_path / "md"]
    run(*md, "--steps", "many", code=2)
    run(*md, "--steps", -5, code=2)
    run(*md, "--high", -1, code=1)
    out = run(*md, "--steps", 20, "--low", 0, "--high", 1e-6, code=3)
    assert "stopped at" in out
    assert (tmp_path / "md" / "md.png").exists()
    run(*md, "--steps", 20, "--low", 0, "--high", 1e-6, "--resume", code=3)


def test_flag_picks_as_the_loop_does(model, trained, tmp_path) -> None:
    different = emt_frames(6, seed=8, scale=0.2)
    copies = [different[0]] * 5
    frames = [*copies, *different]
    flags = flag(trained, frames, threshold=0.0, n_samples=8)
    plain, diverse = select(trained, flags, 5), select(trained, flags, 5, diverse=True)
    assert [f.info["sigma_max_force"] for f in plain] == sorted(flags.values, reverse=True)[:5]

    def distinct(found) -> int:
        return len({np.round(f.pos, 6).tobytes() for f in found})

    assert distinct(diverse) == 5
    assert distinct(select(trained, flags, diverse=True)) == len(select(trained, flags, diverse=True)) <= 6
    known = select(trained, flags, 5, diverse=True, known=different[:3])
    assert not {np.round(f.pos, 6).tobytes() for f in known} & {np.round(f.pos, 6).tobytes() for f in different[:3]}
    write_frames(tmp_path / "in.h5", frames)
    call = ["flag", model, tmp_path / "in.h5", "--threshold", 0, "--samples", 8, "--number", 3]
    run(*call, "--diverse", "--output", tmp_path / "f.traj")
    assert distinct(read_frames(tmp_path / "f.traj")) == 3
    run(*call, "--output", tmp_path / "g.db")
    assert len(read_frames(tmp_path / "g.db")) == 3
    assert "--known is for --diverse" in run(*call, "--known", tmp_path / "in.h5", code=1)


def test_fine_tuning_takes_the_shape_of_its_start(trained_folder, tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(16, seed=21))
    write_frames(tmp_path / "held.h5", emt_frames(6, seed=22))
    start = trained_folder / "run" / "model.pt"
    data = {"train": [str(tmp_path / "train.h5")], "calibration": [str(tmp_path / "held.h5")]}
    values = settings(tmp_path, epochs=1, start=str(start), data=data)
    del values["model"]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    run("train", tmp_path / "t.yaml")
    tuned, old = load_model(tmp_path / "run" / "model.pt"), load_model(start)
    assert tuned.potential.settings() == old.potential.settings()
    assert tuned.cutoff == 4.0  # not the default's
    train(parse_config(values), resume=True)  # is over, and has its shape in the checkpoint
