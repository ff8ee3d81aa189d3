"""Runs an ASGI app with uvicorn within the loop at hand: on sockets of ours, and it is we who end it."""

import asyncio
import errno
import math
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

_KEEP_ALIVE = 75  # seconds that a connection may be idle, longer than the pools of most clients keep one
_CUT = 0.1  # seconds for that to be told
_BACKLOG = 1024  # connections that wait to be taken
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # localhost may name an address that the machine lacks


class Listener:
    """Serves an app; `last_words` are the seconds that answers may still take once it is stopped."""

    port: int

    def __init__(self, app: ASGIApp, last_words: float) -> None:
        self._app = app
        self._last_words = last_words
        self._server: _Server | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def start(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        """Listens on HOST:PORT, all addresses that the host has; raises OSError where it cannot."""
        sockets = await _bind(address)
        self.port = sockets[0].getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # who calls is whose connection it is
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(self._last_words),
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
        config.load()
        server = _Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets)
        self._server, self._ticking = server, asyncio.create_task(server.main_loop())

    async def stop(self) -> None:
        """Takes nothing new, and ends; who owes a part of a request, or will not read, is not waited for."""
        if self._server is None or self._ticking is None:
            return
        self._server.leave()
        await self._ticking
        await self._server.shutdown()
        if told := set(self._server.server_state.tasks):  # that they are cut off, and may say so
            await asyncio.wait(told, timeout=_CUT)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()


class _Server(uvicorn.Server):
    """One that is told to leave. Signals are none of its business: those it takes in `serve`, which is not called."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self._leaving.set()

    async def main_loop(self) -> None:
        while not self._leaving.is_set():
            await self.on_tick(0)  # sets the date that answers carry
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._leaving.wait()


class _Connection(H11Protocol):
    """Tells the app whose certificate the client has shown: its name, or None where there is none."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        shown = transport.get_extra_info("peercert")
        self.app_state = {**self.app_state, "certificate": _common_name(shown) if shown else None}


def _common_name(certificate: Mapping[str, Any]) -> str:
    names = (value for part in certificate.get("subject", ()) for key, value in part if key == "commonName")
    return next(names, "")


async def _bind(address: str) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    number = int(port)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            try:
                sockets.append(_listening(family, kind, protocol, place[0], number))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
            else:
                number = sockets[0].getsockname()[1]  # where the system chose it, the same for all
        if not sockets and missing is not None:
            raise missing
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def _listening(family: int, kind: int, protocol: int, host: str | int, port: int) -> socket.socket:
    """A socket of the very protocol that an address is of: asyncio sends without delay only where that is said."""
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind((host, port))
        opened.listen(_BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened
