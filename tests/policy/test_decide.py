"""The laws of a verdict: what scores and a policy must give, whatever they are."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy.compile import Policy, compile_policy
from guard.policy.decide import decide, decide_without_scores
from guard.policy.schema import PolicySpec
from guard.types import HAZARDS, Action, Role, Scores, Violation

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
        reached = [step for step in category.thresholds.get(role, ()) if score >= step[1]]
        found = named.pop(category.name, None)
        assert (found is None) == (not reached)
        assert found is None or (found.score == score and (found.action, found.threshold) == max(reached))
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
                role: tuple((action, score * share) for action, score in steps)
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
    assert {role: decide_without_scores(failing, role) for role in Role} == {
        Role.USER: Action.BLOCK,
        Role.AGENT: Action.BLOCK,
        Role.SYSTEM: Action.ALLOW,
        Role.TOOL: Action.BLOCK,
    }
