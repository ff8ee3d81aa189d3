"""Tests beside a policy, NAME_test.yaml: turns with scores or for the model to score, and what must be said of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from guard.policy.compile import Policy
from guard.policy.decide import decide
from guard.policy.document import Document, Loc
from guard.policy.messages import found, one_of
from guard.policy.read import checked
from guard.policy.schema import Name, Probability, RoleName, Spec, Text
from guard.types import HAZARDS, Action, Conversation, Role, Scores, Turn

_SUFFIX = "_test.yaml"
_ROOM = 0.05  # on both sides of a score that is recorded

Model = Callable[[Conversation, Mapping[str, str]], Scores]
"""The scores of a conversation's target, under the policy's history."""
Views = Callable[[str], Iterable[str]]
"""The views of a text that rules look at."""


class ExpectSpec(Spec):
    """What must be said of the turn; what is not written may be anything."""

    action: Literal["allow", "flag", "redirect", "block"]
    categories: tuple[Name, ...] | None = Field(default=None, description="Those violated, all of them, in any order.")
    rules: tuple[Name, ...] | None = Field(default=None, description="Those that match, all of them, in any order.")
    reply: Name | None = None
    scores: dict[Name, tuple[Probability, Probability]] = Field(
        default_factory=dict, description="By category: the lowest and the highest score that it may have."
    )


class CaseSpec(Spec):
    """One turn. With `scores` it is judged by those, and its text by the rules; without, the model must score it."""

    name: Text
    role: RoleName = "user"
    text: str | None = None
    before: tuple[dict[RoleName, str], ...] = Field(default=(), description="Earlier turns, such as {user: Hello}.")
    scores: dict[str, Probability] | None = Field(
        default=None, description="`unsafe`, hazard codes, categories with examples; those that are not written are 0."
    )
    metadata: dict[Text, Text] = Field(default_factory=dict)
    expect: ExpectSpec | None = Field(default=None, description="May be left out until --update has recorded it.")

    @model_validator(mode="after")
    def _can_be_judged(self) -> "CaseSpec":
        if self.scores is None and self.text is None:
            raise PydanticCustomError("case", "scores, or a text for the model to score", {"found": "neither"})
        if self.scores is not None and self.before:
            raise PydanticCustomError("case", "no earlier turns beside scores, which nothing reads", {"found": "both"})
        return self


class CasesSpec(Spec):
    """A file of tests."""

    tests: tuple[CaseSpec, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Judged:
    """What was said of a turn; the scores are those of the categories that judge its role."""

    action: str
    categories: tuple[str, ...]
    rules: tuple[str, ...]
    reply: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one test: what is otherwise than expected, if anything. `judged` is None where it needs the model."""

    name: str
    judged: Judged | None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """Of one file of tests; `untested` are the categories and rules that no passed test violates."""

    path: Path
    policy: Policy
    outcomes: tuple[Outcome, ...]
    untested: tuple[str, ...]

    @property
    def failed(self) -> int:
        return sum(bool(outcome.failures) for outcome in self.outcomes)

    @property
    def skipped(self) -> int:
        return sum(outcome.judged is None for outcome in self.outcomes)


def files_of(path: Path) -> list[Path]:
    """The tests that a path stands for: a file of them, a policy's, or those of a directory."""
    if path.is_dir():
        return sorted(path.glob(f"*{_SUFFIX}"))
    return [path if path.name.endswith(_SUFFIX) else path.with_name(f"{path.stem}{_SUFFIX}")]


def policy_of(tests: Path) -> Path:
    """The policy that a file of tests is for."""
    return tests.with_name(f"{tests.name.removesuffix(_SUFFIX)}.yaml")


def read_tests(path: Path, policy: Policy) -> CasesSpec:
    """Raises PolicyError with every problem, an expectation that no verdict of the policy can meet among them."""
    document = Document(path)
    spec = checked(document, CasesSpec, {"tests": ({"name": "-", "scores": {}},)})
    for index, case in enumerate(spec.tests):
        for loc, problem in _impossible(case, policy):
            document.report(("tests", index, *loc), problem)
    document.raise_problems()
    return spec


def run(path: Path, policy: Policy, views: Views, model: Model | None = None) -> Result:
    """Judges every test of a file as if the policy were enforced. Raises PolicyError as `read_tests` does."""
    spec = read_tests(path, policy)
    outcomes = tuple(_run(case, replace(policy, shadow=False), views, model) for case in spec.tests)
    passed = [outcome.judged for outcome in outcomes if outcome.judged and not outcome.failures]
    tested = {name for judged in passed for name in (*judged.categories, *judged.rules)}
    names = [category.name for category in policy.categories] + [rule.name for rule in policy.rules]
    return Result(path, policy, outcomes, tuple(name for name in names if name not in tested))


def update(result: Result) -> int:
    """Writes what was judged into the file in place of what was expected, and keeps the rest. Returns how many changed.

    Only what stands in an expectation is written anew; where there was none, the action and the categories.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(result.path)
    for case, outcome in zip(data["tests"], result.outcomes, strict=True):
        if outcome.judged and outcome.failures:
            _record(case.setdefault("expect", {"action": "", "categories": []}), outcome.judged)
    if result.failed:
        yaml.dump(data, result.path)
    return result.failed


def _run(case: CaseSpec, policy: Policy, views: Views, model: Model | None) -> Outcome:
    role = Role(case.role)
    if case.scores is not None:
        scores = policy.scores(case.scores)
    elif model is not None:
        scores = model(_conversation(case), case.metadata)
    else:
        return Outcome(case.name, None)
    hits = policy.matcher.hits(views(case.text or ""))
    action, violations = decide(policy, role, scores, hits, case.metadata)
    judged = Judged(
        action.name.lower(),
        tuple(dict.fromkeys(violation.category for violation in violations if violation.category)),
        tuple(violation.rule for violation in violations if violation.rule),
        violations[0].reply.name if action is Action.REDIRECT and violations[0].reply else None,
        {one.name: one.score(scores) for one, _ in policy.judging(role, case.metadata)},
    )
    return Outcome(case.name, judged, tuple(_failures(case.expect, judged)))


def _conversation(case: CaseSpec) -> Conversation:
    before = [Turn(Role(role), text) for turn in case.before for role, text in turn.items()]
    return Conversation((*before, Turn(Role(case.role), case.text or "")), len(before))


def _failures(expect: ExpectSpec | None, judged: Judged) -> Iterator[str]:
    if expect is None:
        yield "nothing is expected; --update records what is"
        return
    if expect.action != judged.action:
        yield f"expected {expect.action}, found {judged.action}"
    for what, wanted, got in (
        ("categories", expect.categories, judged.categories),
        ("rules", expect.rules, judged.rules),
    ):
        if wanted is not None and set(wanted) != set(got):
            yield f"expected the {what} {_listed(wanted)}, found {_listed(got)}"
    if expect.reply is not None and expect.reply != judged.reply:
        yield f"expected the reply {expect.reply}, found {judged.reply or 'none'}"
    for name, (low, high) in expect.scores.items():
        if not low <= judged.scores[name] <= high:
            yield f"expected {name} from {low:g} to {high:g}, found {judged.scores[name]:.3f}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _impossible(case: CaseSpec, policy: Policy) -> Iterator[tuple[Loc, str]]:
    """What no verdict of the policy on such a turn can hold, and scores that it does not look at."""
    role = Role(case.role)
    fed = {code for one in policy.categories if one.name not in policy.own for code in one.hazards}
    known = ["unsafe", *HAZARDS, *sorted({*fed, *policy.own} - HAZARDS.keys())]
    for code in case.scores or {}:
        if code not in known:
            yield ("scores", code), one_of(known, code)
    steps = {category.name: thresholds for category, thresholds in policy.judging(role, case.metadata)}
    rules = {rule.name: rule for rule in policy.rules if role in rule.roles and case.text}
    violable = sorted({*steps, *(rule.category for rule in rules.values() if rule.category)})
    replies = [*(step.reply for one in steps.values() for step in one), *(rule.reply for rule in rules.values())]
    actions = {Action.ALLOW, *(step.action for one in steps.values() for step in one)}
    actions |= {rule.action for rule in rules.values()}
    if (expect := case.expect) is None:
        return
    for key, names, choices in (
        ("categories", expect.categories or (), violable),
        ("rules", expect.rules or (), list(rules)),
        ("reply", (expect.reply,) if expect.reply else (), sorted({reply.name for reply in replies if reply})),
        ("scores", tuple(expect.scores), list(steps)),
        ("action", (expect.action,), [action.name.lower() for action in sorted(actions)]),
    ):
        for index, name in enumerate(names):
            if name not in choices:
                place = (index,) if key in ("categories", "rules") else (name,) if key == "scores" else ()
                yield ("expect", key, *place), f"{one_of(choices, name)}; no {case.role} turn can have it here"
    if expect.action == "allow" and (expect.categories or expect.rules):
        yield ("expect", "action"), "expected an action beside categories and rules, found 'allow'"
    if expect.action != "redirect" and expect.reply:
        yield ("expect", "reply"), f"expected no reply beside {found(expect.action)}, found {found(expect.reply)}"
    for name, (low, high) in expect.scores.items():
        if low > high:
            yield ("expect", "scores", name), f"expected the lowest score first, found [{low:g}, {high:g}]"


def _record(expect: dict[str, Any], judged: Judged) -> None:
    """Into the keys of an expectation, a mapping of ruamel's that knows how it was written."""
    for key in list(expect):
        if key == "scores":
            for name, (low, high) in expect[key].items():
                score = judged.scores[name]
                if not low <= score <= high:
                    expect[key][name] = _flow(round(max(0.0, score - _ROOM), 2), round(min(1.0, score + _ROOM), 2))
        elif key in ("categories", "rules"):
            expect[key] = _flow(*getattr(judged, key))
        elif (value := getattr(judged, key)) is None:
            del expect[key]
        else:
            expect[key] = value


def _flow(*items: object) -> CommentedSeq:
    """A list on one line."""
    sequence = CommentedSeq(items)
    sequence.fa.set_flow_style()
    return sequence
