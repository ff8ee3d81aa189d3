"""`guard policy replay` and `guard policy diff`, on a log that a server wrote."""

import json
from pathlib import Path

import pytest

from guard.policy.store import load_policy
from guard.types import Role, Scores
from tests.cli.command import guard
from tests.policy.logs import Said, write_log

POLICY = """\
description: For tests.
categories:
  violence:
    title: Violence
    hazards: [S1]
    thresholds:
      user: {flag: 0.5, block: 0.75}
"""
TURNS = [Said(Role.USER, Scores(0.0, {"S1": score})) for score in (0.25, 0.5, 0.625, 0.75)]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def new(tmp_path: Path) -> Path:
    path = tmp_path / "new.yaml"
    path.write_text(POLICY.replace("0.75", "0.6"))
    return path


@pytest.fixture
def log(old: Path, tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", load_policy(old), TURNS)


async def test_a_replay_agrees_with_its_log(old: Path, log: Path) -> None:
    """It says how many verdicts it proved, over several logs."""
    result = await guard("policy", "replay", old, "--on", log, log)
    revision = load_policy(old).revision
    summary = f"old {revision}, 8 verdicts: 8 of this revision, 0 of them differ from what was logged\n"
    assert (result.code, result.out, result.err) == (0, summary, "")


@pytest.fixture
def tampered(log: Path) -> Path:
    log.write_text(log.read_text().replace('"action":"block"', '"action":"allow"'))
    return log


async def test_a_replay_that_differs_fails(old: Path, tampered: Path) -> None:
    """A verdict that was changed in the log is named, and the exit code is 1."""
    result = await guard("policy", "replay", old, "--on", tampered)
    assert result.code == 1
    assert result.err == "error: not replayed as logged: d3/0 …\n"
    assert "1 of them differ" in result.out


async def test_a_diff_is_a_table_a_page_and_json(old: Path, new: Path, log: Path, tmp_path: Path) -> None:
    """All of them tell the same changes."""
    page = tmp_path / "diff.html"
    result = await guard("policy", "diff", old, new, "--on", log, "--html", page)
    assert (result.code, result.err) == (0, "")
    summary, header, *rows = result.out.splitlines()
    assert summary.endswith(": 1 of 4 verdicts change")
    assert header.split() == ["about", "role", "before", "after", "verdicts", "share", "for", "example"]
    assert [row.split() for row in rows] == [
        [about, "user", "flag", "block", "1", "25.000%", "d2/0"] for about in ("verdict", "violence")
    ]
    assert "<td>violence<td>user<td>flag<td>block" in page.read_text()
    report = json.loads((await guard("policy", "diff", old, new, "--on", log, "--json")).out)
    assert report["verdicts"] == {"user": 4}
    assert report["changes"][1] == {
        "about": "violence",
        "role": "user",
        "before": "flag",
        "after": "block",
        "count": 1,
        "share": 0.25,
        "ids": ["d2/0"],
    }


async def test_what_is_no_log_is_an_error(old: Path, new: Path, tmp_path: Path) -> None:
    """One line, and the exit code 2."""
    result = await guard("policy", "diff", old, new, "--on", tmp_path / "none")
    assert (result.code, result.err) == (2, f"error: {tmp_path / 'none'}: there is no such file\n")
