"""Scores and a policy to an action: pure, and the only place where the two meet."""

from guard.policy.compile import Policy
from guard.types import Action, Role, Scores, Violation


def decide(policy: Policy, role: Role, scores: Scores) -> tuple[Action, tuple[Violation, ...]]:
    """What the policy says about a turn of `role`: the strictest action reached, and every category that reached one.

    A score equal to a threshold reaches it. Violations stand strictest action first, then largest margin first.
    """
    violations = []
    for category in policy.categories:
        if thresholds := category.thresholds.get(role):
            score = category.score(scores)
            for action, threshold in thresholds:
                if score >= threshold:
                    violations.append(Violation(category.name, action, score, threshold))
                    break
    violations.sort(key=lambda violation: (-violation.action, -violation.margin, violation.category))
    return violations[0].action if violations else Action.ALLOW, tuple(violations)


def decide_without_scores(policy: Policy, role: Role) -> Action:
    """What the policy says about a turn of `role` that the model could not score."""
    return policy.on_error[role]
