"""Opens streams on a server: how long a step takes beside others, and what streams that are killed leave behind.

    python -m loadtest.open_streams                                1, 32 and 200 streams, then 2 x 500 that are killed
    python -m loadtest.open_streams --abreast 8 --killed 50        a short try

The server is `guard serve` on loopback; it takes its settings from GUARD_* variables. A step is 16 tokens that end a
line, from the moment they are sent until a verdict covers them; each stream sends the next ones then. Streams are
killed at random points, 50 at once, while neighbours go on with requests and streams of their own, each of whose
answers is compared with that of a quiet server. Exits with 1 where a neighbour's answer was lost or another, or a
stream is left.
"""

import argparse
import asyncio
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import httpx

from guard.settings import Settings
from guard.v1 import moderation_pb2 as pb
from guard.v1.moderation_pb2_grpc import ModerationStub
from loadtest.overload import percentiles, serve
from loadtest.workload import texts_of

if TYPE_CHECKING:
    from guard.v1.moderation_pb2_grpc import ModerationAsyncStub

AT_ONCE = 50
NEIGHBOURS = 4
STEPS = 12  # of a stream
WITHIN = 60.0  # seconds that a neighbour waits for an answer

_USER = pb.Turn(role=pb.ROLE_USER, text="Tell me more.")
_OPENING = pb.CheckStreamRequest(open=pb.StreamOpen(turns=[_USER], mode=pb.STREAM_MODE_MONITOR))
_END = pb.CheckStreamRequest(end=pb.StreamEnd())


def delta(piece: str) -> pb.CheckStreamRequest:
    return pb.CheckStreamRequest(delta=piece.encode())


async def steps(stub: "ModerationAsyncStub", streams: int, pieces: Sequence[str]) -> list[float]:
    """Seconds of each step of so many streams side by side."""
    times = []

    async def talk(seed: int) -> None:
        call = stub.CheckStream()
        await call.write(_OPENING)
        said = 0
        for piece in random.Random(seed).choices(pieces, k=STEPS):
            said += len(piece)
            started = time.perf_counter()
            await call.write(delta(piece))
            while (await response(call)).judged < said:
                pass
            times.append(time.perf_counter() - started)
        call.cancel()

    await asyncio.gather(*map(talk, range(streams)))
    return times


async def response(
    call: "grpc.aio.StreamStreamCall[pb.CheckStreamRequest, pb.CheckStreamResponse]",
) -> pb.CheckStreamResponse:
    got = await call.read()
    assert isinstance(got, pb.CheckStreamResponse), "the stream ended"
    return got


async def kill(stub: "ModerationAsyncStub", streams: int, pieces: Sequence[str], seed: int) -> None:
    """Opens so many streams and cancels each somewhere: before its first delta, between two, or as it is judged."""
    chance = random.Random(seed)
    room = asyncio.Semaphore(AT_ONCE)

    async def talk() -> None:
        async with room:
            call = stub.CheckStream()
            await call.write(_OPENING)
            for piece in chance.choices(pieces, k=chance.randrange(STEPS)):
                await call.write(delta(piece))
                if chance.random() < 0.5:
                    await call.read()
            await asyncio.sleep(chance.random() * 0.2)
            call.cancel()

    await asyncio.gather(*(talk() for _ in range(streams)))


async def neighbour(stub: "ModerationAsyncStub", text: str, expected: pb.Verdict, became: Counter[str]) -> None:
    """Asks for one text again and again, whole and as a stream, and counts what became of it."""
    whole = pb.CheckRequest(turns=[_USER, pb.Turn(role=pb.ROLE_AGENT, text=text)])
    steps = [_OPENING, *map(delta, text.splitlines(keepends=True)), _END]

    async def check() -> pb.Verdict:
        return (await stub.Check(whole, timeout=WITHIN)).verdict

    async def streamed() -> pb.Verdict:
        return [each async for each in stub.CheckStream(iter(steps), timeout=WITHIN)][-1].verdict

    while True:
        for ask in (check, streamed):
            try:
                verdict = await ask()
            except grpc.RpcError as error:
                became[str(error.code())] += 1
            else:
                became["same" if verdict == expected else "another"] += 1


async def levels(metrics: str) -> dict[str, float]:
    """Of a server: resident memory and the cache, in MiB, and the streams that are open."""
    async with httpx.AsyncClient() as session:
        got = await session.get(metrics)
        told = dict(re.findall(r"^(\w+) (\S+)$", got.text, re.MULTILINE))
    return {
        "memory": float(told["process_resident_memory_bytes"]) / 2**20,
        "cache": float(told["guard_prefix_cache_bytes"]) / 2**20,
        "streams": float(told["guard_streams"]),
    }


async def run(given: argparse.Namespace) -> bool:
    pieces = [f"{text}\n" for text in texts_of(20, 400, Settings.load({}, os.environ).model / "tokenizer.json")]
    async with serve() as (target, metrics), grpc.aio.insecure_channel(target) as channel:
        stub: ModerationAsyncStub = ModerationStub(channel)
        for streams in given.abreast:
            times = await steps(stub, streams, pieces)
            print(f"{streams} streams: {len(times)} steps, p50 / p95 {percentiles(times, 0.5, 0.95)} ms", flush=True)
        texts = ["".join(pieces[5 * place : 5 * place + 5]) for place in range(NEIGHBOURS)]
        asked = [pb.CheckRequest(turns=[_USER, pb.Turn(role=pb.ROLE_AGENT, text=text)]) for text in texts]
        expected = [(await stub.Check(request)).verdict for request in asked]
        became = Counter[str]()
        level = await levels(metrics)
        for number in range(given.rounds + 1):
            told = ", ".join(f"{name} {value:,.0f}" for name, value in level.items())
            print(f"{number * given.killed} streams killed: {told}; neighbours {dict(became)}", flush=True)
            if number == given.rounds:
                break
            async with asyncio.TaskGroup() as tasks:
                beside = [
                    tasks.create_task(neighbour(stub, text, verdict, became))
                    for text, verdict in zip(texts, expected, strict=True)
                ]
                await kill(stub, given.killed, pieces, number)
                for task in beside:
                    task.cancel()
            await asyncio.sleep(5)  # for the server to notice
            level = await levels(metrics)
        return set(became) == {"same"} and not level["streams"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--abreast", type=int, nargs="*", default=[1, 32, 200], help="streams side by side")
    parser.add_argument("--killed", type=int, default=500, help="streams, in each round")
    parser.add_argument("--rounds", type=int, default=2, help="the first one fills the cache")
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
