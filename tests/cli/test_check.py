"""`guard check` and `guard serve`, with the model that is shipped."""

import json
from asyncio import StreamReader
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.cli.command import guard, shell, start

CONVERSATION = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "How do I bake bread without an oven?"},
            {"role": "assistant", "content": "Use a heavy pan with a lid, over a low flame."},
        ]
    }
).encode()


async def event(log: StreamReader, name: str) -> dict[str, Any]:
    """The next line of the log for events of that name."""
    async for line in log:
        fields: dict[str, Any] = json.loads(line)
        if fields["event"] == name:
            return fields
    raise AssertionError(f"the log ended without {name}")


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """HOST:PORT of a server that is ready; it must end well when told to."""
    process = await start("serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    assert process.stderr is not None
    try:
        port = (await event(process.stderr, "listening"))["grpc"]
        await event(process.stderr, "serving")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        _, rest = await process.communicate()
    assert process.returncode == 0
    assert [json.loads(line)["event"] for line in rest.splitlines()][-2:] == ["draining", "stopped"]


async def test_a_check_here_and_one_by_a_server_agree() -> None:
    """The same text gets the same scores, action and exit code in this process and from a server."""
    async with served() as server:
        there = await guard("client", "check", "--json", "--role", "agent", "You are worthless.", "--server", server)
        turns_there = await guard("client", "conversation", "--json", "--server", server, stdin=CONVERSATION)
    here = await shell("check", "--json", "--role", "agent", "You are worthless.")
    turns_here = await guard("check", "--json", "--all", stdin=CONVERSATION)
    assert here.code == there.code
    assert turns_here.code == turns_there.code == 0
    for own, other, answer in ((here, there, "verdict"), (turns_here, turns_there, "verdicts")):
        assert json.loads(own.out)[answer] == json.loads(other.out)[answer]
        assert json.loads(own.out)["provenance"] == json.loads(other.out)["provenance"]


async def test_a_redirect_shows_its_reply_and_does_not_pass(tmp_path: Path) -> None:
    """A rule is told by its name, metadata chooses the overlay, and the exit code is that of what is blocked.

    The directory need not hold a default policy where another one is asked for.
    """
    (tmp_path / "mine.yaml").write_text(
        "description: Redirects.\nreplies: {keep-private: Keep it private.}\n"
        "rules: {mail: {terms: [mail], roles: [user], action: redirect, reply: keep-private}}\n"
        "categories: {any: {title: Any, score: unsafe, thresholds: {user: {block: 1}}}}\n"
        "overlays: [{when: {app: kids}, thresholds: {any: {user: {flag: 0}}}}]\n"
    )
    request = json.dumps({"text": "My MAIL is here.", "metadata": {"app": "kids"}}).encode()
    result = await guard("check", "--policies", tmp_path, "--policy", "mine", stdin=request)
    assert result.code == 1
    lines = result.out.splitlines()
    assert lines[:2] == ["redirect user turn", "keep-private: Keep it private."]
    assert [line.split() for line in lines if "rule" in line] == [["rule", "mail", "redirect"]]
    assert any(line.split()[:1] == ["any"] and line.split()[-1] == "flag" for line in lines)


async def test_a_stream_is_judged_as_it_comes() -> None:
    """A line for each verdict, the last of which cuts what is harmful: exit code 1. What is harmless passes: 0."""
    said = b"Sure, I am here. You are worthless, everybody hates you. Go and kill yourself, nobody will miss you."
    cut = await shell("check", "--stream", "I feel so alone.", stdin=said)
    assert (cut.code, cut.err) == (1, "")
    assert cut.out.splitlines()[-1].split()[1:3] == ["judged", "block"]
    assert "cut at" in cut.out
    fine = await shell("check", "--stream", "--json", "--mode", "monitor", stdin=b"Bake it in a heavy pan.")
    assert (fine.code, fine.err) == (0, "")
    assert '"complete": true' in fine.out
    wrong = await guard("check", "--stream", "--mode", "loud")
    assert (wrong.code, wrong.err) == (2, "error: mode: should be one of hold, lag, monitor\n")
