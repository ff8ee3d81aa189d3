"""Sealed capture: what was said, for those who must keep it, in a file that none but the owner of a key can read."""

import base64
import json
import random
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from guard.policy.store import PolicyStore
from guard.service.lines import Lines, rotating
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Action, Conversation, Decision, Turn

_RECORD = 1024  # characters beside the texts, about


class Capture:
    """Takes decisions without ever waiting; seals and writes what was judged on a thread of its own.

    A line is the base64 of a sealed record; no text is ever written, or logged, that is not sealed.
    """

    def __init__(self, path: Path, key: Path, settings: Settings, telemetry: Telemetry) -> None:
        """`key` is public. Raises ConfigError where the file or the key cannot be used."""
        from guard.keys import sealer

        self._seal = sealer(key)
        self._mildest = Action[settings.capture_from.upper()]
        self._share = settings.capture_share
        metrics = telemetry.metrics
        self._lines = Lines(
            "capture",
            rotating("capture", path, settings.decision_log_bytes, settings.decision_log_files),
            telemetry.log,
            metrics.capture_written,
            metrics.capture_dropped,
        )

    def add(
        self,
        decision: Decision,
        conversation: Conversation,
        conversation_id: str,
        metadata: Mapping[str, str],
        policies: PolicyStore,
    ) -> None:
        """Captures the conversation, up to the last judged turn, where a verdict is strict enough."""
        if max(verdict.action for verdict in decision.verdicts) < self._mildest or random.random() >= self._share:
            return
        said = conversation.turns[: max(verdict.turn for verdict in decision.verdicts) + 1]
        given = dict(metadata)
        size = _RECORD + len(conversation_id) + sum(len(turn.text) for turn in said) + sum(map(len, given.values()))
        self._lines.add(self._sealed(datetime.now(UTC), decision, said, conversation_id, given), 1, size)

    def close(self) -> None:
        """Writes what waits, for some seconds at most; blocks."""
        self._lines.close()

    def _sealed(
        self,
        time: datetime,
        decision: Decision,
        said: tuple[Turn, ...],
        conversation_id: str,
        metadata: Mapping[str, str],
    ) -> Iterator[str]:
        """The one line, which is made when it is asked for, on the writer's thread."""
        record = {
            "time": time.isoformat(timespec="microseconds"),
            "id": decision.id,
            "conversation_id": conversation_id,
            "metadata": metadata,
            "policy": decision.policy.name,
            "actions": {str(verdict.turn): verdict.action.name.lower() for verdict in decision.verdicts},
            "turns": [{"role": turn.role, "text": turn.text} for turn in said],
        }
        yield base64.b64encode(self._seal(json.dumps(record).encode())).decode()
