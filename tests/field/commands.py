"""The command as a user calls it, for the tests of this folder."""

from typer.testing import CliRunner

from forcedrop.cli import app


def run(*arguments: object, code: int = 0) -> str:
    """Run it, hold its exit status against ``code``, and return what it said; never a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output
