"""The Moderation service: convert, ask the engine, convert back."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from guard.errors import InputError
from guard.service import convert
from guard.service.access import caller
from guard.service.decisions import Decisions
from guard.service.rollout import Rollout
from guard.service.status import reason_of, to_item_error
from guard.service.stream import Stream
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Decision, Lane
from guard.v1 import moderation_pb2 as pb
from guard.v1.moderation_pb2_grpc import ModerationServicer

_Context = grpc.aio.ServicerContext[Any, Any]
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Moderation(ModerationServicer):
    """Answers with Loading until the roll-out is started."""

    def __init__(self, settings: Settings, telemetry: Telemetry, rollout: Rollout, decisions: Decisions) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._rollout = rollout
        self._decisions = decisions

    async def Check(self, request: pb.CheckRequest, context: _Context) -> pb.CheckResponse:
        return await self._check(request, Lane.INTERACTIVE, _deadline(context))

    async def CheckConversation(
        self, request: pb.CheckConversationRequest, context: _Context
    ) -> pb.CheckConversationResponse:
        return await self._check_conversation(request, Lane.INTERACTIVE, _deadline(context))

    async def CheckMany(
        self, request_iterator: AsyncIterator[pb.CheckManyRequest], context: _Context
    ) -> AsyncIterator[pb.CheckManyResponse]:
        deadline = _deadline(context)
        in_flight: set[str] = set()

        async def answer(item: pb.CheckManyRequest) -> pb.CheckManyResponse:
            if item.id in in_flight:
                return self._item_error(item.id, InputError("id", "is in flight already"))
            in_flight.add(item.id)
            try:
                if not item.HasField("conversation"):
                    checked = await self._check(item.request, Lane.BULK, deadline)
                    return pb.CheckManyResponse(id=item.id, response=checked)
                if item.HasField("request"):
                    raise InputError("conversation", "and a request are too much; one of them is wanted")
                judged = await self._check_conversation(item.conversation, Lane.BULK, deadline)
                return pb.CheckManyResponse(id=item.id, conversation=judged)
            except Exception as error:
                return self._item_error(item.id, error)
            finally:
                in_flight.remove(item.id)

        answers = as_finished(request_iterator, answer, self._settings.max_in_flight)
        async with aclosing(answers):
            async for response in answers:
                yield response

    async def CheckStream(
        self, request_iterator: AsyncIterator[pb.CheckStreamRequest], context: _Context
    ) -> AsyncIterator[pb.CheckStreamResponse]:
        first = await anext(request_iterator, None)
        if first is None:
            return
        if not first.HasField("open"):
            raise InputError("open", "comes first")
        stream = Stream(first.open, self._rollout, self._settings, self._telemetry, caller.get(), self._decisions.tell)
        with self._telemetry.metrics.streams.track_inprogress():
            async with aclosing(stream.answers(request_iterator)) as answers:
                async for answer in answers:
                    yield answer

    async def GetModel(self, request: pb.GetModelRequest, context: _Context) -> pb.GetModelResponse:
        return convert.from_model(self._rollout.judge.model)

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: _Context) -> pb.ListPoliciesResponse:
        return convert.from_policies(self._rollout.policies)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: _Context) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=convert.from_policy(self._rollout.policies.get(request.name)))

    async def _check(self, request: pb.CheckRequest, lane: Lane, deadline: float | None) -> pb.CheckResponse:
        return convert.from_decision(await self._decide(request, lane, deadline), request.score_detail)

    async def _check_conversation(
        self, request: pb.CheckConversationRequest, lane: Lane, deadline: float | None
    ) -> pb.CheckConversationResponse:
        return convert.from_conversation_decision(await self._decide(request, lane, deadline), request.score_detail)

    async def _decide(
        self, request: pb.CheckRequest | pb.CheckConversationRequest, lane: Lane, deadline: float | None
    ) -> Decision:
        return await self._decisions.decide(
            convert.to_conversation(request, self._settings.max_turns),
            policy=request.policy,
            lane=lane,
            deadline=deadline,
            metadata=request.metadata,
            conversation_id=request.conversation_id,
        )

    def _item_error(self, id: str, error: Exception) -> pb.CheckManyResponse:
        self._telemetry.metrics.refusals.labels(reason_of(error)).inc()
        return pb.CheckManyResponse(id=id, error=to_item_error(error))


def _deadline(context: _Context) -> float | None:
    """When the client stops waiting, by time.monotonic()."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def as_finished(
    items: AsyncIterator[_Item], answer: Callable[[_Item], Awaitable[_Answer]], limit: int
) -> AsyncGenerator[_Answer, None]:
    """Answers in the order they finish, of at most `limit` items that are read and whose answer is not yet taken.

    So a slow taker stops the reading. An error of the reading is raised once all that was read is answered.
    """
    room = asyncio.Semaphore(limit)
    finished: asyncio.Queue[_Answer | None] = asyncio.Queue()
    running: set[asyncio.Task[None]] = set()

    async def run(item: _Item) -> None:
        finished.put_nowait(await answer(item))

    async def read() -> None:
        try:
            await room.acquire()
            async for item in items:
                task = asyncio.create_task(run(item))
                running.add(task)
                task.add_done_callback(running.discard)
                await room.acquire()
        finally:
            await asyncio.gather(*running)

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: finished.put_nowait(None))
    try:
        while (done := await finished.get()) is not None:
            yield done
            room.release()
        await reader
    finally:
        for task in (reader, *running):
            task.cancel()
        await asyncio.gather(reader, *running, return_exceptions=True)
