"""What every call has in common, whatever it came by: it is let in or not, and its end is counted and logged."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from guard.errors import Draining
from guard.telemetry import Telemetry

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Call:
    """What becomes known of a call while it runs."""

    method: str
    client: str = ""
    decision_id: str | None = None
    charged: bool = False

    def ended(
        self, telemetry: Telemetry, code: str, seconds: float, level: int, failure: Exception | None = None
    ) -> None:
        """Counts and logs its end; `failure` is a fault of ours."""
        telemetry.metrics.calls.labels(self.method, code).inc()
        telemetry.metrics.call_seconds.labels(self.method).observe(seconds)
        telemetry.log.log(
            level,
            "call",
            method=self.method,
            code=code,
            ms=round(seconds * 1000, 3),
            client=self.client,
            decision_id=self.decision_id,
            exc_info=failure,
        )


class Gate:
    """Knows what runs, and lets nothing new in once it is closed."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = asyncio.Event()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_closed(self) -> bool:
        return self.closed.done()

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as this lasts, the gate is not drained."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._idle.set()

    async def drain(self) -> None:
        """Closes, and returns once nothing runs."""
        settle(self.closed)
        while self._running:
            self._idle.clear()
            await self._idle.wait()


def settle(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


async def before(event: asyncio.Future[None], work: Awaitable[_Result]) -> _Result:
    """What the work gives. Where the event comes before it, the work is given up and Draining raised."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, event), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Draining
        return task.result()
    finally:
        if task.cancel():
            await asyncio.wait((task,))
