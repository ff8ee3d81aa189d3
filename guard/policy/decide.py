"""Scores, matched rules and a policy to an action: pure, and the only place where they meet."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from guard.policy.compile import Policy
from guard.types import Action, Role, Scores, Violation

NO_METADATA: Mapping[str, str] = MappingProxyType({})


def decide(
    policy: Policy,
    role: Role,
    scores: Scores,
    hits: Collection[str] = (),
    metadata: Mapping[str, str] = NO_METADATA,
) -> tuple[Action, tuple[Violation, ...]]:
    """What the policy says about a turn of `role`: the strictest action reached, and all that reached one.

    `hits` are the rules that match the turn's text, `metadata` is that of its request. A score equal to a threshold
    reaches it. Violations stand strictest action first, then rules, then largest margin first. In shadow the action is
    ALLOW.
    """
    violations = _matched(policy, role, hits)
    for category, thresholds in policy.judging(role, metadata):
        score = category.score(scores)
        for action, threshold, reply in thresholds:
            if score >= threshold:
                violations.append(Violation(category.name, action, score, threshold, reply=reply))
                break
    violations.sort(key=_order)
    return _enforced(policy, violations[0].action if violations else Action.ALLOW), tuple(violations)


def decide_without_scores(
    policy: Policy, role: Role, hits: Collection[str] = ()
) -> tuple[Action, tuple[Violation, ...]]:
    """What the policy says about a turn of `role` that the model could not score: on_error, or a stricter rule."""
    violations = sorted(_matched(policy, role, hits), key=_order)
    action = max((policy.on_error[role], *(violation.action for violation in violations)))
    return _enforced(policy, action), tuple(violations)


def _matched(policy: Policy, role: Role, hits: Collection[str]) -> list[Violation]:
    return [
        Violation(rule.category, rule.action, rule=rule.name, reply=rule.reply)
        for rule in policy.rules
        if rule.name in hits and role in rule.roles
    ]


def _order(violation: Violation) -> tuple[int, bool, float, str, str]:
    return -violation.action, not violation.rule, -violation.margin, violation.category, violation.rule


def _enforced(policy: Policy, action: Action) -> Action:
    return Action.ALLOW if policy.shadow else action
