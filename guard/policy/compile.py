"""A policy as it is served: checked, with everything worked out that can be before the first request."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from guard.policy.schema import ON_ERROR, CategorySpec, PolicySpec
from guard.types import HAZARDS, Action, Role, Scores


@dataclass(frozen=True, slots=True)
class Category:
    """One thing a policy looks for; `hazards` is empty where the overall `unsafe` score is used.

    `thresholds` holds, for each judged role, the actions and the scores they are taken from, strictest first.
    """

    name: str
    title: str
    hazards: tuple[str, ...]
    thresholds: Mapping[Role, tuple[tuple[Action, float], ...]]

    def score(self, scores: Scores) -> float:
        """The highest score of the category's hazards. KeyError where the model scored one of them not at all."""
        return max(scores.hazards[code] for code in self.hazards) if self.hazards else scores.unsafe


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy; its `revision` is a hash of all that a verdict depends on or shows, whatever file and name it has.

    `on_error` has every role.
    """

    name: str
    revision: str
    description: str
    categories: tuple[Category, ...]
    on_error: Mapping[Role, Action]


def compile_policy(name: str, spec: PolicySpec) -> Policy:
    """The served form of a checked policy."""
    categories = tuple(_category(*item) for item in spec.categories.items())
    on_error = {Role(role): Action[action.upper()] for role, action in (dict(ON_ERROR) | spec.on_error).items()}
    revision = _revision(spec.description, categories, on_error)
    return Policy(name, revision, spec.description, categories, MappingProxyType(on_error))


def unknown_hazards(policy: Policy, scored: Collection[str]) -> tuple[str, ...]:
    """The hazards that the policy asks for and a model that scores only `scored` does not know, in order."""
    asked = {code for category in policy.categories for code in category.hazards}
    return tuple(sorted(asked.difference(scored)))


def _category(name: str, spec: CategorySpec) -> Category:
    own = sorted(set(spec.hazards) - HAZARDS.keys())
    hazards = (*(code for code in HAZARDS if code in spec.hazards), *own)  # in this order, whatever the author's
    thresholds = {
        Role(role): tuple(
            sorted(((Action[action.upper()], score) for action, score in by_action.items()), reverse=True)
        )
        for role, by_action in spec.thresholds.items()
    }
    return Category(name, spec.title, hazards, MappingProxyType(thresholds))


def _revision(description: str, categories: tuple[Category, ...], on_error: Mapping[Role, Action]) -> str:
    content = {
        "description": description,
        "on_error": on_error,
        "categories": {c.name: (c.title, c.hazards, {**c.thresholds}) for c in categories},
    }
    canonical = json.dumps(content, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
