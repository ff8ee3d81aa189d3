"""Lines that are written behind the requests they are about: by a thread of their own, to a file that is rotated."""

import logging
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NamedTuple, TextIO

from prometheus_client import Counter
from structlog.typing import FilteringBoundLogger

from guard.errors import ConfigError

_ROOM = 64 * 2**20  # characters that may wait to be written
_LAST_WORDS = 5.0  # seconds to write what waits as the service stops


class _Entry(NamedTuple):
    lines: Iterator[str]
    number: int
    size: int


class Lines:
    """Takes lines without ever waiting, and writes them on a thread of its own.

    What finds no room, cannot be written or is still waiting long after the stop is counted, and lost.
    """

    def __init__(
        self, name: str, handler: logging.Handler, log: FilteringBoundLogger, written: Counter, dropped: Counter
    ):
        """`name` begins the events that are logged; `dropped` has a label, the reason."""
        self._name = name
        self._handler = handler
        self._log = log
        self._written = written
        self._dropped = dropped
        self._entries: deque[_Entry] = deque()
        self._taken = 0  # of the room
        self._failing = False
        self._closed = False
        self._change = threading.Condition()
        self._writer = threading.Thread(target=self._run, name=name, daemon=True)
        self._writer.start()

    def add(self, lines: Iterator[str], number: int, size: int) -> None:
        """`lines` are so many, made on the writer's thread, and take about `size` characters until then."""
        with self._change:
            if self._taken + size > _ROOM or self._closed:
                self._dropped.labels("stopped" if self._closed else "full").inc(number)
                return
            self._entries.append(_Entry(lines, number, size))
            self._taken += size
            self._change.notify()

    def close(self) -> None:
        """Writes what waits, for some seconds at most; blocks."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._writer.join(_LAST_WORDS)
        with self._change:
            lost = sum(entry.number for entry in self._entries)
            self._entries.clear()
        if lost:
            self._dropped.labels("stopped").inc(lost)
            self._log.error(f"{self._name}_cut_off", lines=lost)

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            self._write(entry)
            with self._change:
                self._taken -= entry.size
        self._let_go()

    def _next(self) -> _Entry | None:
        """The oldest entry, once there is one; None at the end."""
        with self._change:
            self._change.wait_for(lambda: self._entries or self._closed)
            return self._entries.popleft() if self._entries else None

    def _write(self, entry: _Entry) -> None:
        written = 0
        try:
            for line in entry.lines:
                self._handler.emit(logging.makeLogRecord({"msg": line}))
                written += 1
        except Exception as error:  # the disk is full, say; the writer must outlive it
            self._dropped.labels("failed").inc(entry.number - written)
            if not self._failing:
                self._log.error(f"{self._name}_fails", problem=getattr(error, "strerror", None), exc_info=error)
            self._failing = True
            self._let_go()  # of what is half written; the next line opens the file anew
        else:
            self._failing = False
        self._written.inc(written)

    def _let_go(self) -> None:
        with suppress(OSError):  # it was told already
            self._handler.close()


class _Raising(logging.Handler):
    """Leaves errors to the caller, where logging would print them."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what is being handled


class _Rotating(_Raising, RotatingFileHandler):
    pass


class _Stream(_Raising, logging.StreamHandler[TextIO]):
    pass


def rotating(setting: str, path: Path, size: int, kept: int) -> logging.Handler:
    """Rotates the file from that size on, and keeps so many old ones. Raises ConfigError, which names the setting."""
    try:
        return _Rotating(path, maxBytes=size, backupCount=kept, encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be written: {error.strerror}") from None


def standard_output() -> logging.Handler:
    return _Stream(sys.stdout)
