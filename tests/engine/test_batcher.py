"""Who is served when, in which batch, and what becomes of those who are not."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.engine.batcher import Batcher, Scored
from guard.errors import Draining, Expired, ModelFailed, Overloaded
from guard.telemetry import Metrics, Telemetry
from guard.types import Coverage, Lane, Role, Scores, Span, Tokens
from tests.conftest import until


class SumModel:
    """Scores a span by the sum of the ids up to its end; waits at `gate` in each pass, and fails as often as told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[int]] = []  # of each pass, the first id of each sequence
        self.failures: list[Exception] = []

    def __call__(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        self.batches.append([tokens.ids[0] for tokens in batch])
        self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        return [tuple(Scores(sum(tokens.ids[: span.end]), {}) for span in tokens.spans) for tokens in batch]


class Queue:
    """A batcher whose model is busy with request 0, and the callers that wait."""

    def __init__(self, batcher: Batcher, model: SumModel, metrics: Metrics) -> None:
        self.batcher = batcher
        self.model = model
        self.metrics = metrics
        self.first = self.ask(0)

    @property
    def queued_tokens(self) -> float | None:
        return self.metrics.registry.get_sample_value("guard_queued_tokens")

    def ask(
        self, id: int, size: int = 1, lane: Lane = Lane.INTERACTIVE, deadline: float | None = None
    ) -> asyncio.Task[Scored]:
        return asyncio.create_task(self.batcher.score([tokens_of([id] * size)], lane, deadline))

    async def go(self) -> list[list[int]]:
        """Lets the model work until nobody waits; the batches that came after the one with request 0."""
        await asyncio.sleep(0)  # whoever asked is in the queue
        self.model.gate.set()
        await self.batcher.drain()
        return self.model.batches[1:]


def tokens_of(ids: Sequence[int], ends: Sequence[int] = ()) -> Tokens:
    """A sequence whose turns end at `ends`, by default one that is all of it."""
    spans = (Span(turn, Role.USER, 0, end, Coverage(end, end)) for turn, end in enumerate(ends or [len(ids)]))
    return Tokens(tuple(ids), tuple(spans))


@asynccontextmanager
async def queue(
    max_batch_tokens: int = 1000, max_queue_seconds: float = 1e9, rate: float = 1.0
) -> AsyncIterator[Queue]:
    model, telemetry = SumModel(), Telemetry.start("critical")
    thread = ThreadPoolExecutor(1)
    batcher = Batcher(
        model,
        thread,
        max_batch_tokens=max_batch_tokens,
        max_queue_seconds=max_queue_seconds,
        rate=rate,
        telemetry=telemetry,
    )
    try:
        queue = Queue(batcher, model, telemetry.metrics)
        await until(lambda: model.batches == [[0]])
        yield queue
    finally:
        model.gate.set()
        await batcher.drain()
        thread.shutdown()


async def test_requests_are_served_in_order_of_arrival_within_the_budget() -> None:
    """A batch takes what comes next as long as it fits; what does not fit begins the next batch."""
    async with queue(max_batch_tokens=10) as waiting:
        asked = [waiting.ask(id, size) for id, size in enumerate([4, 4, 4, 2, 4, 6, 10, 1], 1)]
        assert await waiting.go() == [[1, 2], [3, 4, 5], [6], [7], [8]]
        assert [(await each).scores[0].unsafe for each in asked] == [4, 8, 12, 8, 20, 36, 70, 8]


async def test_a_sequence_above_the_budget_runs_alone() -> None:
    """It is neither refused nor does it take others with it."""
    async with queue(max_batch_tokens=10) as waiting:
        for id, size in enumerate([1, 11, 1], 1):
            waiting.ask(id, size)
        assert await waiting.go() == [[1], [2], [3]]


async def test_a_request_costs_what_is_to_be_read_of_it() -> None:
    """A batch holds more of those that were read in part before."""
    model, telemetry, thread = SumModel(), Telemetry.start("critical"), ThreadPoolExecutor(1)
    batcher = Batcher(
        model,
        thread,
        cost=lambda tokens: 2,
        max_batch_tokens=10,
        max_queue_seconds=1e9,
        rate=1.0,
        telemetry=telemetry,
    )
    waiting = Queue(batcher, model, telemetry.metrics)
    await until(lambda: model.batches == [[0]])
    asked = [waiting.ask(id, 9) for id in range(1, 8)]
    assert await waiting.go() == [[1, 2, 3, 4, 5], [6, 7]]
    assert [(await each).scores[0].unsafe for each in asked] == [9 * id for id in range(1, 8)]
    thread.shutdown()


async def test_windows_that_belong_together_share_a_batch() -> None:
    """They are let in, counted and scored as one."""
    async with queue(max_batch_tokens=10, max_queue_seconds=9, rate=1) as waiting:
        waiting.ask(1, 6)
        together = asyncio.create_task(
            waiting.batcher.score([tokens_of([id] * 4) for id in (2, 3)], Lane.INTERACTIVE, None)
        )
        refused = waiting.ask(4)
        await asyncio.sleep(0)
        assert waiting.queued_tokens == 14
        with pytest.raises(Overloaded):
            await refused
        assert await waiting.go() == [[1], [2, 3]]
        assert [scores.unsafe for scores in (await together).scores] == [8, 12]


async def test_online_requests_come_first_and_bulk_fills_the_room_they_leave() -> None:
    """Bulk work that came earlier waits for online requests, and stands in what is left of their last batch."""
    async with queue(max_batch_tokens=10) as waiting:
        for id in (1, 2, 3):
            waiting.ask(id, 5, Lane.BULK)
        for id in (4, 5, 6):
            waiting.ask(id, 5)
        assert await waiting.go() == [[4, 5], [6, 1], [2, 3]]


async def test_bulk_does_not_overtake_an_online_request_that_does_not_fit() -> None:
    """A batch is rather left with room than filled past whoever waits online."""
    async with queue(max_batch_tokens=10) as waiting:
        waiting.ask(1, 2, Lane.BULK)
        waiting.ask(2, 6)
        waiting.ask(3, 6)
        assert await waiting.go() == [[2], [3, 1]]


async def test_what_nobody_waits_for_never_reaches_the_model() -> None:
    """Expired requests are told so, cancelled ones are dropped, and their neighbours are served."""
    async with queue() as waiting:
        late = waiting.ask(1, deadline=time.monotonic() - 1)
        given_up = waiting.ask(2)
        good = waiting.ask(3, deadline=time.monotonic() + 3600)
        await asyncio.sleep(0)
        given_up.cancel()
        assert await waiting.go() == [[3]]
        with pytest.raises(Expired):
            await late
        assert given_up.cancelled()
        assert (await good).scores[0].unsafe == 3


async def test_a_caller_that_gives_up_in_mid_pass_leaves_its_neighbours_alone() -> None:
    """The pass ends as it would have, and what comes next is served."""
    async with queue() as waiting:
        waiting.first.cancel()
        after = waiting.ask(1)
        assert await waiting.go() == [[1]]
        assert (await after).scores[0].unsafe == 1


async def test_a_queue_of_expired_requests_leaves_the_batcher_at_work() -> None:
    """Where nothing is left to run, the next request is served all the same."""
    async with queue() as waiting:
        late = waiting.ask(1, deadline=time.monotonic() - 1)
        await asyncio.sleep(0)
        waiting.model.gate.set()
        with pytest.raises(Expired):
            await late
        assert (await waiting.ask(2)).scores[0].unsafe == 2
        assert waiting.model.batches == [[0], [2]]


async def test_online_requests_are_refused_once_the_queue_is_too_long() -> None:
    """At 10 tokens a second 20 tokens are 2 seconds, which is allowed; 30 are not, and the hint says 3 seconds."""
    async with queue(max_queue_seconds=2, rate=10) as waiting:
        asked = [waiting.ask(id, 10) for id in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await waiting.ask(4)
        assert refused.value.retry_after == 3
        with pytest.raises(Overloaded):
            waiting.batcher.admit(Lane.INTERACTIVE)
        waiting.batcher.admit(Lane.BULK)
        assert await waiting.go() == [[1, 2, 3]]
        await asyncio.gather(*asked)


async def test_bulk_waits_at_the_limit_and_is_served_in_turn() -> None:
    """Nothing of it is refused, online requests still pass it, and all of it is answered, in order of arrival."""
    async with queue(max_batch_tokens=10, max_queue_seconds=2, rate=10) as waiting:
        bulk = [waiting.ask(id, 10, Lane.BULK) for id in range(1, 9)]
        await asyncio.sleep(0)
        assert waiting.queued_tokens == 30
        online = waiting.ask(9, 10)
        assert await waiting.go() == [[9], *([id] for id in range(1, 9))]
        assert [(await each).scores[0].unsafe for each in bulk] == [10 * id for id in range(1, 9)]
        assert (await online).scores[0].unsafe == 90


async def test_a_failing_model_is_an_answer_to_every_caller_of_the_batch() -> None:
    """Each of them gets ModelFailed with the cause, and the next batch is served."""
    async with queue(max_batch_tokens=10) as waiting:
        failed = [waiting.first, waiting.ask(1, 5), waiting.ask(2, 5)]
        after = waiting.ask(3)
        waiting.model.failures += [ValueError("second"), ValueError("first")]
        assert await waiting.go() == [[1, 2], [3]]
        for caller, cause in zip(failed, ["first", "second", "second"], strict=True):
            with pytest.raises(ModelFailed) as raised:
                await caller
            assert str(raised.value.__cause__) == cause
        assert (await after).scores[0].unsafe == 3


async def test_scores_that_are_missing_leave_nobody_waiting() -> None:
    """A model that answers for fewer sequences than it was asked about has failed."""

    def forgetful(batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        return []

    telemetry = Telemetry.start("critical")
    with ThreadPoolExecutor(1) as thread:
        batcher = Batcher(forgetful, thread, max_batch_tokens=10, max_queue_seconds=1, rate=1, telemetry=telemetry)
        with pytest.raises(ModelFailed):
            await batcher.score([tokens_of([1])], Lane.INTERACTIVE, None)


@pytest.mark.parametrize("lane", Lane)
async def test_a_drain_finishes_what_is_queued_and_refuses_what_is_new(lane: Lane) -> None:
    """It returns once the last one that was let in has its answer."""
    async with queue(max_batch_tokens=10) as waiting:
        asked = [waiting.ask(id, 10, lane) for id in (1, 2, 3)]
        await asyncio.sleep(0)
        drained = asyncio.create_task(waiting.batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await waiting.ask(4, lane=lane)
        with pytest.raises(Draining):
            waiting.batcher.admit(lane)
        assert not drained.done()
        waiting.model.gate.set()
        await drained
        assert waiting.model.batches == [[0], [1], [2], [3]]
        await asyncio.gather(*asked)


arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, 999), min_size=1, max_size=30),  # ids
        st.sampled_from(Lane),
        st.integers(0, 3),  # turns of the event loop before it arrives
        st.booleans(),  # whether its caller gives up at once
    ),
    max_size=20,
)


@given(arrivals, st.integers(1, 60))
def test_every_caller_gets_its_own_scores(asked: list[tuple[list[int], Lane, int, bool]], budget: int) -> None:
    """Whoever asks, when and for how much, and whoever else gives up: the scores are those of the turns asked about."""

    async def serve() -> None:
        async with queue(max_batch_tokens=budget) as waiting:
            waiting.model.gate.set()
            tasks = []
            for ids, lane, pause, gives_up in asked:
                half = len(ids) // 2
                windows = [tokens_of(part, ends=range(1, len(part) + 1)) for part in (ids[:half], ids[half:]) if part]
                task = asyncio.create_task(waiting.batcher.score(windows, lane, None))
                for _ in range(pause):
                    await asyncio.sleep(0)
                if gives_up:
                    task.cancel()
                tasks.append(task)
            for (ids, _, _, gives_up), task in zip(asked, tasks, strict=True):
                await asyncio.wait([task])
                if not task.cancelled():
                    assert [each.unsafe for each in task.result().scores] == [
                        score for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]) for score in accumulate(part)
                    ]
                else:
                    assert gives_up

    asyncio.run(serve())
