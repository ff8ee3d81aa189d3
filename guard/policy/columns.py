"""Many turns at once: what a policy says about columns of scores, the same that guard.policy.decide says one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from guard.policy.compile import Category, Policy, Threshold
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
    """Where one ground is violated, [turns]: the action, or 0; score and threshold are 0 there, and of a rule."""

    action: Actions
    score: Floats
    threshold: Floats

    @classmethod
    def nothing(cls, turns: int) -> "Found":
        return cls(np.zeros(turns, np.int8), np.zeros(turns), np.zeros(turns))


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The action of every turn, [turns], and its violations by what they are about."""

    action: Actions
    found: Mapping[Ground, Found]


def judge(policy: Policy, turns: Columns) -> Judged:
    """What the policy says about each turn: `decide` where it is scored, `decide_without_scores` where it is not."""
    found = {(rule.category, rule.name): Found.nothing(len(turns.roles)) for rule in policy.rules}
    for rule in policy.rules:
        spoken = np.isin(turns.roles, [ROLES.index(role) for role in rule.roles])
        found[rule.category, rule.name].action[spoken & turns.hits[rule.name]] = rule.action
    scored = {role: np.flatnonzero(turns.scored & (turns.roles == number)) for number, role in enumerate(ROLES)}
    found |= {(category.name, ""): _by_score(policy, category, turns, scored) for category in policy.categories}
    on_error = np.array([policy.on_error[role] for role in ROLES], np.int8)
    action = np.where(turns.scored, np.int8(Action.ALLOW), on_error[turns.roles])
    for one in found.values():
        np.maximum(action, one.action, out=action)
    return Judged(np.zeros_like(action) if policy.shadow else action, found)


def _by_score(policy: Policy, category: Category, turns: Columns, scored: Mapping[Role, Rows]) -> Found:
    found = Found.nothing(len(turns.roles))
    overlays = [overlay for overlay in reversed(policy.overlays) if category.name in overlay.thresholds]
    score = _score(category, turns.scores)
    for role, rows in scored.items():
        for overlay in overlays:
            if role in overlay.thresholds[category.name]:
                applies = np.logical_and.reduce([turns.metadata[pair][rows] for pair in overlay.when])
                _reach(overlay.thresholds[category.name][role], score, rows[applies], found)
                rows = rows[~applies]
        _reach(category.thresholds.get(role, ()), score, rows, found)
    return found


def _reach(thresholds: Sequence[Threshold], score: Floats, rows: Rows, found: Found) -> None:
    """Writes down the strictest action that is reached; whatever reaches it reaches the milder ones."""
    for action, threshold, _ in reversed(thresholds):
        rows = rows[score[rows] >= threshold]
        found.action[rows] = action
        found.score[rows] = score[rows]
        found.threshold[rows] = threshold


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
