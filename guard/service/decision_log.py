"""The decision log: a JSON line for every verdict, all that it takes to judge it again, and nobody's text."""

import hashlib
import json
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from guard.errors import ConfigError
from guard.policy.store import PolicyStore
from guard.service.lines import Lines, rotating, standard_output
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Beside, Conversation, Decision, Scores, Turn, Verdict, Violation

_VERDICT = 4096  # characters that a verdict takes while it waits, beside its text


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
        for place, (verdict, turn) in enumerate(zip(decision.verdicts, self.judged, strict=True)):
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
                **({"prompt": decision.prompt} if decision.prompt else {}),
                "timings_ms": {
                    "tokenise": round(decision.timings.tokenise * 1000, 3),
                    "queue": round(decision.timings.queue * 1000, 3),
                    "model": round(decision.timings.model * 1000, 3),
                },
                **_from_beside(decision.beside, place),
            }
            yield json.dumps(fields, separators=(",", ":"))


class DecisionLog:
    """Takes decisions without ever waiting, and writes them on a thread of its own; see `Lines`."""

    def __init__(self, path: Path, settings: Settings, telemetry: Telemetry) -> None:
        """`path` may be -, standard output. Raises ConfigError where it or the salt cannot be used."""
        self._share = settings.decision_log_share
        self._salt = Salt(_secret(settings.decision_log_salt))
        size, kept = settings.decision_log_bytes, settings.decision_log_files
        handler = standard_output() if path == Path("-") else rotating("decision_log", path, size, kept)
        metrics = telemetry.metrics
        written, dropped = metrics.decision_log_written, metrics.decision_log_dropped
        self._lines = Lines("decision_log", handler, telemetry.log, written, dropped)

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
            for policy in policies.judging
            for overlay in policy.overlays
            for key, value in overlay.when
            if metadata.get(key) == value
        }
        judged = tuple(conversation.turns[verdict.turn] for verdict in decision.verdicts)
        entry = Entry(time.time(), decision, judged, conversation_id, asked)
        size = len(conversation_id) + sum(_VERDICT + len(turn.text) for turn in judged)
        self._lines.add(entry.lines(self._salt), len(judged), size)

    def close(self) -> None:
        """Writes what waits, for some seconds at most; blocks."""
        self._lines.close()


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


def _from_beside(beside: Beside | None, place: int) -> Mapping[str, Any]:
    """Of a roll-out: what the one that did not answer says."""
    if beside is None:
        return {}
    verdict = _from_verdict(beside.verdicts[place])
    said = {"revision": beside.policy.revision, "action": verdict["action"], "violations": verdict["violations"]}
    return {"candidate" if beside.is_candidate else "live": said}


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
