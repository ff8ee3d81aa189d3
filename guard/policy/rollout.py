"""A candidate of a policy, tried beside the live revision: which of the two answers, and what differs."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from guard.policy.compile import Policy
from guard.types import Action, Verdict


@dataclass(frozen=True, slots=True)
class Candidate:
    """A revision beside the live one of the same name, until `expires`; Unix seconds. `content` is that of its file.

    Both judge every turn; the candidate answers `percent` of the conversations.
    """

    policy: Policy
    percent: float
    expires: float
    content: bytes

    def answers(self, conversation: str) -> bool:
        """Always the same for a conversation, here and on other servers; those of a share are also of a larger one."""
        key = f"{self.policy.revision} {conversation}".encode(errors="surrogatepass")
        place = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest())
        return place * 100 < self.percent * 2**32


class Flip(NamedTuple):
    """Of a turn: `about` is "verdict", a category or "rule NAME"."""

    about: str
    live: Action
    candidate: Action


def flips(live: Verdict, candidate: Verdict) -> Iterator[Flip]:
    """What differs between two verdicts on a turn."""
    was, becomes = _actions(live), _actions(candidate)
    for about in was | becomes:
        flip = Flip(about, was.get(about, Action.ALLOW), becomes.get(about, Action.ALLOW))
        if flip.live is not flip.candidate:
            yield flip


def unfit(candidate: Policy, live: Policy | None) -> str:
    """Why the one cannot be tried beside the other, or an empty text."""
    if live is None:
        return "the policy is gone"
    if candidate.revision == live.revision:
        return f"revision {candidate.revision} is live"
    for key in ("history", "long_input"):
        if getattr(candidate, key) != getattr(live, key):
            return f"its `{key}` is not that of the live policy, so that both cannot judge from the same scores"
    return ""


def _actions(verdict: Verdict) -> dict[str, Action]:
    grounds = (
        (f"rule {violation.rule}" if violation.rule else violation.category, violation.action)
        for violation in verdict.violations
    )
    return {"verdict": verdict.action} | dict(grounds)
