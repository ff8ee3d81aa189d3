"""Around every request of an API: who makes it, may they, what became of it; endpoints need only do their work."""

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import AbstractContextManager, nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from guard.errors import Draining, RateLimited, Unauthenticated
from guard.service.access import RateLimit, Tokens, caller
from guard.service.calls import Call, Gate, before
from guard.service.decisions import Decisions
from guard.service.http.endpoint import Asked, Endpoint
from guard.service.http.forms import write
from guard.service.http.status import TooLarge, headers_of, status_of
from guard.service.rollout import Rollout
from guard.settings import Settings
from guard.telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_KEY = "x-api-key"  # where LiteLLM puts the token
_CLOSED = 499  # of a client that has gone; nginx's number, as HTTP has none
_LEVELS: dict[int, int] = {HTTPStatus.OK: logging.DEBUG, HTTPStatus.INTERNAL_SERVER_ERROR: logging.ERROR}
_Result = TypeVar("_Result")


class Exchange:
    """Identifies and limits callers as gRPC's do, turns errors into answers, and counts, logs and traces every request.

    During a drain what is new is refused, and so is what has not come whole.
    """

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        gate: Gate,
        tokens: Tokens | None,
        limit: RateLimit | None,
        rollout: Rollout,
        decisions: Decisions,
    ) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._gate = gate
        self._tokens = tokens
        self._limit = limit
        self._rollout = rollout
        self._decisions = decisions

    async def serve(self, endpoint: Endpoint, request: Request) -> Response:
        """The answer to a request, whatever becomes of it."""
        start = time.perf_counter()
        call = Call(f"{endpoint.method} {endpoint.path}")
        status, failure = int(HTTPStatus.OK), None
        with self._span(call, request) as span:
            try:
                body = await self._answer(endpoint, request, call)
                return Response(body, media_type="application/json")
            except ClientDisconnect:
                status = _CLOSED
                return Response(status_code=status)
            except (Exception, asyncio.CancelledError) as error:  # cancelled as the server stops
                failure = Draining() if isinstance(error, asyncio.CancelledError) else error
                status = endpoint.errors.status(failure)
                return self._refuse(endpoint, failure, status)
            finally:
                if span is not None:
                    span.set_attribute("http.response.status_code", status)
                level = _LEVELS.get(status, logging.INFO)
                fault = failure if status == HTTPStatus.INTERNAL_SERVER_ERROR else None
                call.ended(self._telemetry, str(status), time.perf_counter() - start, level, fault)

    async def _answer(self, endpoint: Endpoint, request: Request, call: Call) -> bytes:
        call.client = self._identify(request)
        caller.set(call.client)
        if self._gate.is_closed:
            raise Draining
        if call.client and self._limit is not None and (wait := self._limit.take(call.client)):
            raise RateLimited(wait)
        raw = await before(self._gate.closed, self._read(request))
        asked = Asked(self._decisions, self._rollout, self._settings.max_turns, request.path_params, request.headers)
        with self._gate.running():
            answer = await _while_connected(request, endpoint.run(asked, endpoint.read(raw)))
        call.decision_id = asked.decided[0] if len(asked.decided) == 1 else None
        return write(answer)

    def _span(self, call: Call, request: Request) -> "AbstractContextManager[Span | None]":
        tracing = self._telemetry.tracing
        if tracing is None:
            return nullcontext()
        method, _, route = call.method.partition(" ")
        return tracing.span(call.method, request.headers, {"http.request.method": method, "http.route": route})

    def _identify(self, request: Request) -> str:
        """The name of the caller's token or else of its certificate, or else its address.

        Probes show no certificate, so that the handshake cannot ask for one; here it is asked for.
        """
        certificate: str | None = request.state.certificate
        if self._settings.tls_client_ca is not None and certificate is None:
            raise Unauthenticated("a client certificate is needed")
        if self._tokens is not None:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            shown = token.strip() if scheme.lower() == "bearer" else request.headers.get(_KEY, "")
            return self._tokens.name_of(shown)
        return certificate or _address(request)

    async def _read(self, request: Request) -> bytes:
        """The body; raises TooLarge as soon as that is known."""
        limit = self._settings.max_message_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise TooLarge(limit)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge(limit)
        return bytes(body)

    def _refuse(self, endpoint: Endpoint, error: Exception, status: int) -> Response:
        is_ours = status_of(error) is HTTPStatus.INTERNAL_SERVER_ERROR
        self._telemetry.metrics.refusals.labels("Internal" if is_ours else type(error).__name__).inc()
        body = write(endpoint.errors.write(error))
        return Response(body, status, headers_of(error), media_type="application/json")


def _address(request: Request) -> str:
    """As gRPC writes it, so that a client has one rate for both ports."""
    if request.client is None:
        return ""
    host = request.client.host
    return f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """What the work gives; it is given up with ClientDisconnect once the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for left in (task, gone):
            left.cancel()
        await asyncio.wait((task, gone))
