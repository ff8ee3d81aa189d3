"""Small real stand-ins for what is slow to start."""

import asyncio
import itertools
from collections.abc import Mapping
from types import MappingProxyType

from guard.errors import Draining, Expired, Overloaded, PolicyError
from guard.policy.calibration import Calibration
from guard.policy.compile import Category, Policy, Threshold, unknown_hazards
from guard.policy.decide import NO_METADATA, decide, decide_without_scores
from guard.policy.store import PolicyStore
from guard.types import (
    Action,
    Beside,
    Conversation,
    Coverage,
    Decision,
    Lane,
    ModelInfo,
    Revision,
    Role,
    Scores,
    Timings,
    Turn,
    Verdict,
)

THRESHOLDS = dict.fromkeys((Role.USER, Role.AGENT), (Threshold(Action.BLOCK, 0.75), Threshold(Action.FLAG, 0.5)))
POLICY = Policy(
    name="default",
    revision="0123456789abcdef",
    description="For tests.",
    categories=(
        Category("unsafe", "Unsafe", (), MappingProxyType(THRESHOLDS)),
        Category("privacy", "Privacy", ("S7",), MappingProxyType(THRESHOLDS)),
    ),
    on_error=MappingProxyType(dict.fromkeys(Role, Action.BLOCK)),
)
LENIENT = Policy("lenient", "fedcba9876543210", "Lets all pass.", (), POLICY.on_error)
MODEL = ModelInfo(Revision("words", "00ff"), "cpu", "float32", "words", 6, 2048, ("S7", "X1"))


class WordJudge:
    """An engine whose model is a handful of words.

    "attack" is unsafe, "address" a matter of privacy. "full", "late", "bug" and "broken" in the judged turn make it
    overloaded, expired, raise an exception that quotes the text, and fail to score; "wait" makes it wait for `gate`.
    "busy once" makes it overloaded for its first request alone.
    """

    def __init__(self) -> None:
        self.model = MODEL
        self.calibration: Calibration | None = None
        self.policies = PolicyStore([POLICY, LENIENT], "default")
        self.gate = asyncio.Event()
        self.started = asyncio.Semaphore(0)  # one permit for every request that came to the gate
        self.running = 0
        self.lanes: list[Lane] = []
        self.deadlines: list[float | None] = []
        self.metadata: list[Mapping[str, str]] = []
        self.clients: list[str] = []
        self.closed = False
        self._draining = False
        self._ids = itertools.count(1)

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
    ) -> Decision:
        if self._draining:
            raise Draining
        self.lanes.append(lane)
        self.deadlines.append(deadline)
        self.metadata.append(dict(metadata))
        self.clients.append(client)
        id = f"decision-{next(self._ids)}"
        choice = self.policies.choose(policy, conversation_id or id)
        self.running += 1
        try:
            last = conversation.turns[-1 if conversation.target is None else conversation.target]
            await self._misbehave(last.text)
        finally:
            self.running -= 1
        judged = range(len(conversation.turns)) if conversation.target is None else [conversation.target]

        def judged_by(policy: Policy) -> tuple[Revision, tuple[Verdict, ...]]:
            verdicts = tuple(self._verdict(policy, index, conversation.turns[index]) for index in judged)
            return Revision(policy.name, policy.revision), verdicts

        revision, verdicts = judged_by(choice.policy)
        beside = None if choice.beside is None else Beside(*judged_by(choice.beside), not choice.is_candidate)
        return Decision(id, verdicts, revision, MODEL.revision, Timings(0.25, 0.5, 1.0), beside)

    async def token_ends(self, text: str) -> list[int]:
        """A token is a character."""
        return list(range(1, len(text) + 1))

    async def adopt(self, policies: PolicyStore) -> None:
        for policy in policies.judging:
            if unknown := unknown_hazards(policy, MODEL.hazards):
                raise PolicyError(f"policy {policy.name}: words does not score {', '.join(unknown)}")
        self.policies = policies

    async def _misbehave(self, text: str) -> None:
        if "busy once" in text and len(self.lanes) == 1:
            raise Overloaded(0.001)
        if "full" in text:
            raise Overloaded(1.5)
        if "late" in text:
            raise Expired
        if "bug" in text:
            raise ValueError(text)
        if "wait" in text:
            self.started.release()
            await self.gate.wait()
            if self._draining:  # as an engine that is asked for the next window of a long conversation
                raise Draining

    def _verdict(self, policy: Policy, index: int, turn: Turn) -> Verdict:
        words = len(turn.text.split())
        coverage = Coverage(words, words)
        if "broken" in turn.text:
            judged = decide_without_scores(policy, turn.role)
            return Verdict(index, *judged, None, coverage, degraded=True)
        unsafe = 0.875 if "attack" in turn.text else 0.125
        scores = Scores(unsafe, {"S7": 0.625 if "address" in turn.text else 0.0, "X1": 0.25})
        return Verdict(index, *decide(policy, turn.role, scores), scores, coverage)

    async def drain(self) -> None:
        self._draining = True

    def close(self) -> None:
        self.closed = True
