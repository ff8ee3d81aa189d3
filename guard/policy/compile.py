"""A policy as it is served: checked, with everything worked out that can be before the first request."""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Literal, NamedTuple

from guard.policy.calibration import Calibration, Unresolvable
from guard.policy.rules import Matcher, Rule, words
from guard.policy.schema import (
    ON_ERROR,
    CategorySpec,
    PolicySpec,
    RefusalSpec,
    RoleName,
    RuleSpec,
    Scoring,
    ThresholdsSpec,
)
from guard.types import DEFINITIONS, HAZARDS, Action, Described, Head, LongInput, Reply, Role, Scores

NO_HEADS: Mapping[str, Head] = MappingProxyType({})
_NO_EXAMPLES: Mapping[str, tuple[tuple[str, bool], ...]] = MappingProxyType({})


class Threshold(NamedTuple):
    """From `score` on, `action` is taken; `reply` is that of a redirect."""

    action: Action
    score: float
    reply: Reply | None = None


Thresholds = Mapping[Role, tuple[Threshold, ...]]
"""For each judged role, its thresholds, strictest first."""


@dataclass(frozen=True, slots=True)
class Category:
    """One thing a policy looks for; `hazards` is empty where the overall `unsafe` score is used.

    A category of the policy's own has one, the name of its head, or its own name where none is fitted. `weights` are
    those of the hazards, where the scoring is weighted.
    """

    name: str
    title: str
    hazards: tuple[str, ...]
    thresholds: Thresholds
    definition: str = ""
    scoring: Scoring = "max"
    weights: tuple[float, ...] = ()

    def score(self, scores: Scores) -> float:
        """The category's score, 0 to 1. KeyError where the model scored one of its hazards not at all."""
        if not self.hazards:
            return scores.unsafe
        hazards = scores.hazards
        found = [hazards[code] for code in self.hazards]
        match self.scoring:
            case "max" | "asked":
                return max(found)
            case "weighted":
                total = 0.0  # not sum(), which rounds otherwise from Python 3.12 on: a replay must give the same
                for weight, score in zip(self.weights, found, strict=True):
                    total += weight * score
                return min(1.0, total)
            case _:
                either = 1.0 - math.prod(1.0 - score for score in found)
                return max(either, *found)  # which rounding may put below a score that stands alone


Judging = tuple[tuple[Category, tuple[Threshold, ...]], ...]
"""The categories that have a say, each with its thresholds, strictest first."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """Thresholds by category, in place of its own, for requests whose metadata holds all of `when`."""

    when: tuple[tuple[str, str], ...]
    thresholds: Mapping[str, Thresholds]

    def applies(self, metadata: Mapping[str, str]) -> bool:
        return all(metadata.get(key) == value for key, value in self.when)


@dataclass(frozen=True, slots=True)
class Debounce:
    """When verdicts on an unfinished turn cut it: so many in a row, or one that is this share above its threshold."""

    consecutive: int = 2
    immediate: float = 0.6


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a filter in front of a backend says no: as an error of its API, or as a reply of the backend's."""

    form: Literal["error", "reply"] = "error"
    text: str = RefusalSpec().text


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy; its `revision` is a hash of all that a verdict depends on or shows, whatever file and name it has.

    `on_error` has every role. `history` is how many earlier turns are context; None is all that fit. Under a policy in
    `shadow` all is judged and told, and the action is ALLOW. `own` are the heads of its own categories, by category;
    None where none is fitted. `described` are the hazards that it looks at, and its own categories, in words.
    """

    name: str
    revision: str
    description: str
    categories: tuple[Category, ...]
    on_error: Mapping[Role, Action]
    rules: tuple[Rule, ...] = ()
    overlays: tuple[Overlay, ...] = ()
    history: int | None = None
    shadow: bool = False
    long_input: LongInput = "head-tail"
    own: Mapping[str, Head | None] = field(default_factory=lambda: NO_HEADS)
    described: tuple[Described, ...] = ()
    stream: Debounce = Debounce()
    refusal: Refusal = Refusal()
    matcher: Matcher = field(default=Matcher(()), compare=False, repr=False)
    _plainly: Mapping[Role, Judging] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plainly", {role: self._judging(role, ()) for role in Role})

    def judging(self, role: Role, metadata: Mapping[str, str]) -> Judging:
        """What judges a turn of a role in a request with that metadata."""
        overlays = [overlay for overlay in reversed(self.overlays) if overlay.applies(metadata)]
        return self._judging(role, overlays) if overlays else self._plainly[role]

    def _judging(self, role: Role, overlays: Iterable[Overlay]) -> Judging:
        """By the thresholds of the first overlay that has any for a category, or the category's own."""
        found = []
        for category in self.categories:
            layers = (*(overlay.thresholds.get(category.name, {}) for overlay in overlays), category.thresholds)
            if thresholds := next((layer[role] for layer in layers if role in layer), ()):
                found.append((category, thresholds))
        return tuple(found)

    def scores(self, given: Mapping[str, float]) -> Scores:
        """Scores as people write them: by `unsafe`, hazards and categories with examples; what is left out is 0."""
        named = {self._code(name): score for name, score in given.items()}
        asked = {code: 0.0 for category in self.categories for code in category.hazards}
        return Scores(named.pop("unsafe", 0.0), dict.fromkeys(HAZARDS, 0.0) | asked | named)

    def _code(self, name: str) -> str:
        head = self.own.get(name)
        return head.name if head else name


def compile_policy(
    name: str,
    spec: PolicySpec,
    calibration: Calibration | None = None,
    heads: Mapping[str, Head] = NO_HEADS,
    examples: Mapping[str, tuple[tuple[str, bool], ...]] = _NO_EXAMPLES,
) -> Policy:
    """The served form of a checked policy, with the heads and a few examples of its own categories, by category.

    `calibration` is needed where a threshold is a target.
    """
    compiler = _Compiler(spec, calibration or Calibration(), heads)
    categories = tuple(compiler.category(*item) for item in spec.categories.items())
    rules = tuple(compiler.rule(*item) for item in spec.rules.items())
    overlays = tuple(
        Overlay(
            tuple(sorted(overlay.when.items())),
            {name: compiler.thresholds(spec.categories[name], found) for name, found in overlay.thresholds.items()},
        )
        for overlay in spec.overlays
    )
    on_error = {Role(role): Action[action.upper()] for role, action in (dict(ON_ERROR) | spec.on_error).items()}
    content = {
        "description": spec.description,
        "mode": spec.mode,
        "history": spec.history,
        "long_input": spec.long_input,
        "on_error": on_error,
        "categories": {category.name: category for category in categories},
        "rules": {rule.name: rule for rule in rules},
        "overlays": overlays,
    }
    if (stream := Debounce(**spec.stream.model_dump())) != Debounce():
        content["stream"] = asdict(stream)
    if (refusal := Refusal(**spec.refusal.model_dump())) != Refusal():
        content["refusal"] = asdict(refusal)
    return Policy(
        name,
        _revision(content),
        spec.description,
        categories,
        MappingProxyType(on_error),
        rules,
        overlays,
        spec.history,
        spec.mode == "shadow",
        spec.long_input,
        MappingProxyType({name: heads.get(name) for name, one in spec.categories.items() if _is_own(one)}),
        _described(categories, spec, examples),
        stream,
        refusal,
        Matcher(rules),
    )


def unknown_hazards(policy: Policy, scored: Collection[str]) -> tuple[str, ...]:
    """The hazards that the policy asks for and a model that scores only `scored` does not know, in order."""
    asked = {code for category in policy.categories if category.name not in policy.own for code in category.hazards}
    return tuple(sorted(asked.difference(scored)))


def _is_own(category: CategorySpec) -> bool:
    return bool(category.examples) or category.score == "asked"


def _described(
    categories: Iterable[Category], spec: PolicySpec, examples: Mapping[str, tuple[tuple[str, bool], ...]]
) -> tuple[Described, ...]:
    """The hazards of the taxonomy in its order, then the policy's own categories in that of the file."""
    fed = {code for category in categories for code in category.hazards}
    hazards = [Described(code, title.capitalize(), DEFINITIONS[code]) for code, title in HAZARDS.items() if code in fed]
    own = [
        Described(category.hazards[0], category.title, category.definition, examples.get(category.name, ()))
        for category in categories
        if _is_own(spec.categories[category.name])
    ]
    return (*hazards, *own)


def resolve(calibration: Calibration, role: Role, spec: CategorySpec, threshold: float | Mapping[str, float]) -> float:
    """A threshold as a number. Raises Unresolvable where it is a target that nothing measured can tell."""
    if isinstance(threshold, float):
        return threshold
    ((target, share),) = threshold.items()
    if spec.examples:
        raise Unresolvable("a number, as `guard policy fit` finds it, since no model was measured on your own category")
    if spec.score == "asked":
        raise Unresolvable("a number, since no model was measured on a category in words")
    if spec.score in ("weighted", "any"):
        raise Unresolvable(f"a number, since what is measured is no `score: {spec.score}`")
    return calibration.threshold(role, tuple(spec.hazards) or ("unsafe",), target, share)


@dataclass(frozen=True, slots=True)
class _Compiler:
    spec: PolicySpec
    calibration: Calibration
    heads: Mapping[str, Head]

    def category(self, name: str, spec: CategorySpec) -> Category:
        own = sorted(set(spec.hazards) - HAZARDS.keys())
        if _is_own(spec):
            own = [self.heads[name].name if name in self.heads else name]
        hazards = (*(code for code in HAZARDS if code in spec.hazards), *own)  # in this order, whatever the author's
        weights = tuple(spec.hazards[code] for code in hazards) if isinstance(spec.hazards, dict) else ()
        thresholds = self.thresholds(spec, spec.thresholds)
        return Category(name, spec.title, hazards, thresholds, spec.definition, spec.score, weights)

    def thresholds(self, category: CategorySpec, by_role: Mapping[RoleName, ThresholdsSpec]) -> Thresholds:
        return MappingProxyType(
            {
                Role(role): tuple(
                    Threshold(
                        Action[action.upper()],
                        resolve(self.calibration, Role(role), category, threshold),
                        self._reply(reply),
                    )
                    for action, threshold, reply in reversed(thresholds.steps())
                )
                for role, thresholds in by_role.items()
            }
        )

    def rule(self, name: str, spec: RuleSpec) -> Rule:
        return Rule(
            name,
            spec.category or "",
            frozenset(map(Role, spec.roles)),
            Action[spec.action.upper()],
            self._reply(spec.reply),
            tuple(sorted(set(map(words, spec.terms)))),
            spec.pattern or "",
            tuple(sorted(set(map(words, spec.exceptions)))),
        )

    def _reply(self, name: str | None) -> Reply | None:
        return None if name is None else Reply(name, self.spec.replies[name])


def _revision(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _plain(part: object) -> object:
    """What JSON has no word for."""
    match part:
        case Category() | Rule() | Overlay() | Reply():
            return {field.name: getattr(part, field.name) for field in fields(part)}
        case Mapping():
            return dict(part)
        case _:
            return sorted(part)  # type: ignore[call-overload]  # the roles of a rule
