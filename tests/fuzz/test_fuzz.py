"""Some damaged inputs of each kind in every run of the tests, many behind ``slow``, and the files that once led to a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.campaign import CATEGORIES, judge, run

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_right_result_or_one_clear_error(tmp_path: Path, category: str) -> None:
    found = run(category, range(12), tmp_path)
    assert not found.faults
    assert sum(found.counts.values()) == 12


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_a_hundred_thousand(tmp_path: Path, category: str) -> None:
    count = 100_000 // len(CATEGORIES) + 1
    found = run(category, range(1_000_000, 1_000_000 + count), tmp_path, CORPUS)
    assert not found.faults


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*-*-*")), ids=lambda path: path.name)
def test_what_once_was_a_fault(tmp_path: Path, path: Path) -> None:
    category, _, name = path.name.split("-", 2)
    copy = tmp_path / name
    copy.write_bytes(path.read_bytes())
    assert judge(category, 0, copy, None)[0] in ("result", "error", "device")


def test_the_campaign_sees_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from tests.fuzz import campaign

    def bad(category: str, index: int, *_: object) -> tuple[str, str]:
        if index == 1:
            os.kill(os.getpid(), signal.SIGFPE)
        if index == 2:
            (tmp_path / "ran").touch()
        return "traceback" if index == 3 else "error", ""

    monkeypatch.setattr(campaign, "judge", bad)
    found = run("xyz", range(5), tmp_path)
    assert [(index, verdict) for _, index, verdict, _ in found.faults] == [
        (1, "killed"),
        (2, "code ran"),
        (3, "traceback"),
    ]
    assert found.counts["error"] == 2
