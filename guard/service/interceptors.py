"""Around every call: who makes it, may they, what became of it; so that servicers need only do their work."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from guard.errors import Draining, InputError, RateLimited
from guard.service.access import RateLimit, Tokens, caller
from guard.service.calls import Call, Gate, before, settle
from guard.service.status import code_of, reason_of, retry_after_ms, to_status
from guard.telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic in the types alone

# Probes carry no token, and must not use up anyone's rate.
_OPEN = "/grpc.health.v1.Health/"
_ADMIN = "guard.v1.Admin/"
_EXCHANGE = "envoy.service.ext_proc.v3.ExternalProcessor/Process"
_ONE_REQUEST = {"guard.v1.Moderation/CheckStream", _EXCHANGE}  # streams whose messages are parts of one

# Of a call's line in the log; INFO for every other end.
_LEVELS = {grpc.StatusCode.OK: logging.DEBUG, grpc.StatusCode.INTERNAL: logging.ERROR}

_Context = grpc.aio.ServicerContext[Any, Any]
_Decode = Callable[[bytes], Message]


class Calls(grpc.aio.ServerInterceptor):
    """Identifies and limits callers, turns errors into statuses, and counts, logs and traces every call.

    Health is open to all; everything else, reflection included, asks for a token where there are `tokens`. A call of a
    client beyond its rate is refused; the requests of a stream beyond it wait. During a drain what is new is refused,
    and a stream ends once what was read of it is answered, a proxy's once its exchange is over. Calls of the admin
    service ask for a token of its own.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        gate: Gate,
        tokens: Tokens | None = None,
        limit: RateLimit | None = None,
        admin_tokens: Tokens | None = None,
    ) -> None:
        self._telemetry = telemetry
        self._gate = gate
        self._tokens = tokens
        self._admin_tokens = admin_tokens
        self._limit = limit
        self._handlers: dict[str, _Handler] = {}
        self._drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end_watches(self) -> None:
        """Ends the streams of health, which have told of the drain and have no more to tell."""
        settle(self._drained)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # gRPC answers with UNIMPLEMENTED
                return None
            self._handlers[method] = self._wrap(method, handler)
        return self._handlers[method]

    def _wrap(self, method: str, handler: Any) -> "_Handler":
        """The same handler on messages still encoded: gRPC itself would call garbage a fault of the server."""
        decode = _decoder(handler)

        async def unary_unary(raw: bytes, context: _Context) -> Message:
            async with self._call(method, context) as call:
                self._charge(call)
                response: Message = await handler.unary_unary(decode(raw), context)
                call.decision_id = getattr(response, "decision_id", None)
                return response

        async def unary_stream(raw: bytes, context: _Context) -> None:
            async with self._call(method, context):
                await before(self._drained, handler.unary_stream(decode(raw), context))

        async def stream_stream(raws: AsyncIterator[bytes], context: _Context) -> None:
            async with self._call(method, context) as call:
                requests = self._paced(call, raws, decode)
                async with aclosing(handler.stream_stream(requests, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream_stream, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary_stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary_unary, None, handler.response_serializer)

    @asynccontextmanager
    async def _call(self, method: str, context: _Context) -> AsyncIterator[Call]:
        """From the start of a call to its end, whatever the end is."""
        start = time.perf_counter()
        guarded = not method.startswith(_OPEN)
        call, code, failure = Call(method.removeprefix("/")), grpc.StatusCode.OK, None
        try:
            with self._gate.running() if guarded else nullcontext(), self._span(call, context) as span:
                try:
                    if guarded:
                        call.client = self._identify(call, context)
                        caller.set(call.client)
                        if self._gate.is_closed:
                            raise Draining
                    yield call
                except grpc.aio.AbortError:  # by a servicer of the library's
                    code = context.code()
                    raise
                except asyncio.CancelledError:  # by the client, its deadline, or as the server stops
                    code = grpc.StatusCode.CANCELLED
                    raise
                except Exception as error:
                    code, failure = code_of(error), error
                    await self._refuse(error, context)
                finally:
                    if span is not None:
                        span.set_attribute("rpc.grpc.status_code", code.value[0])
        finally:
            fault = failure if code is grpc.StatusCode.INTERNAL else None
            call.ended(self._telemetry, code.name, time.perf_counter() - start, _level(call.method, code), fault)

    def _span(self, call: Call, context: _Context) -> "AbstractContextManager[Span | None]":
        tracing = self._telemetry.tracing
        if tracing is None:
            return nullcontext()
        return tracing.span(call.method, _headers(context), {"rpc.system": "grpc"})

    def _identify(self, call: Call, context: _Context) -> str:
        """The name of the caller's token or else of its certificate, or else its address."""
        tokens = self._admin_tokens if call.method.startswith(_ADMIN) else self._tokens
        if tokens is not None:
            scheme, _, token = _headers(context).get("authorization", "").partition(" ")
            return tokens.name_of(token if scheme.lower() == "bearer" else "")
        for name in context.auth_context().get("x509_common_name", ()):
            return name.decode()
        return unquote(context.peer()).rpartition(":")[0]

    def _charge(self, call: Call) -> None:
        if call.client and self._limit is not None and (wait := self._limit.take(call.client)):
            raise RateLimited(wait)

    async def _paced(self, call: Call, raws: AsyncIterator[bytes], decode: _Decode) -> AsyncIterator[Message]:
        messages = aiter(raws)
        until = self._drained if call.method == _EXCHANGE else self._gate.closed
        while (raw := await before(until, self._next(call, messages))) is not None:
            yield decode(raw)

    async def _next(self, call: Call, messages: AsyncIterator[bytes]) -> bytes | None:
        """The next message, as soon as the client's rate has room for it; None at the end of the stream."""
        raw = await anext(messages, None)
        if raw is not None and self._limit is not None and not (call.charged and call.method in _ONE_REQUEST):
            call.charged = True
            while wait := self._limit.take(call.client):  # noqa: ASYNC110 # time is what is waited for
                await asyncio.sleep(wait)
        return raw

    async def _refuse(self, error: Exception, context: _Context) -> NoReturn:
        self._telemetry.metrics.refusals.labels(reason_of(error)).inc()
        status = rpc_status.to_status(to_status(error))
        metadata = list(status.trailing_metadata)
        if pushback := retry_after_ms(error):
            metadata.append(("grpc-retry-pushback-ms", str(pushback)))
        await context.abort(status.code, status.details, tuple(metadata))


def _level(method: str, code: grpc.StatusCode) -> int:
    if method.startswith(_ADMIN):  # who changes what is in force is always told
        return logging.INFO
    if method == _EXCHANGE and code is grpc.StatusCode.CANCELLED:  # as a proxy ends most calls
        return logging.DEBUG
    return _LEVELS.get(code, logging.INFO)


def _decoder(handler: Any) -> _Decode:
    deserialize: _Decode = handler.request_deserializer

    def decode(raw: bytes) -> Message:
        try:
            return deserialize(raw)
        except DecodeError:
            raise InputError("request", "is not a message of this method's type") from None

    return decode


def _headers(context: _Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
