"""What an API is made of here: endpoints, each with the forms of what it takes and answers, and a way to the engine."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel

from guard.errors import InputError
from guard.messages import new_turns
from guard.policy.compile import Policy
from guard.policy.decide import NO_METADATA
from guard.policy.store import PolicyStore
from guard.service.decisions import Decisions
from guard.service.http.forms import Body, Form, read_model
from guard.service.http.status import Failure, failure_of, status_of
from guard.service.rollout import Rollout
from guard.types import Conversation, Decision, Lane, Turn

_ONLINE = 16  # conversations of one request; more are bulk work, that waits where online calls would be refused


@dataclass(slots=True)
class Asked:
    """A request while it is served: its path and headers, and what is in force; `decided` are ids of its decisions."""

    decisions: Decisions
    rollout: Rollout
    max_turns: int
    path: Mapping[str, str]
    headers: Mapping[str, str]
    decided: list[str] = field(default_factory=list)

    @property
    def policies(self) -> PolicyStore:
        """Raises Loading."""
        return self.rollout.policies

    async def judge(
        self,
        conversation: Conversation,
        *,
        policy: str = "",
        lane: Lane = Lane.INTERACTIVE,
        metadata: Mapping[str, str] = NO_METADATA,
        conversation_id: str = "",
    ) -> Decision:
        """Raises InputError for too many turns, and what the engine does."""
        if len(conversation.turns) > self.max_turns:
            raise InputError("turns", f"{len(conversation.turns)} of them, at most {self.max_turns} are taken")
        decision = await self.decisions.decide(
            conversation, policy=policy, lane=lane, metadata=metadata, conversation_id=conversation_id
        )
        self.decided.append(decision.id)
        return decision

    async def judge_each(
        self,
        conversations: Sequence[Conversation],
        *,
        policy: str = "",
        metadata: Mapping[str, str] = NO_METADATA,
        conversation_id: str = "",
    ) -> list[Decision]:
        """The same for many, all at once; the first error is that of all."""
        if len(conversations) > self.max_turns:
            raise InputError("request", f"{len(conversations)} texts, at most {self.max_turns} are taken")
        lane = Lane.INTERACTIVE if len(conversations) <= _ONLINE else Lane.BULK
        ask = partial(self.judge, policy=policy, lane=lane, metadata=metadata, conversation_id=conversation_id)
        asking = [asyncio.ensure_future(ask(conversation)) for conversation in conversations]
        try:
            return await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()

    def policy_of(self, decision: Decision, before: PolicyStore) -> Policy:
        """The policy that decided: in force now, or in those `before`, or else the one that has its name now."""
        for store in (self.policies, before):
            for policy in store.judging:
                if (policy.name, policy.revision) == (decision.policy.name, decision.policy.revision):
                    return policy
        return self.policies.get(decision.policy.name)


def alone(turn: Turn) -> Conversation:
    """Judged by itself."""
    return Conversation((turn,), 0)


def in_context(turns: Sequence[Turn], judged: Sequence[int] | None = None) -> list[Conversation]:
    """Each of the judged turns with those before it; by default those that no answer has followed yet."""
    indices = new_turns(turns) if judged is None else judged
    return [Conversation(tuple(turns[: index + 1]), index) for index in indices]


@dataclass(frozen=True, slots=True)
class Errors:
    """How an API tells of errors."""

    form: type[BaseModel] = Failure
    write: Callable[[Exception], BaseModel] = failure_of
    status: Callable[[Exception], int] = status_of


OPENAI = Errors()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route: what it takes, all forms of it at once, and what it answers; `header` is one that it asks for."""

    method: str
    path: str
    summary: str
    answer: Form
    run: Callable[[Asked, Any], Awaitable[Body]]
    takes: tuple[Form, ...] = ()
    read: Callable[[bytes], object] = bytes
    header: str = ""
    errors: Errors = OPENAI


def post(
    path: str,
    summary: str,
    takes: type[BaseModel],
    answer: type[BaseModel],
    run: Callable[[Asked, Any], Awaitable[Body]],
    *,
    header: str = "",
    errors: Errors = OPENAI,
) -> Endpoint:
    """Of an API whose bodies are models."""
    return Endpoint("POST", path, summary, answer, run, (takes,), partial(read_model, takes), header, errors)
