"""The `guard` command as a whole: its help, its flags, and what it says of mistakes."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from guard.settings import Settings
from tests.cli.command import guard, shell

HELP = """
import sys
from guard.cli import app
try:
    app(["--help"])
except SystemExit:
    print(sorted({"torch", "grpc", "transformers"} & set(sys.modules)))
"""


def test_help_needs_no_heavy_library() -> None:
    """`guard --help` imports neither torch nor grpc, and so is there at once."""
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert "client" in shown
    assert shown.splitlines()[-1] == "[]"


async def test_every_setting_is_a_flag_of_serve_that_is_explained() -> None:
    """The flags are the settings, each with its help or its default."""
    shown = " ".join((await guard("serve", "--help")).out.split())
    assert [name for name in Settings.model_fields if f" --{name.replace('_', '-')} " not in shown] == []
    assert "--listen <string> Where gRPC is served. [default: 0.0.0.0:50051]" in shown


async def test_the_version_is_that_of_the_package() -> None:
    """--version prints what was installed."""
    assert (await shell("--version")).out == version("guard-moderation") + "\n"


async def test_all_wrong_settings_are_told_at_once_by_their_source() -> None:
    """Flags and variables that cannot be used are one line each, and exit with 2."""
    result = await shell("serve", "--max-turns", "many", GUARD_MAX_TURN="3")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        "error: GUARD_MAX_TURN: unknown setting, did you mean max_turns?",
        "error: --max-turns: Input should be a valid integer, unable to parse string as an integer, found 'many'",
    ]


async def test_a_wrong_policy_is_told_by_its_place(tmp_path: Path) -> None:
    """`guard check` names file, line and column."""
    (tmp_path / "default.yaml").write_text("description: A policy.\ncategory: {}\n")
    result = await guard("check", "hello", "--policies", tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path / 'default.yaml'}:")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (b"hello", "stdin: is not JSON, at line 1, column 1: Expecting value"),
        (b'"\xff"', "stdin: is not JSON"),
        (b"[" * 100_000, "stdin: is not JSON"),
        (b"[]", "request: should be a JSON object"),
        (b'{"turns": {}}', "turns: should be a list"),
        (b'{"turns": ["hello"]}', "turns[0]: should be a JSON object"),
        (b'{"turns": [{"text": "hello"}]}', "turns[0].role: should be user, agent, system or tool"),
        (b'{"turns": [{"role": "user", "text": 1}]}', "turns[0].text: should be a string"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}',
            "messages[0].content[0].text: should be a string",
        ),
        (b'{"text": "hello", "turns": []}', "request: should have one of text, turns"),
        (b'{"text": "hello", "target": "x"}', "request: Failed to parse target field"),
        (
            b'{"text": "hello", "polcy": "x"}',
            "request: has no field polcy",
        ),
    ],
)
async def test_what_is_wrong_with_a_conversation_is_told_by_its_path(stdin: bytes, problem: str) -> None:
    """Standard input that is no conversation is one line of explanation, and exits with 2."""
    result = await guard("client", "check", stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {problem}")
    assert result.err.count("\n") == 1


async def test_a_text_of_bytes_that_are_not_utf_8_is_refused() -> None:
    """What a shell passes on as it is may not be text."""
    result = await guard("client", "check", b"\xff")
    assert result.code == 2
    assert result.err == "error: turns[0].text: is not valid Unicode (it holds a lone surrogate)\n"
