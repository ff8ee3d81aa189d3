"""Admits requests, fills batches by tokens, and settles every caller by itself."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from guard.errors import Draining, Expired, ModelFailed, Overloaded
from guard.telemetry import Telemetry
from guard.types import Lane, Scores, Tokens

Score = Callable[[Sequence[Tokens]], Sequence[tuple[Scores, ...]]]
Cost = Callable[[Tokens], int]


def whole(tokens: Tokens) -> int:
    """What it costs to read all."""
    return len(tokens.ids)


class Scored(NamedTuple):
    """Scores of the spans of one request's windows, in order, and where its time went, in seconds."""

    scores: tuple[Scores, ...]
    queue: float
    model: float


@dataclass(slots=True)
class _Request:
    windows: Sequence[Tokens]
    size: int  # tokens that are to be read in all of them
    deadline: float | None
    admitted: float
    answer: asyncio.Future[Scored]

    @property
    def waits(self) -> bool:
        return not self.answer.done()


class Batcher:
    """One model, many callers. All state lives on the event loop; only the model's pass runs on a thread of its own.

    Online requests are refused once the queue ahead of them would take longer than `max_queue_seconds`; bulk requests
    wait at that limit instead, and fill what room online ones leave in a batch. Both are served in order of arrival.
    """

    def __init__(
        self,
        score: Score,
        thread: Executor,
        *,
        cost: Cost = whole,
        max_batch_tokens: int,
        max_queue_seconds: float,
        rate: float,
        telemetry: Telemetry,
    ) -> None:
        """`thread`: the only one that the model runs on. `cost`: how many tokens are to be read of those given.

        `rate`: tokens a second of full batches, to begin with.
        """
        self._score = score
        self._cost = cost
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_seconds = max_queue_seconds
        self._rate = rate
        self._log, self._metrics = telemetry.log, telemetry.metrics
        self._queues: dict[Lane, deque[_Request]] = {lane: deque() for lane in Lane}
        self._tokens = dict.fromkeys(Lane, 0)  # tokens in each queue
        self._room = asyncio.Event()  # set, for bulk callers, whenever a queue may have become shorter
        self._loop: asyncio.Task[None] | None = None  # runs while anything is queued
        self._thread = thread
        self._draining = False

    def admit(self, lane: Lane) -> None:
        """Raises Draining or Overloaded where a request would be refused now."""
        if self._draining:
            raise Draining
        wait = self._tokens[lane] / self._rate
        if lane is Lane.INTERACTIVE and wait > self._max_queue_seconds:
            raise Overloaded(retry_after=wait)

    @contextmanager
    def arriving(self, lane: Lane, tokens: int) -> Iterator[None]:
        """Counts a request of about so many tokens as queued while it is made ready; raises what `admit` does."""
        self.admit(lane)
        self._tokens[lane] += tokens
        try:
            yield
        finally:
            self._tokens[lane] -= tokens
            self._room.set()

    async def score(self, windows: Sequence[Tokens], lane: Lane, deadline: float | None) -> Scored:
        """Scores windows that belong together, in whatever batch comes next.

        `deadline` is in time.monotonic() seconds. Raises Draining, Overloaded, Expired or ModelFailed. Where the caller
        is cancelled the model is not asked.
        """
        self.admit(lane)
        while self._tokens[lane] / self._rate > self._max_queue_seconds:
            self._room.clear()
            await self._room.wait()
        size = sum(map(self._cost, windows))
        request = _Request(windows, size, deadline, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queues[lane].append(request)
        self._tokens[lane] += size
        self._measure_queue()
        if self._loop is None:
            self._loop = asyncio.create_task(self._serve())
        return await request.answer

    async def drain(self) -> None:
        """Refuses what is new and waits for what is queued."""
        self._draining = True
        if self._loop is not None:
            await asyncio.shield(self._loop)

    async def _serve(self) -> None:
        """The loop: while anyone waits, fill a batch, run it, settle its callers."""
        try:
            while any(self._queues.values()):
                if batch := self._next_batch():
                    await self._run(batch)
        finally:
            self._loop = None

    def _next_batch(self) -> list[_Request]:
        """Takes requests up to the token budget, online ones first, dropping those nobody waits for any more."""
        batch: list[_Request] = []
        budget = self._max_batch_tokens
        now = time.monotonic()
        for lane, queue in self._queues.items():
            while queue and (queue[0].size <= budget or not batch):
                request = queue.popleft()
                self._tokens[lane] -= request.size
                if request.deadline is not None and request.deadline <= now and request.waits:
                    request.answer.set_exception(Expired())
                elif request.waits:
                    batch.append(request)
                    budget -= request.size
            if queue:  # a lower lane does not overtake
                break
        self._room.set()
        self._measure_queue()
        return batch

    async def _run(self, batch: list[_Request]) -> None:
        inputs = [tokens for request in batch for tokens in request.windows]
        tokens = sum(request.size for request in batch)
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        started = time.monotonic()
        try:
            scores = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._score, inputs))
            settled = [(each, tuple(chain.from_iterable(next(scores) for _ in each.windows))) for each in batch]
        except Exception as error:  # whatever the model raised is an answer to every caller, and the loop lives on
            self._metrics.model_failures.inc()
            self._log.error("the model failed", requests=len(batch), tokens=tokens, exc_info=error)
            for request in batch:
                if request.waits:
                    failure = ModelFailed("the model could not answer")
                    failure.__cause__ = error
                    request.answer.set_exception(failure)
            return
        spent = time.monotonic() - started
        if tokens * 2 >= self._max_batch_tokens:  # small batches say little of how fast a queue moves
            self._rate += 0.2 * (tokens / spent - self._rate)
        for request, own in settled:
            if request.waits:
                request.answer.set_result(Scored(own, started - request.admitted, spent))

    def _measure_queue(self) -> None:
        self._metrics.queued_requests.set(sum(map(len, self._queues.values())))
        self._metrics.queued_tokens.set(sum(self._tokens.values()))
