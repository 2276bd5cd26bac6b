"""The README is run: its Python, its commands, its training file."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from forcedrop.cli import app
from forcedrop.training import parse_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository, where a test may write."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_python(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"-\d+\.\d+ ± 0\.\d+ eV, largest atomic force σ 0\.\d+ eV/Å", capsys.readouterr().out)


def test_commands(checkout: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("forcedrop ")]
    assert {line.split()[1] for line in lines} == {"info", "evaluate", "predict", "md", "flag"}
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        for option, value in re.findall(r"--(output|plot) (\S+)", line):
            assert (checkout / value).exists(), f"{line}: no {option}"


def test_training_file() -> None:
    (text,) = blocks("yaml")
    config = parse_config(yaml.safe_load(text))
    assert config.gives_error_bars
    for line in "\n".join(blocks("text")).splitlines():
        assert CliRunner().invoke(app, [line.split()[1], "--help"]).exit_code == 0, line


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
