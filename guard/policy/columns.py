"""Many turns at once: what a policy says about columns of scores, the same that guard.policy.decide says one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from guard.policy.compile import Category, Policy, Threshold
from guard.policy.rules import Rule
from guard.types import Action, Role

ROLES = tuple(Role)
UNSAFE = "unsafe"

Bools = NDArray[np.bool_]
Actions = NDArray[np.int8]
Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Ground = tuple[str, str]
"""Category and rule of a violation: the rule is empty where a score reached its threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Turns to judge; every array is [turns].

    `roles` are places in ROLES. `scores` are by hazard code and UNSAFE, and mean nothing where a turn is not `scored`.
    `hits` say by the name of a rule where it matches the text, `metadata` by key and value where a request has it.
    """

    roles: NDArray[np.int8]
    scored: Bools
    scores: Mapping[str, Floats]
    hits: Mapping[str, Bools]
    metadata: Mapping[tuple[str, str], Bools]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The turns that violate one ground, by their places in any order, and how; score and threshold are 0 of a rule."""

    rows: Rows
    action: Actions
    score: Floats
    threshold: Floats

    @classmethod
    def nothing(cls) -> "Found":
        return cls(np.empty(0, np.intp), np.empty(0, np.int8), np.empty(0), np.empty(0))

    @classmethod
    def joined(cls, parts: Sequence["Found"]) -> "Found":
        columns = zip(*((one.rows, one.action, one.score, one.threshold) for one in parts), strict=True)
        return cls(*map(np.concatenate, columns)) if parts else cls.nothing()


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The action of every turn, [turns], and its violations by what they are about."""

    action: Actions
    found: Mapping[Ground, Found]


def judge(policy: Policy, turns: Columns) -> Judged:
    """What the policy says about each turn: `decide` where it is scored, `decide_without_scores` where it is not."""
    found = {(rule.category, rule.name): _by_rule(rule, turns) for rule in policy.rules}
    scored = {role: turns.scored & (turns.roles == number) for number, role in enumerate(ROLES)}
    found |= {(category.name, ""): _by_score(policy, category, turns, scored) for category in policy.categories}
    on_error = np.array([policy.on_error[role] for role in ROLES], np.int8)
    action = np.where(turns.scored, np.int8(Action.ALLOW), on_error[turns.roles])
    for one in found.values():
        action[one.rows] = np.maximum(action[one.rows], one.action)
    return Judged(np.zeros_like(action) if policy.shadow else action, found)


def _by_rule(rule: Rule, turns: Columns) -> Found:
    spoken = np.isin(turns.roles, [ROLES.index(role) for role in rule.roles])
    rows = np.flatnonzero(spoken & turns.hits[rule.name])
    nothing = np.zeros(len(rows))
    return Found(rows, np.full(len(rows), rule.action, np.int8), nothing, nothing)


def _by_score(policy: Policy, category: Category, turns: Columns, scored: Mapping[Role, Bools]) -> Found:
    parts = []
    overlays = [overlay for overlay in reversed(policy.overlays) if category.name in overlay.thresholds]
    score = _score(category, turns.scores)
    for role, judged in scored.items():
        for overlay in overlays:
            if role in overlay.thresholds[category.name]:
                applies = np.logical_and.reduce([turns.metadata[pair] for pair in overlay.when])
                parts.append(_reached(overlay.thresholds[category.name][role], score, judged & applies))
                judged = judged & ~applies
        parts.append(_reached(category.thresholds.get(role, ()), score, judged))
    return Found.joined(parts)


def _reached(thresholds: Sequence[Threshold], score: Floats, judged: Bools) -> Found:
    """The strictest action that each of them reaches; whatever reaches it reaches the milder ones."""
    if not thresholds:
        return Found.nothing()
    rising = np.array([threshold for _, threshold, _ in reversed(thresholds)])
    actions = np.array([action for action, _, _ in reversed(thresholds)], np.int8)
    rows = np.flatnonzero(judged & (score >= rising[0]))
    strictest = np.searchsorted(rising, score[rows], side="right") - 1
    return Found(rows, actions[strictest], score[rows], rising[strictest])


def _score(category: Category, scores: Mapping[str, Floats]) -> Floats:
    """The sums and products of Category.score, in the same order, so that they are the same to the bit."""
    if not category.hazards:
        return scores[UNSAFE]
    fed = [scores[code] for code in category.hazards]
    match category.scoring:
        case "weighted":
            total = np.zeros_like(fed[0])
            for weight, score in zip(category.weights, fed, strict=True):
                total += weight * score
            return np.minimum(1.0, total)
        case "any":
            none = np.ones_like(fed[0])
            for score in fed:
                none *= 1.0 - score
            return np.maximum(1.0 - none, _highest(fed))
        case _:
            return _highest(fed)


def _highest(fed: Sequence[Floats]) -> Floats:
    return reduce(np.maximum, fed)
