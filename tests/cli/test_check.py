"""`guard check` and `guard serve`, with the model that is shipped."""

import json
from asyncio import StreamReader
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.cli.command import guard, start

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
    here = await guard("check", "--json", "--role", "agent", "You are worthless.")
    turns_here = await guard("check", "--json", "--all", stdin=CONVERSATION)
    assert here.code == there.code
    assert turns_here.code == turns_there.code == 0
    for own, other, answer in ((here, there, "verdict"), (turns_here, turns_there, "verdicts")):
        assert json.loads(own.out)[answer] == json.loads(other.out)[answer]
        assert json.loads(own.out)["provenance"] == json.loads(other.out)["provenance"]
