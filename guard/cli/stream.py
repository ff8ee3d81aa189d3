"""`guard check --stream`: a turn that is judged while it is typed, or comes through a pipe."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guard.settings import Settings
    from guard.v1 import moderation_pb2 as pb

_PIECE = 4096  # bytes that are read at once, at most


def opening(text: str | None, role: str, policy: str, mode: str) -> "pb.StreamOpen":
    """Of an agent's turn after what `text` says in that role, if it says anything. Raises InputError."""
    from guard.cli import read
    from guard.client import stream_opening

    said = read.request(text, role, policy).turns if text else []
    return stream_opening(said, policy=policy, mode=mode)


async def stream(settings: "Settings", opened: "pb.StreamOpen", as_json: bool) -> int:
    """Prints what is said of the turn on standard input as it comes. Returns 1 where it is cut, else 0."""
    from guard.cli.render import Streamed, print_json
    from guard.engine.moderator import Moderator
    from guard.service.rollout import Rollout
    from guard.service.stream import Stream
    from guard.telemetry import Telemetry

    telemetry = Telemetry.start("warning")
    moderator = Moderator.load(settings, telemetry)
    rollout = Rollout(settings, telemetry, time.time)
    rollout.start(moderator)
    taken = bytearray()
    code = 0
    try:
        judged = Stream(opened, rollout, settings, telemetry, "", lambda *_: None)
        with Streamed() as shown:
            async for response in judged.answers(_requests(taken)):
                if as_json:
                    print_json(response)
                else:
                    shown.show(taken.decode(errors="replace"), response)
                if response.HasField("cut"):
                    code = 1
                if response.complete:
                    break
    finally:
        rollout.stop()
        moderator.close()
    return code


async def _requests(taken: bytearray) -> "AsyncIterator[pb.CheckStreamRequest]":
    """Standard input as it comes, from a terminal line by line; what is read is added to `taken`."""
    from guard.v1 import moderation_pb2 as pb

    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        while piece := os.read(sys.stdin.fileno(), _PIECE):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        loop.call_soon_threadsafe(pieces.put_nowait, b"")

    threading.Thread(target=read, daemon=True).start()  # nothing can call it back from a read
    while piece := await pieces.get():
        taken += piece
        yield pb.CheckStreamRequest(delta=piece)
    yield pb.CheckStreamRequest(end=pb.StreamEnd())
