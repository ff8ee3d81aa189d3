"""Clients of a Guard server: asynchronous, and a synchronous twin; and one for its operators.

    async with Client("localhost:50051") as guard:
        answer = await guard.check([("user", "Hello!")])

Answers are messages of guard.v1. Errors are those of guard.errors, each with its grpc.RpcError as the cause:
InputError, NotFound, Unauthenticated, Overloaded (which says when to come back), Expired, and Unanswered for whatever
else leaves a request without an answer, such as a server that cannot be reached.
"""

import asyncio
import codecs
import json
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from guard.errors import (
    Cut,
    Expired,
    GuardError,
    InputError,
    NotFound,
    Overloaded,
    PolicyError,
    Unanswered,
    Unauthenticated,
)
from guard.v1 import admin_pb2 as admin_pb
from guard.v1 import moderation_pb2 as pb
from guard.v1.admin_pb2_grpc import AdminStub
from guard.v1.moderation_pb2_grpc import ModerationStub

if TYPE_CHECKING:  # there in the types alone
    from guard.v1.moderation_pb2_grpc import ModerationAsyncStub

TurnLike = pb.Turn | tuple[str, str]
"""A turn, or its role ("user", "agent", "system" or "tool") and text."""

_Item = TypeVar("_Item")
_Sent = TypeVar("_Sent")
_Got = TypeVar("_Got")
_Request = TypeVar("_Request", pb.CheckRequest, pb.CheckConversationRequest)

_ROLES = {"user": pb.ROLE_USER, "agent": pb.ROLE_AGENT, "system": pb.ROLE_SYSTEM, "tool": pb.ROLE_TOOL}
_MODES: Mapping[str, pb.StreamMode.ValueType] = {
    "hold": pb.STREAM_MODE_HOLD,
    "lag": pb.STREAM_MODE_LAG,
    "monitor": pb.STREAM_MODE_MONITOR,
}
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],  # over all that a name stands for, not the first alone
    "methodConfig": [
        {
            "name": [{"service": "guard.v1.Moderation"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}


@dataclass(frozen=True, slots=True)
class Tls:
    """In PEM: whom to trust instead of the system's authorities, and for mutual TLS one's own certificate and key."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None


class ConversationOptions(TypedDict, total=False):
    """Fields of a CheckConversationRequest beside its turns."""

    policy: str
    conversation_id: str
    metadata: Mapping[str, str]
    score_detail: pb.ScoreDetail.ValueType


class CheckOptions(ConversationOptions, total=False):
    """Fields of a CheckRequest beside its turns."""

    target: int


def check_request(turns: Iterable[TurnLike] | pb.CheckRequest, **options: Unpack[CheckOptions]) -> pb.CheckRequest:
    """Asks about the turn at `target`, by default the last. Raises InputError for a role that there is not."""
    request = pb.CheckRequest(**options)
    if isinstance(turns, pb.CheckRequest):
        return _merged(turns, request)
    request.turns.extend(map(_turn, turns))
    return request


def conversation_request(
    turns: Iterable[TurnLike] | pb.CheckConversationRequest, **options: Unpack[ConversationOptions]
) -> pb.CheckConversationRequest:
    """Asks about every turn. Raises InputError for a role that there is not."""
    request = pb.CheckConversationRequest(**options)
    if isinstance(turns, pb.CheckConversationRequest):
        return _merged(turns, request)
    request.turns.extend(map(_turn, turns))
    return request


class StreamOptions(TypedDict, total=False):
    """Fields of a StreamOpen beside its turns.

    `role` is that of who speaks, by default "agent". `mode` is what is shown: "hold", what a verdict covers, the
    default; "lag", what is not too far ahead of the verdicts; "monitor", all.
    """

    role: str
    policy: str
    conversation_id: str
    metadata: Mapping[str, str]
    mode: str
    lag_characters: int
    lag_ms: int


def stream_opening(conversation: Iterable[TurnLike], **options: Unpack[StreamOptions]) -> pb.StreamOpen:
    """Begins a stream after what was said before. Raises InputError for a role or a mode that there is not."""
    mode = options.get("mode", "hold")
    if mode not in _MODES:
        raise InputError("mode", f"should be one of {', '.join(_MODES)}")
    return pb.StreamOpen(
        turns=map(_turn, conversation),
        role=_turn((options.get("role", "agent"), "")).role,
        policy=options.get("policy", ""),
        conversation_id=options.get("conversation_id", ""),
        metadata=options.get("metadata", {}),
        mode=_MODES[mode],
        lag_characters=options.get("lag_characters"),
        lag_ms=options.get("lag_ms"),
    )


class Client:
    """Calls a server at HOST:PORT from within an event loop.

    `timeout` is in seconds and for each call, streams aside. Calls that are refused for now, or find no server, are
    tried again up to three times within it, unless `retries` is off.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 10.0,
        retries: bool = True,
    ) -> None:
        self._channel: grpc.aio.Channel = _open(grpc.aio, target, tls, retries)
        self._stub: ModerationAsyncStub = ModerationStub(self._channel)
        self._metadata = _metadata(token)
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def check(
        self, turns: Iterable[TurnLike] | pb.CheckRequest, **options: Unpack[CheckOptions]
    ) -> pb.CheckResponse:
        """A verdict on the last turn, or the one at `target`."""
        with _translated():
            return await self._stub.Check(
                check_request(turns, **options), timeout=self._timeout, metadata=self._metadata
            )

    async def check_conversation(
        self, turns: Iterable[TurnLike] | pb.CheckConversationRequest, **options: Unpack[ConversationOptions]
    ) -> pb.CheckConversationResponse:
        """A verdict on every turn."""
        with _translated():
            return await self._stub.CheckConversation(
                conversation_request(turns, **options), timeout=self._timeout, metadata=self._metadata
            )

    async def check_many(
        self, requests: AsyncIterable[pb.CheckManyRequest] | Iterable[pb.CheckManyRequest]
    ) -> AsyncGenerator[pb.CheckManyResponse, None]:
        """Answers in the order they finish; thousands may be in flight, and the server paces the taking of `requests`.

        A request that gets no answer gets an `error`. Where the stream breaks off, as it does when the server stops,
        so does every request that was taken and not answered; then the cause is raised, and no more are taken. What
        `requests` raises is raised here, once those before it are answered.
        """
        asked = _Asked()
        call = self._stub.CheckMany(metadata=self._metadata)

        async def taken() -> AsyncIterator[pb.CheckManyRequest]:
            with asked.taking():
                async for request in _each(requests):
                    asked.add(request.id)
                    yield request

        async def send() -> None:
            async for request in taken():
                await call.write(request)
            await call.done_writing()

        sending = asyncio.create_task(send())
        try:
            async for response in call:
                asked.remove(response.id)
                yield response
        except grpc.RpcError as error:
            for response in asked.broken_off(error):
                yield response
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)  # a write fails as the stream does, which is told
        if asked.failure is not None:
            raise asked.failure

    async def filter(
        self,
        stream: AsyncIterable[str] | Iterable[str],
        conversation: Iterable[TurnLike] = (),
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[str, None]:
        """Of a text that comes in pieces, as a chat backend gives them, what may be shown, as soon as it may.

        `conversation` is what was said before. Where the text is cut, the policy's reply is the last piece, if it has
        one for that; otherwise Cut is raised. What `stream` raises is raised here, once what came before is judged.
        The stream is taken no faster than it is judged.
        """
        shown = _Shown()
        opened = pb.CheckStreamRequest(open=stream_opening(conversation, **options))
        call = self._stub.CheckStream(metadata=self._metadata)

        async def send() -> None:
            await call.write(opened)
            try:
                async for piece in _each(stream):
                    await call.write(shown.taken(piece))
            except grpc.RpcError:
                raise
            except Exception as error:
                shown.failure = error
            await call.write(_END)
            await call.done_writing()

        sending = asyncio.create_task(send())
        try:
            async for response in call:
                for piece in shown.pieces(response):
                    yield piece
        except grpc.RpcError as error:
            raise _error(error) from error
        finally:
            call.cancel()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)  # a write fails as the stream does, which is told
        if shown.failure is not None:
            raise shown.failure

    async def model(self) -> pb.GetModelResponse:
        with _translated():
            return await self._stub.GetModel(pb.GetModelRequest(), timeout=self._timeout, metadata=self._metadata)

    async def policies(self) -> pb.ListPoliciesResponse:
        with _translated():
            return await self._stub.ListPolicies(
                pb.ListPoliciesRequest(), timeout=self._timeout, metadata=self._metadata
            )

    async def policy(self, name: str = "") -> pb.Policy:
        """The policy of that name, or the default one."""
        with _translated():
            return (
                await self._stub.GetPolicy(
                    pb.GetPolicyRequest(name=name), timeout=self._timeout, metadata=self._metadata
                )
            ).policy

    async def serving(self) -> bool:
        """Whether the server says that it is ready to judge; it is not while it loads and while it drains."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class _Sync:
    """A connection for code without an event loop; may be shared by threads."""

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout: float | None = 10.0,
        retries: bool = True,
    ) -> None:
        self._channel: grpc.Channel = _open(grpc, target, tls, retries)
        self._metadata = _metadata(token)
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()


class SyncClient(_Sync):
    """The same as Client, for code without an event loop; may be shared by threads."""

    @cached_property
    def _stub(self) -> ModerationStub:
        return ModerationStub(self._channel)

    def check(self, turns: Iterable[TurnLike] | pb.CheckRequest, **options: Unpack[CheckOptions]) -> pb.CheckResponse:
        with _translated():
            return self._stub.Check(check_request(turns, **options), timeout=self._timeout, metadata=self._metadata)

    def check_conversation(
        self, turns: Iterable[TurnLike] | pb.CheckConversationRequest, **options: Unpack[ConversationOptions]
    ) -> pb.CheckConversationResponse:
        with _translated():
            request = conversation_request(turns, **options)
            return self._stub.CheckConversation(request, timeout=self._timeout, metadata=self._metadata)

    def check_many(self, requests: Iterable[pb.CheckManyRequest]) -> Generator[pb.CheckManyResponse, None, None]:
        """As Client.check_many; `requests` is run through on a thread of gRPC's.

        Where that thread waits for a request as the stream breaks off, that one is still taken, and goes unanswered.
        """
        asked = _Asked()

        def taken() -> Iterator[pb.CheckManyRequest]:
            with asked.taking():
                for request in requests:
                    if not asked.add(request.id):
                        return
                    yield request

        call = self._stub.CheckMany(taken(), metadata=self._metadata)
        try:
            for response in call:
                asked.remove(response.id)
                yield response
        except grpc.RpcError as error:
            for response in asked.broken_off(error):
                yield response
        finally:
            call.cancel()
        if asked.failure is not None:
            raise asked.failure

    def filter(
        self, stream: Iterable[str], conversation: Iterable[TurnLike] = (), **options: Unpack[StreamOptions]
    ) -> Generator[str, None, None]:
        """As Client.filter; `stream` is run through on a thread of gRPC's."""
        shown = _Shown()
        opened = pb.CheckStreamRequest(open=stream_opening(conversation, **options))

        def requests() -> Iterator[pb.CheckStreamRequest]:
            yield opened
            try:
                yield from map(shown.taken, stream)
            except Exception as error:
                shown.failure = error
            yield _END

        call = self._stub.CheckStream(requests(), metadata=self._metadata)
        try:
            for response in call:
                yield from shown.pieces(response)
        except grpc.RpcError as error:
            raise _error(error) from error
        finally:
            call.cancel()
        if shown.failure is not None:
            raise shown.failure

    def model(self) -> pb.GetModelResponse:
        with _translated():
            return self._stub.GetModel(pb.GetModelRequest(), timeout=self._timeout, metadata=self._metadata)

    def policies(self) -> pb.ListPoliciesResponse:
        with _translated():
            return self._stub.ListPolicies(pb.ListPoliciesRequest(), timeout=self._timeout, metadata=self._metadata)

    def policy(self, name: str = "") -> pb.Policy:
        with _translated():
            request = pb.GetPolicyRequest(name=name)
            return self._stub.GetPolicy(request, timeout=self._timeout, metadata=self._metadata).policy

    def serving(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        with _translated():
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=self._timeout)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class AdminClient(_Sync):
    """Rolls policies out on a server; asks for a token of the server's `admin_tokens_file`.

    An empty name is that of the default policy; an empty `revision` is whichever candidate is there.
    """

    def stage(
        self,
        policy: str,
        text: str,
        includes: Mapping[str, str] = MappingProxyType({}),
        *,
        percent: float = 0.0,
        ttl_seconds: int = 0,
    ) -> admin_pb.Rollout:
        """Puts a candidate beside the live revision; `includes` are the files that it names, 0 seconds are a day.

        Raises PolicyError with a line for each problem, and InputError where the two cannot stand together.
        """
        request = admin_pb.StageRequest(
            policy=policy, text=text, includes=includes, percent=percent, ttl_seconds=ttl_seconds
        )
        return self._call(self._stub.Stage, request).rollout

    def promote(self, policy: str = "", revision: str = "") -> admin_pb.Rollout:
        request = admin_pb.PromoteRequest(policy=policy, revision=revision)
        return self._call(self._stub.Promote, request).rollout

    def withdraw(self, policy: str = "", revision: str = "") -> admin_pb.Rollout:
        request = admin_pb.WithdrawRequest(policy=policy, revision=revision)
        return self._call(self._stub.Withdraw, request).rollout

    def rollback(self, policy: str = "") -> admin_pb.Rollout:
        return self._call(self._stub.Rollback, admin_pb.RollbackRequest(policy=policy)).rollout

    def rollouts(self) -> admin_pb.ListRolloutsResponse:
        return self._call(self._stub.ListRollouts, admin_pb.ListRolloutsRequest())

    @cached_property
    def _stub(self) -> AdminStub:
        return AdminStub(self._channel)

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[_Sent, _Got]", request: _Sent) -> _Got:
        with _translated():
            return method(request, timeout=self._timeout, metadata=self._metadata)


_END = pb.CheckStreamRequest(end=pb.StreamEnd())


class _Shown:
    """A text that is taken piece by piece, on one thread perhaps, and shown on another as far as it may be."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._text = ""
        self._shown = 0
        self._whole = codecs.getincrementaldecoder("utf-16-le")()

    def taken(self, piece: str) -> pb.CheckStreamRequest:
        """Halves of a character, as backends cut that count as UTF-16 does, wait for each other."""
        piece = self._whole.decode(piece.encode("utf-16-le", "surrogatepass"))
        self._text += piece
        return pb.CheckStreamRequest(delta=piece.encode())

    def pieces(self, response: pb.CheckStreamResponse) -> Iterator[str]:
        """What may be shown now; raises Cut where that is all, and there is no reply."""
        if response.release > self._shown:
            piece, self._shown = self._text[self._shown : response.release], response.release
            yield piece
        if response.HasField("cut"):
            if not response.verdict.HasField("reply"):
                raise Cut(response.cut.offset, self._shown, response.verdict)
            yield response.verdict.reply.text


class _Asked:
    """The requests of one stream that have no answer yet; they are taken on one thread and answered on another."""

    def __init__(self) -> None:
        self.all_taken = False
        self.failure: Exception | None = None
        self._ids: Counter[str] = Counter()
        self._is_closed = False
        self._lock = Lock()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Around the taking of all requests; keeps what that raises as `failure`."""
        try:
            yield
            self.all_taken = True
        except Exception as error:
            self.failure = error

    def add(self, id: str) -> bool:
        """False where the stream is over, and the request is not to be sent."""
        with self._lock:
            if not self._is_closed:
                self._ids[id] += 1
            return not self._is_closed

    def remove(self, id: str) -> None:
        with self._lock:
            self._ids[id] -= 1
            if not self._ids[id]:
                del self._ids[id]

    def broken_off(self, error: grpc.RpcError) -> Iterator[pb.CheckManyResponse]:
        """An answer that says so to each request that has none, and will have none; then the error, if it cost any."""
        with self._lock:
            self._is_closed = True
            unanswered = list(self._ids.elements())
        for id in unanswered:
            yield pb.CheckManyResponse(id=id, error=_item_error(error))
        if unanswered or not self.all_taken:
            raise _error(error) from error


def _open(api: Any, target: str, tls: Tls | None, retries: bool) -> Any:
    """A channel of grpc, or of grpc.aio."""
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_retries", int(retries)),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]
    if tls is None:
        return api.insecure_channel(target, options=options)
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return api.secure_channel(target, credentials, options=options)


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _turn(turn: TurnLike) -> pb.Turn:
    if isinstance(turn, pb.Turn):
        return turn
    role, text = turn
    if role not in _ROLES:
        raise InputError("role", f"should be one of {', '.join(_ROLES)}")
    return pb.Turn(role=_ROLES[role], text=text)


def _merged(given: _Request, options: _Request) -> _Request:
    request = type(given)()
    request.CopyFrom(given)
    request.MergeFrom(options)
    return request


async def _each(items: AsyncIterable[_Item] | Iterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _error(error) from error


def _item_error(error: Any) -> pb.Error:
    """The same for one request of a stream; `error` is the grpc.RpcError that ended it."""
    kind = _error(error)
    retry_after_ms = math.ceil(kind.retry_after * 1000) if isinstance(kind, Overloaded) else 0
    return pb.Error(code=error.code().value[0], message=error.details(), retry_after_ms=retry_after_ms)


def _error(error: Any) -> GuardError:
    """`error` is a grpc.RpcError that ended a call, and thus a call too."""
    code, message = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        hint, problems = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(hint):
            return Overloaded(hint.retry_delay.ToMilliseconds() / 1000, message)
        if detail.Unpack(problems):
            problem = problems.field_violations[0]
            kind = NotFound if code is grpc.StatusCode.NOT_FOUND else InputError
            return kind(problem.field, problem.description)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Expired()
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated()
    if code is grpc.StatusCode.INVALID_ARGUMENT:  # all that names no field
        return PolicyError(message)
    return Unanswered(f"{code.name}: {message}")
