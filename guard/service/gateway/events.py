"""Bytes of a reply, however they are cut, to its events: server-sent ones, or lines of JSON."""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from guard.errors import InputError

_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    """`raw` is every byte of it, its end included; `data` what it says, empty of a comment."""

    raw: bytes
    data: bytes


class Framing(Protocol):
    """How events follow each other."""

    end: re.Pattern[bytes]

    def data(self, raw: bytes) -> bytes: ...

    def frame(self, data: bytes, name: str = "") -> bytes: ...


class ServerSent:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    end = _BLANK_LINE

    def data(self, raw: bytes) -> bytes:
        lines = [line.partition(b":")[2].removeprefix(b" ") for line in _LINE_END.split(raw) if line[:5] == b"data:"]
        return b"\n".join(lines)

    def frame(self, data: bytes, name: str = "") -> bytes:
        return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


class Lines:
    """A JSON document a line."""

    end = re.compile(rb"\n")

    def data(self, raw: bytes) -> bytes:
        return raw.strip()

    def frame(self, data: bytes, name: str = "") -> bytes:
        return data + b"\n"


class Events:
    """Takes bytes and gives whole events; `limit` is in bytes of one event."""

    def __init__(self, framing: Framing, limit: int) -> None:
        self._framing = framing
        self._limit = limit
        self._rest = bytearray()
        self._searched = 0  # of the rest, in which no event ends

    def add(self, chunk: bytes, final: bool = False) -> Iterator[Event]:
        """Those that end in what has come; `final` where nothing more comes. Raises InputError for one too long."""
        self._rest += chunk
        while found := self._framing.end.search(self._rest, self._searched):
            yield self._take(found.end())
        self._searched = max(0, len(self._rest) - 3)  # an end may be cut itself, and is four bytes at most
        if len(self._rest) > self._limit:
            raise InputError("reply", "an event is too long")
        if final and self._rest:
            yield self._take(len(self._rest))

    def _take(self, size: int) -> Event:
        raw = bytes(self._rest[:size])
        del self._rest[:size]
        self._searched = 0
        return Event(raw, self._framing.data(raw))
