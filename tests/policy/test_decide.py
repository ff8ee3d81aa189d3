"""The laws of a verdict: what scores and a policy must give, whatever they are."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy.compile import Category, Policy, compile_policy
from guard.policy.decide import decide, decide_without_scores
from guard.policy.schema import PolicySpec, Scoring
from guard.policy.store import load_policy
from guard.types import HAZARDS, Action, Coverage, Reply, Role, Scores, Verdict, Violation
from tests.policy.files import CALIBRATION, WHOLE, write

# Few values, so that scores often equal thresholds and each other.
probabilities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0, 1)
roles = st.sampled_from(Role)
scores = st.builds(Scores, probabilities, st.fixed_dictionaries(dict.fromkeys(HAZARDS, probabilities)))


@st.composite
def thresholds(draw: st.DrawFn) -> dict[str, float]:
    flag, block = sorted(draw(st.tuples(probabilities, probabilities)))
    return draw(st.sampled_from([{"flag": flag, "block": block}, {"flag": flag}, {"block": block}]))


categories = st.fixed_dictionaries(
    {"title": st.just("Title"), "thresholds": st.dictionaries(roles.map(str), thresholds(), min_size=1)}
).flatmap(
    lambda category: (
        st.lists(st.sampled_from(sorted(HAZARDS)), min_size=1, max_size=3, unique=True).map(
            lambda hazards: {**category, "hazards": tuple(hazards)}
        )
        | st.just({**category, "score": "unsafe"})
    )
)
policies = st.dictionaries(st.sampled_from("abcd"), categories, min_size=1).map(
    lambda found: compile_policy("p", PolicySpec.model_validate({"description": "Any.", "categories": found}))
)


def policy(thresholds: dict[str, dict[str, float]]) -> Policy:
    """A policy on the user's turns, with categories named after the one hazard each that feeds them."""
    found = {
        code.lower(): {"title": code, "hazards": (code,), "thresholds": {"user": steps}}
        for code, steps in thresholds.items()
    }
    return compile_policy("p", PolicySpec.model_validate({"description": "Few.", "categories": found}))


def test_violations_stand_strictest_first_then_by_margin() -> None:
    """A score at its threshold violates; of one category only the strictest action reached is told."""
    judged = policy(
        {"S1": {"flag": 0.5, "block": 0.75}, "S2": {"flag": 0.25}, "S3": {"flag": 0.5}, "S4": {"flag": 0.5}}
    )
    action, violations = decide(judged, Role.USER, Scores(0.0, {"S1": 0.75, "S2": 0.5, "S3": 1.0, "S4": 0.49}))
    assert action is Action.BLOCK
    assert violations == (
        Violation("s1", Action.BLOCK, 0.75, 0.75),
        Violation("s3", Action.FLAG, 1.0, 0.5),
        Violation("s2", Action.FLAG, 0.5, 0.25),
    )
    assert decide(judged, Role.TOOL, Scores(1.0, dict.fromkeys(HAZARDS, 1.0))) == (Action.ALLOW, ())


@given(policies, roles, scores)
@settings(deadline=None)
def test_the_action_is_the_strictest_violation(policy: Policy, role: Role, scores: Scores) -> None:
    """The action is the strictest of the violations, and each of them is true of the category it names."""
    action, violations = decide(policy, role, scores)
    assert action == max((violation.action for violation in violations), default=Action.ALLOW)
    named = {violation.category: violation for violation in violations}
    for category in policy.categories:
        score = max((scores.hazards[code] for code in category.hazards), default=scores.unsafe)
        reached = [step for step in category.thresholds.get(role, ()) if score >= step.score]
        found = named.pop(category.name, None)
        assert (found is None) == (not reached)
        assert found is None or (found.score == score and (found.action, found.threshold) == max(reached)[:2])
    assert not named


@given(policies, roles, scores, st.sampled_from(["unsafe", *HAZARDS]), probabilities)
@settings(deadline=None)
def test_a_higher_score_is_never_judged_milder(
    policy: Policy, role: Role, scores: Scores, raised: str, score: float
) -> None:
    """Raising one score leaves the action or makes it stricter."""
    if raised == "unsafe":
        higher = replace(scores, unsafe=max(scores.unsafe, score))
    else:
        higher = replace(scores, hazards={**scores.hazards, raised: max(scores.hazards[raised], score)})
    assert decide(policy, role, higher)[0] >= decide(policy, role, scores)[0]


@given(policies, roles, scores, st.floats(0, 1))
@settings(deadline=None)
def test_lower_thresholds_are_never_milder(policy: Policy, role: Role, scores: Scores, share: float) -> None:
    """A policy whose every threshold is lowered gives the same action or a stricter one."""
    lowered = tuple(
        replace(
            category,
            thresholds={
                role: tuple(step._replace(score=step.score * share) for step in steps)
                for role, steps in category.thresholds.items()
            },
        )
        for category in policy.categories
    )
    assert decide(replace(policy, categories=lowered), role, scores)[0] >= decide(policy, role, scores)[0]


def test_without_scores_the_policy_answers_by_role() -> None:
    """What a policy does not say of a failed model is filled in: turns that nothing judges later are blocked."""
    spec = {
        "description": "Fails.",
        "on_error": {"user": "block"},
        "categories": {"any": {"title": "Any", "score": "unsafe", "thresholds": {"user": {"flag": 0.5}}}},
    }
    failing = compile_policy("p", PolicySpec.model_validate(spec))
    assert {role: decide_without_scores(failing, role)[0] for role in Role} == {
        Role.USER: Action.BLOCK,
        Role.AGENT: Action.BLOCK,
        Role.SYSTEM: Action.ALLOW,
        Role.TOOL: Action.BLOCK,
    }


def whole(directory: Path, **changes: str) -> Policy:
    """The policy that uses the whole language, with some lines exchanged."""
    text = WHOLE
    for old, new in changes.items():
        text = text.replace(f"{old}: enforce", f"{old}: {new}")
    return load_policy(write(directory, text), CALIBRATION)


def scored(**hazards: float) -> Scores:
    return Scores(0.0, {**dict.fromkeys(HAZARDS, 0.0), **hazards})


def test_scores_are_weighed_as_the_category_says(tmp_path: Path) -> None:
    """weighted: the sum, at most 1. any: one of them, were they independent."""
    categories = {category.name: category for category in whole(tmp_path).categories}
    assert categories["leaks"].score(scored(S7=0.5, S8=0.25)) == 0.5
    assert categories["leaks"].score(scored(S7=1.0, S8=1.0)) == 1.0
    assert categories["hate"].score(scored(S10=0.5, X1=0.5)) == 0.75
    assert categories["crime"].score(scored(S1=0.5, S2=0.25)) == 0.5


def test_a_redirect_names_its_reply(tmp_path: Path) -> None:
    """The reply is that of the first violation of the strictest action; a blocked turn has none."""
    policy = whole(tmp_path)
    action, violations = decide(policy, Role.USER, scored(S11=0.3, S10=0.5))
    assert (action, violations[0].category, violations[0].reply) == (
        Action.REDIRECT,
        "self-harm",
        Reply("crisis-line", "You are not alone. Call 988."),
    )
    assert [violation.category for violation in violations] == ["self-harm", "hate"]
    assert Verdict(0, action, violations, None, Coverage(1, 1)).reply == violations[0].reply
    action, violations = decide(policy, Role.USER, scored(S11=0.3, S10=0.95))
    assert (action, Verdict(0, action, violations, None, Coverage(1, 1)).reply) == (Action.BLOCK, None)


def test_a_rule_stands_before_scores(tmp_path: Path) -> None:
    """It counts for its roles alone, as the category that it names or as none, and also where the model failed."""
    policy = whole(tmp_path)
    hits = {"secrets", "card-number"}
    action, violations = decide(policy, Role.AGENT, scored(S7=1.0), hits)
    assert action is Action.BLOCK
    assert [(violation.rule, violation.category) for violation in violations] == [
        ("secrets", "leaks"),
        ("", "leaks"),
        ("card-number", ""),
    ]
    assert decide(policy, Role.TOOL, scored(), hits) == (Action.ALLOW, ())
    action, violations = decide_without_scores(policy, Role.AGENT, {"card-number"})
    assert (action, violations[0].rule) == (Action.BLOCK, "card-number")
    assert decide_without_scores(policy, Role.SYSTEM, hits) == (Action.ALLOW, ())


@pytest.mark.parametrize(
    ("metadata", "role", "action"),
    [
        ({}, Role.USER, Action.ALLOW),
        ({"app": "adults"}, Role.USER, Action.ALLOW),
        ({"app": "kids"}, Role.USER, Action.BLOCK),
        ({"app": "kids", "tenant": "other", "more": "x"}, Role.USER, Action.BLOCK),
        ({"app": "kids", "tenant": "acme"}, Role.USER, Action.ALLOW),
        ({"app": "kids", "tenant": "acme"}, Role.TOOL, Action.FLAG),
        ({"tenant": "acme"}, Role.TOOL, Action.ALLOW),
    ],
)
def test_overlays_stand_in_place_of_thresholds(
    tmp_path: Path, metadata: dict[str, str], role: Role, action: Action
) -> None:
    """Where all that they ask for is in the metadata; of several, the later one."""
    low = {Role.USER: 0.25, Role.TOOL: 0.5}[role]
    assert decide(whole(tmp_path), role, scored(S10=low), (), metadata)[0] is action


@given(roles, scores, st.sets(st.sampled_from(["secrets", "card-number"])))
@settings(max_examples=20)
def test_shadow_tells_the_same_and_allows_all(role: Role, scores: Scores, hits: set[str]) -> None:
    """With and without scores: the violations are those of the policy in force, the action is ALLOW."""
    with TemporaryDirectory() as directory:
        enforced, shadow = (whole(Path(directory), mode=mode) for mode in ("enforce", "shadow"))
    assert shadow.revision != enforced.revision
    assert decide(shadow, role, scores, hits) == (Action.ALLOW, decide(enforced, role, scores, hits)[1])
    assert decide_without_scores(shadow, role, hits)[0] is Action.ALLOW


@given(scores, st.sampled_from(sorted(HAZARDS)), probabilities)
def test_every_way_to_score_is_monotone(scores: Scores, raised: str, score: float) -> None:
    """A higher score of a hazard never lowers that of a category."""
    higher = replace(scores, hazards={**scores.hazards, raised: max(scores.hazards[raised], score)})
    for scoring in get_args(Scoring):
        category = Category("c", "C", ("S1", "S2", raised), {}, "", scoring, (0.5, 0.3, 0.4))
        assert 0 <= category.score(scores) <= category.score(higher) <= 1
