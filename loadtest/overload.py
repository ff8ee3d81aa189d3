"""Starts a server, measures what it can serve, offers it twice that, and tells what became of every request.

    python -m loadtest.overload                              64 clients for 30 s, then 200 clients for 2 minutes
    python -m loadtest.overload --measure 5 --seconds 10     a short try

The server is `guard serve` on loopback. It takes its settings from GUARD_* variables, and so does the engine that is
measured without the network, in a process of its own. Exits with 1 where a request failed or got no answer.
"""

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from guard.client import Client
from guard.errors import Expired, GuardError, Overloaded
from guard.settings import Settings
from loadtest.workload import texts

CLOSED, OPEN = 64, 200  # clients that wait for each answer, and that do not
DEADLINE = 10.0  # seconds of a call
GRACE = 5.0  # seconds after the deadline when a call that has not ended counts as lost
SAMPLE = 10.0  # seconds between two looks at the server's memory

Ask = Callable[[int], Awaitable[bool]]  # sends the request of that number; whether the model answered it


@dataclass
class Load:
    """What became of the requests of an open loop: for each, the seconds that it took, by how it ended."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    unanswered: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # how long after its time each was sent

    async def add(self, call: Awaitable[bool]) -> None:
        started = time.perf_counter()
        end = self.unanswered
        try:
            end = self.answered if await call else self.errors
        except Overloaded:
            end = self.refused
        except Expired:
            pass
        except GuardError:
            end = self.errors
        finally:
            end.append(time.perf_counter() - started)


async def closed_loop(ask: Ask, seconds: float) -> float:
    """Answers a second to callers who ask again when they have theirs; one who is refused comes back when told to."""
    numbers, answered = count(), 0
    end = time.perf_counter() + seconds

    async def call() -> None:
        nonlocal answered
        while time.perf_counter() < end:
            try:
                await ask(next(numbers))
            except Overloaded as refusal:
                await asyncio.sleep(min(refusal.retry_after, max(0.0, end - time.perf_counter())))
            else:
                answered += time.perf_counter() < end

    await asyncio.gather(*(call() for _ in range(CLOSED)))
    return answered / seconds


async def open_loop(ask: Ask, rate: float, seconds: float) -> Load:
    """Sends `rate` requests a second, whatever becomes of them."""
    load, calls = Load(), []
    start = time.perf_counter()
    for number in range(math.ceil(rate * seconds)):
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        load.late.append(time.perf_counter() - due)
        calls.append(asyncio.create_task(load.add(ask(number))))
    _, lost = await asyncio.wait(calls, timeout=DEADLINE + GRACE)
    for call in lost:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return load


@asynccontextmanager
async def serve() -> AsyncIterator[tuple[str, str]]:
    """`guard serve` on free ports: where gRPC is served, and the address of its metrics."""
    guard = Path(sys.executable).with_name("guard")
    addresses = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(guard, "serve", *addresses, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    ports: dict[str, int] = {}
    async for line in process.stderr:
        if not line.startswith(b"{"):
            sys.exit(f"guard serve: {line.decode()}")
        event = json.loads(line)
        if event["event"] == "listening":
            ports = event
        if event["event"] == "serving":
            break
    rest = asyncio.create_task(process.stderr.read())  # a pipe that nobody reads would stop the server
    try:
        yield f"127.0.0.1:{ports['grpc']}", f"http://127.0.0.1:{ports['http']}/metrics"
        if process.returncode is not None:
            sys.exit(f"guard serve ended with {process.returncode}: {(await rest).decode()}")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await rest


async def memory_of(metrics: str) -> float:
    """Resident memory of a server, in MiB."""
    async with httpx.AsyncClient() as session:
        response = await session.get(metrics)
        found = re.search(r"^process_resident_memory_bytes (\S+)$", response.text, re.MULTILINE)
    assert found is not None, "the server tells its memory on Linux alone"
    return float(found[1]) / 2**20


async def watch_memory(metrics: str, samples: list[float]) -> None:
    while True:
        samples.append(await memory_of(metrics))
        await asyncio.sleep(SAMPLE)


async def engine_rate(requests: Sequence[str], seconds: float) -> float:
    """The closed loop upon the engine itself, in this process."""
    from guard.engine.moderator import Moderator
    from guard.telemetry import Telemetry
    from guard.types import Conversation, Role, Turn

    moderator = Moderator.load(Settings.load({}, os.environ), Telemetry.start("error"))

    async def ask(number: int) -> bool:
        turn = Turn(Role.USER, requests[number % len(requests)])
        return not (await moderator.judge(Conversation((turn,), 0))).verdicts[0].degraded

    rate = await closed_loop(ask, seconds)
    moderator.close()
    return rate


async def overload(requests: Sequence[str], measure: float, seconds: float) -> tuple[float, Load, list[float]]:
    """The capacity of a server in answers a second, what became of twice that, and the server's memory meanwhile."""
    async with serve() as (target, metrics), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(target, timeout=DEADLINE, retries=False)) for _ in range(OPEN)
        ]

        def ask_of(count: int) -> Ask:
            async def ask(number: int) -> bool:
                turns = [("user", requests[number % len(requests)])]
                return not (await clients[number % count].check(turns)).verdict.degraded

            return ask

        capacity = await closed_loop(ask_of(CLOSED), measure)
        memory: list[float] = []
        watch = asyncio.create_task(watch_memory(metrics, memory))
        load = await open_loop(ask_of(OPEN), 2 * capacity, seconds)
        watch.cancel()
        memory.append(await memory_of(metrics))
        return capacity, load, memory


def percentiles(times: list[float], *wanted: float) -> str:
    """In milliseconds."""
    ordered = sorted(times)
    return " / ".join(f"{ordered[int(each * (len(ordered) - 1))] * 1000:,.1f}" if ordered else "-" for each in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="of overload")
    parser.add_argument("--measure", type=float, default=30, help="seconds of each measurement of capacity")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)  # how the engine's process is called
    options = parser.parse_args()
    requests = texts(400, Settings.load({}, os.environ).model / "tokenizer.json")
    if options.engine:
        print(asyncio.run(engine_rate(requests, options.measure)))
        return
    command = [sys.executable, "-m", "loadtest.overload", "--engine", "--measure", str(options.measure)]
    engine = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    capacity, load, memory = asyncio.run(overload(requests, options.measure, options.seconds))

    table = Table("", title=f"{OPEN} clients for {options.seconds:g} s at twice the capacity", show_header=False)
    table.add_column(justify="right")
    for name, value in {
        f"in-process engine, {CLOSED} callers": f"{engine:.1f} requests/s",
        f"server, {CLOSED} clients": f"{capacity:.1f} requests/s",
        "server to engine": f"{capacity / engine:.0%}",
        "requests": f"{len(load.late):,}",
        "answered": f"{len(load.answered):,}",
        "refused": f"{len(load.refused):,}",
        "errors": f"{len(load.errors):,}",
        "unanswered": f"{len(load.unanswered):,}",
        "answered, p50 / p95 / p99 ms": percentiles(load.answered, 0.5, 0.95, 0.99),
        "refused, p50 / p99 ms": percentiles(load.refused, 0.5, 0.99),
        "sent too late by, p50 / p99 ms": percentiles(load.late, 0.5, 0.99),
        f"memory of the server every {SAMPLE:g} s, MiB": ", ".join(f"{each:,.0f}" for each in memory),
    }.items():
        table.add_row(name, value)
    Console().print(table)
    sys.exit(1 if load.errors or load.unanswered else 0)


if __name__ == "__main__":
    main()
