"""Puts the service together: listens at once, serves when the model is there, and drains before it stops."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from guard.errors import ConfigError
from guard.service.access import RateLimit, Tokens
from guard.service.admin import Admin
from guard.service.calls import Gate
from guard.service.capture import Capture
from guard.service.decision_log import DecisionLog
from guard.service.decisions import Decisions, Journal
from guard.service.ext_proc import SERVICE as _EXT_PROC
from guard.service.ext_proc import ExtProc
from guard.service.http.app import make_app
from guard.service.http.exchange import Exchange
from guard.service.http.listen import Listener
from guard.service.interceptors import Calls
from guard.service.judge import Judge
from guard.service.moderation import Moderation
from guard.service.rollout import Rollout
from guard.service.tls import Certificates
from guard.settings import Settings
from guard.telemetry import Telemetry, adopt_stdlib_logging
from guard.v1 import admin_pb2, moderation_pb2
from guard.v1.admin_pb2_grpc import add_AdminServicer_to_server
from guard.v1.envoy.ext_proc_pb2_grpc import add_ExternalProcessorServicer_to_server
from guard.v1.moderation_pb2_grpc import add_ModerationServicer_to_server

_SERVICE = moderation_pb2.DESCRIPTOR.services_by_name["Moderation"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 1.0  # seconds for answers that are given but still on their way


class Server:
    """The service on its two ports; an asynchronous context manager that is left with a drained server.

    `load` makes the engine, with the policies of the settings' directory; it blocks, and runs on a thread of its own.
    `clock` gives Unix seconds.
    """

    grpc_port: int
    http_port: int

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        load: Callable[[], Judge],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._log = telemetry.log
        self._load = load
        self._judge: Judge | None = None
        tokens = Tokens(settings.tokens_file, telemetry.log) if settings.tokens_file else None
        admin = Tokens(settings.admin_tokens_file, telemetry.log) if settings.admin_tokens_file else None
        limit = RateLimit(settings.client_rate, settings.client_burst) if settings.client_rate else None
        self._journals: list[Journal] = []
        if settings.decision_log:
            self._journals.append(DecisionLog(settings.decision_log, settings, telemetry))
        if settings.capture and settings.capture_key:
            self._journals.append(Capture(settings.capture, settings.capture_key, settings, telemetry))
        self._rollout = Rollout(settings, telemetry, clock)
        self._watching: asyncio.Task[None] | None = None
        self._gate = Gate()
        self._calls = Calls(telemetry, self._gate, tokens, limit, admin)
        self._health = health.aio.HealthServicer()
        self._serving = False
        self._grpc = grpc.aio.server(
            interceptors=[self._calls],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
            ],
        )
        decisions = Decisions(self._rollout, telemetry, self._journals)
        moderation = Moderation(settings, telemetry, self._rollout, decisions)
        add_ModerationServicer_to_server(moderation, self._grpc)
        ext_proc = ExtProc(settings, telemetry, self._rollout, decisions)
        add_ExternalProcessorServicer_to_server(ext_proc, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        services = [_SERVICE, _EXT_PROC, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if admin is not None:
            add_AdminServicer_to_server(Admin(self._rollout), self._grpc)
            services.append(_ADMIN)
        reflection.enable_server_reflection(services, self._grpc)
        exchange = Exchange(settings, telemetry, self._gate, tokens, limit, self._rollout, decisions)
        registry = telemetry.metrics.registry
        app = make_app(registry, lambda: self._serving, lambda: self._rollout.differences, exchange.serve)
        self._http = Listener(app, _LAST_WORDS)

    async def __aenter__(self) -> Self:
        """Listens, loads, and serves."""
        try:
            await self.listen()
            await self.load()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def listen(self) -> None:
        """Answers on both ports, with Loading and NOT_SERVING for now.

        Raises ConfigError where a port is not free, or a certificate cannot be used.
        """
        settings = self._settings
        await self._set_health(False)
        certificates = self._certificates()
        try:
            self.grpc_port = self._bind(certificates)
        except RuntimeError:  # a certificate that gRPC alone refuses ends here too
            how = " with tls_cert and tls_key" if settings.tls_cert else ""
            raise ConfigError(f"listen: {settings.listen} cannot be listened on{how}") from None
        await self._grpc.start()
        try:
            await self._http.start(settings.http, certificates.context if certificates else None)
        except OSError:
            raise ConfigError(f"http: {settings.http} cannot be listened on") from None
        self.http_port = self._http.port
        self._log.info("listening", grpc=self.grpc_port, http=self.http_port, tls=settings.tls_cert is not None)

    async def load(self) -> None:
        """Gets the engine, and only then says SERVING."""
        start = time.perf_counter()
        self._judge = judge = await asyncio.to_thread(self._load)
        self._rollout.start(judge)
        self._watching = asyncio.create_task(self._rollout.watch())
        await self._set_health(True)
        revision = judge.model.revision
        seconds = round(time.perf_counter() - start, 3)
        self._log.info("serving", model=revision.name, revision=revision.revision, load_seconds=seconds)

    async def stop(self) -> None:
        """NOT_SERVING first; then finishes what is running, for as long as `drain_seconds`; then stops listening."""
        self._log.info("draining")
        self._serving = False
        self._rollout.stop()
        judge = self._judge
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._health.enter_graceful_shutdown()  # waits for whoever watches to be told
                await self._gate.drain()
                if judge is not None:
                    await judge.drain()
                if self._watching is not None:
                    await self._watching
        self._calls.end_watches()
        await self._grpc.stop(_LAST_WORDS)
        await self._http.stop()
        for journal in self._journals:
            await asyncio.to_thread(journal.close)
        if judge is not None:
            judge.close()
        self._log.info("stopped")

    async def _set_health(self, serving: bool) -> None:
        self._serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", _SERVICE, _EXT_PROC):
            await self._health.set(service, status)

    def _certificates(self) -> Certificates | None:
        settings = self._settings
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca, self._log)

    def _bind(self, certificates: Certificates | None) -> int:
        if certificates is None:
            return self._grpc.add_insecure_port(self._settings.listen)
        return self._grpc.add_secure_port(self._settings.listen, certificates.credentials)


def load_moderator(settings: Settings, telemetry: Telemetry) -> Judge:
    from guard.engine.moderator import Moderator  # takes torch with it, for which listening need not wait

    return Moderator.load(settings, telemetry)


Beside = Callable[["Server", Telemetry], AbstractAsyncContextManager[Awaitable[None]]]
"""What runs beside a server, from when it serves until it is told to stop; raises where it ends by itself."""


async def serve(
    settings: Settings,
    load: Callable[[Settings, Telemetry], Judge] = load_moderator,
    beside: Beside | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Raises ConfigError where settings, policies or the model cannot be used.
    """
    telemetry = Telemetry.start(settings.log_level, settings.otlp_endpoint)
    adopt_stdlib_logging(telemetry.log)
    stopping = stop_signal()
    async with Server(settings, telemetry, lambda: load(settings, telemetry)) as server:
        if beside is None:
            await stopping.wait()
        else:
            async with beside(server, telemetry) as ended:
                await first(stopping.wait(), ended)
    if telemetry.tracing is not None:
        telemetry.tracing.close()


async def first(*work: Awaitable[object]) -> None:
    """Waits until one is done, and raises what it does."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the next does what the system does."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for number in _STOP_SIGNALS:  # back to what the system does: end the process
            loop.remove_signal_handler(number)

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    return stopping
