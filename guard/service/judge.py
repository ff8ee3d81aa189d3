"""What the service asks of the engine."""

from collections.abc import Mapping
from typing import Protocol

from guard.policy.calibration import Calibration
from guard.policy.decide import NO_METADATA
from guard.policy.store import PolicyStore
from guard.types import Conversation, Decision, Lane, ModelInfo


class Judge(Protocol):
    """An engine with the policies that it judges by; see guard.engine.moderator."""

    model: ModelInfo
    calibration: Calibration | None
    policies: PolicyStore

    async def judge(
        self,
        conversation: Conversation,
        *,
        policy: str = "",
        lane: Lane = Lane.INTERACTIVE,
        deadline: float | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        conversation_id: str = "",
        client: str = "",
        known: int = 0,
    ) -> Decision: ...

    async def token_ends(self, text: str) -> list[int]: ...

    async def adopt(self, policies: PolicyStore) -> None: ...

    async def drain(self) -> None: ...

    def close(self) -> None: ...
