"""Why a turn was judged as it was: every threshold with its score, the nearest miss, and what would have changed it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from guard.policy.compile import Policy
from guard.policy.decide import NO_METADATA, decide
from guard.types import Action, Role, Scores, Violation


@dataclass(frozen=True, slots=True)
class Step:
    """One threshold that was looked at; `gap` is what the score lacks, 0 or less where it is reached."""

    category: str
    action: Action
    score: float
    threshold: float

    @property
    def gap(self) -> float:
        return self.threshold - self.score


@dataclass(frozen=True, slots=True)
class Explanation:
    """A verdict with its grounds.

    `decisive` are the violations that all would have to go for a milder action; `stricter` is the nearest step that was
    not reached and would have been stricter, `nearest` the nearest of all that were not.
    """

    action: Action
    violations: tuple[Violation, ...]
    steps: tuple[Step, ...]
    decisive: tuple[Violation, ...]
    stricter: Step | None
    nearest: Step | None


def explain(
    policy: Policy,
    role: Role,
    scores: Scores,
    hits: Collection[str] = (),
    metadata: Mapping[str, str] = NO_METADATA,
) -> Explanation:
    """What `decide` says, and why; the steps stand by gap, those that were reached by most first."""
    action, violations = decide(policy, role, scores, hits, metadata)
    strictest = violations[0].action if violations else Action.ALLOW  # also of a policy in shadow
    steps = sorted(
        (
            Step(category.name, step.action, category.score(scores), step.score)
            for category, thresholds in policy.judging(role, metadata)
            for step in thresholds
        ),
        key=lambda step: (step.gap, step.category, -step.action),
    )
    missed = [step for step in steps if step.gap > 0]
    return Explanation(
        action,
        violations,
        tuple(steps),
        tuple(violation for violation in violations if violation.action is strictest),
        next((step for step in missed if step.action > strictest), None),
        next(iter(missed), None),
    )
