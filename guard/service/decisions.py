"""Asks the engine, counts what it decides, and leaves that to those who keep it; whatever the call came by."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from guard.policy.decide import NO_METADATA
from guard.policy.store import PolicyStore
from guard.service.access import caller
from guard.service.rollout import Rollout
from guard.telemetry import Telemetry
from guard.types import Conversation, Decision, Lane


class Journal(Protocol):
    """What keeps decisions; it holds none of them up."""

    def add(
        self,
        decision: Decision,
        conversation: Conversation,
        conversation_id: str,
        metadata: Mapping[str, str],
        policies: PolicyStore,
    ) -> None: ...

    def close(self) -> None: ...


class Decisions:
    """Refuses with Loading until the roll-out is started."""

    def __init__(self, rollout: Rollout, telemetry: Telemetry, journals: Sequence[Journal] = ()) -> None:
        self._rollout = rollout
        self._telemetry = telemetry
        self._journals = journals

    async def decide(
        self,
        conversation: Conversation,
        *,
        policy: str = "",
        lane: Lane = Lane.INTERACTIVE,
        deadline: float | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        conversation_id: str = "",
    ) -> Decision:
        """What the engine says, for the caller at hand; raises what it does. `deadline` is by time.monotonic()."""
        policies = self._rollout.policies  # in force as the request comes, whatever is in force when it is answered
        decision = await self._rollout.judge.judge(
            conversation,
            policy=policy,
            lane=lane,
            deadline=deadline,
            metadata=metadata,
            conversation_id=conversation_id,
            client=caller.get(),
        )
        self.tell(decision, conversation, conversation_id, metadata, policies)
        return decision

    def tell(
        self,
        decision: Decision,
        conversation: Conversation,
        conversation_id: str,
        metadata: Mapping[str, str],
        policies: PolicyStore | None = None,
    ) -> None:
        """Counts a decision and keeps it; `policies` were in force as it was asked for, by default those of now."""
        policies = policies or self._rollout.policies
        self._telemetry.metrics.decided(decision)
        self._rollout.decided(decision)
        for journal in self._journals:
            journal.add(decision, conversation, conversation_id, metadata, policies)
