"""The decision log: a JSON line for every verdict, all that it takes to judge it again, and nobody's text."""

import hashlib
import json
import logging
import random
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from guard.errors import ConfigError
from guard.policy.store import PolicyStore
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Conversation, Decision, Scores, Turn, Verdict, Violation

_ROOM = 64 * 2**20  # characters that may wait to be written, each verdict being so many beside its text:
_VERDICT = 4096
_LAST_WORDS = 5.0  # seconds to write what waits as the service stops


class Salt:
    """Hashes that only they can compute who know the secret; of each kind its own."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.blake2b(secret).digest()

    def hash(self, kind: str, text: str) -> str:
        data = text.encode(errors="surrogatepass")
        return hashlib.blake2b(data, digest_size=16, key=self._key, person=kind.encode()).hexdigest()


class Entry(NamedTuple):
    """A decision on its way to the log, with the turn that each of its verdicts is about; `time` is that of Unix."""

    time: float
    decision: Decision
    judged: tuple[Turn, ...]
    conversation_id: str
    metadata: Mapping[str, str]

    def lines(self, salt: Salt) -> Iterator[str]:
        """A line of JSON for each verdict."""
        decision = self.decision
        time = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="microseconds")
        conversation = salt.hash("conversation", self.conversation_id) if self.conversation_id else None
        for verdict, turn in zip(decision.verdicts, self.judged, strict=True):
            fields = {
                "time": time,
                "id": decision.id,
                "turn": verdict.turn,
                "conversation": conversation,
                "role": turn.role,
                "text": {"hash": salt.hash("text", turn.text), "length": len(turn.text)},
                "scores": verdict.scores and _from_scores(verdict.scores),
                "hits": sorted(verdict.hits),
                "metadata": self.metadata,
                **_from_verdict(verdict),
                "policy": {"name": decision.policy.name, "revision": decision.policy.revision},
                "model": {"name": decision.model.name, "revision": decision.model.revision},
                "timings_ms": {
                    "tokenise": round(decision.timings.tokenise * 1000, 3),
                    "queue": round(decision.timings.queue * 1000, 3),
                    "model": round(decision.timings.model * 1000, 3),
                },
            }
            yield json.dumps(fields, separators=(",", ":"))


class DecisionLog:
    """Takes decisions without ever waiting, and writes them on a thread of its own.

    What finds no room, cannot be written or is still waiting long after the stop is counted, and lost.
    """

    def __init__(self, path: Path, settings: Settings, telemetry: Telemetry) -> None:
        """`path` may be -, standard output. Raises ConfigError where it or the salt cannot be used."""
        self._log = telemetry.log
        self._written = telemetry.metrics.decision_log_written
        self._dropped = telemetry.metrics.decision_log_dropped
        self._share = settings.decision_log_share
        self._salt = Salt(_secret(settings.decision_log_salt))
        self._handler = _open(path, settings.decision_log_bytes, settings.decision_log_files)
        self._entries: deque[tuple[Entry, int]] = deque()
        self._taken = 0  # of the room
        self._failing = False
        self._closed = False
        self._change = threading.Condition()
        self._writer = threading.Thread(target=self._run, name="decision log", daemon=True)
        self._writer.start()

    def add(
        self,
        decision: Decision,
        conversation: Conversation,
        conversation_id: str,
        metadata: Mapping[str, str],
        policies: PolicyStore,
    ) -> None:
        """Of the metadata only what an overlay of those policies asks for, word for word, is kept."""
        if random.random() >= self._share:
            return
        asked = {
            key: value
            for policy in policies.policies
            for overlay in policy.overlays
            for key, value in overlay.when
            if metadata.get(key) == value
        }
        judged = tuple(conversation.turns[verdict.turn] for verdict in decision.verdicts)
        entry = Entry(time.time(), decision, judged, conversation_id, asked)
        size = len(conversation_id) + sum(_VERDICT + len(turn.text) for turn in judged)
        with self._change:
            if self._taken + size > _ROOM or self._closed:
                self._dropped.labels("stopped" if self._closed else "full").inc(len(judged))
                return
            self._entries.append((entry, size))
            self._taken += size
            self._change.notify()

    def close(self) -> None:
        """Writes what waits, for some seconds at most; blocks."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._writer.join(_LAST_WORDS)
        with self._change:
            lost = sum(len(entry.judged) for entry, _ in self._entries)
            self._entries.clear()
        if lost:
            self._dropped.labels("stopped").inc(lost)
            self._log.error("decision_log_cut_off", verdicts=lost)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            entry, size = taken
            self._write(entry)
            with self._change:
                self._taken -= size
        self._let_go()

    def _next(self) -> tuple[Entry, int] | None:
        """The oldest entry, once there is one; None at the end."""
        with self._change:
            self._change.wait_for(lambda: self._entries or self._closed)
            return self._entries.popleft() if self._entries else None

    def _write(self, entry: Entry) -> None:
        written = 0
        try:
            for line in entry.lines(self._salt):
                self._handler.emit(logging.makeLogRecord({"msg": line}))
                written += 1
        except Exception as error:  # the disk is full, say; the writer must outlive it
            self._dropped.labels("failed").inc(len(entry.judged) - written)
            if not self._failing:
                self._log.error("decision_log_fails", problem=getattr(error, "strerror", None), exc_info=error)
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


def _open(path: Path, size: int, kept: int) -> logging.Handler:
    if path == Path("-"):
        return _Stream(sys.stdout)
    try:
        return _Rotating(path, maxBytes=size, backupCount=kept, encoding="ascii")
    except OSError as error:
        raise ConfigError(f"decision_log: {path} cannot be written: {error.strerror}") from None


def _secret(path: Path | None) -> bytes:
    if path is None:
        return secrets.token_bytes()
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"decision_log_salt: {path} cannot be read: {error.strerror}") from None
    if not secret:
        raise ConfigError(f"decision_log_salt: {path} is empty")
    return secret


def _from_verdict(verdict: Verdict) -> Mapping[str, Any]:
    return {
        "action": verdict.action.name.lower(),
        "violations": [_from_violation(violation) for violation in verdict.violations],
        "coverage": {"seen": verdict.coverage.seen, "total": verdict.coverage.total},
        "degraded": verdict.degraded,
        "shadow": verdict.shadow,
    }


def _from_violation(violation: Violation) -> Mapping[str, Any]:
    return {
        "category": violation.category,
        "rule": violation.rule,
        "action": violation.action.name.lower(),
        "score": violation.score,
        "threshold": violation.threshold,
    }


def _from_scores(scores: Scores) -> Mapping[str, Any]:
    hazards = {code: _digits(score) for code, score in scores.hazards.items()}
    return {"unsafe": _digits(scores.unsafe), "hazards": hazards}


def _digits(score: float) -> float:
    """Prints as the nine digits that tell every number of float32 from every other, where 17 would not say more."""
    return float(f"{score:.9g}")
