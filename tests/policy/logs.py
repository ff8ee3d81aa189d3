"""Decision logs as the service writes them, of verdicts of one's own."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from guard.policy.compile import Policy
from guard.policy.decide import decide, decide_without_scores
from guard.service.decision_log import Entry, Salt
from guard.types import Coverage, Decision, Revision, Role, Scores, Turn, Verdict


class Said(NamedTuple):
    """A turn as the engine would judge it: its scores, None where the model failed, and what else counts."""

    role: Role
    scores: Scores | None
    hits: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = {}


def verdict(policy: Policy, said: Said) -> Verdict:
    role, scores, hits, metadata = said
    judged = (
        decide_without_scores(policy, role, hits) if scores is None else decide(policy, role, scores, hits, metadata)
    )
    return Verdict(0, *judged, scores, Coverage(1, 1), degraded=scores is None, shadow=policy.shadow, hits=hits)


def write_log(path: Path, policy: Policy, turns: Iterable[Said]) -> Path:
    """The verdicts of a policy on these turns; their ids are d0, d1, and so on."""
    revision = Revision(policy.name, policy.revision)
    with path.open("w") as file:
        for number, said in enumerate(turns):
            decision = Decision(f"d{number}", (verdict(policy, said),), revision, Revision("model", "00ff"))
            entry = Entry(0.0, decision, (Turn(said.role, "text"),), "", said.metadata)
            file.writelines(f"{line}\n" for line in entry.lines(Salt(b"salt")))
    return path
