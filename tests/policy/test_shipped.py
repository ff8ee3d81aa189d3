"""The policies that come with Guard: complete, and as strict as their names say."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.policy.compile import Policy
from guard.policy.decide import decide, decide_without_scores
from guard.policy.store import PolicyStore
from guard.types import HAZARDS, Action, Role, Scores

STORE = PolicyStore.load(Path(__file__).parents[2] / "policies")
DEFAULT, PERMISSIVE, STRICT = STORE.policies
# Scores just where some policy changes its mind, and anywhere else.
STEPS = sorted(
    {
        score
        for policy in STORE.policies
        for category in policy.categories
        for steps in category.thresholds.values()
        for _, score, _ in steps
    }
)
probabilities = st.just(0.0) | st.sampled_from(STEPS) | st.floats(0, 1)
scores = st.builds(Scores, probabilities, st.fixed_dictionaries(dict.fromkeys(HAZARDS, probabilities)))


def single(score: float) -> Iterable[Scores]:
    """One score at a time, all others 0."""
    nothing = dict.fromkeys(HAZARDS, 0.0)
    yield Scores(score, nothing)
    yield from (Scores(0.0, {**nothing, code: score}) for code in HAZARDS)


def assert_in_order(role: Role, scores: Scores) -> None:
    strict, default, permissive = (decide(policy, role, scores)[0] for policy in (STRICT, DEFAULT, PERMISSIVE))
    assert strict >= default >= permissive, (role, scores)


def test_each_policy_has_every_hazard() -> None:
    """The three policies have the same categories, every hazard feeds one of them, and the overall score another."""
    assert [policy.name for policy in STORE.policies] == ["default", "permissive", "strict"]
    for policy in STORE.policies:
        assert {code for category in policy.categories for code in category.hazards} == set(HAZARDS)
        assert [category.name for category in policy.categories if not category.hazards] == ["unsafe"]
        assert [(category.name, category.title, category.hazards) for category in policy.categories] == [
            (category.name, category.title, category.hazards) for category in DEFAULT.categories
        ]


@pytest.mark.parametrize("role", Role)
def test_each_score_alone_is_judged_in_order_of_strictness(role: Role) -> None:
    """At every threshold of every policy, strict is no milder than default, and default no milder than permissive."""
    for step in STEPS:
        for scores in single(step):
            assert_in_order(role, scores)
    assert decide_without_scores(STRICT, role)[0] >= decide_without_scores(DEFAULT, role)[0]
    assert decide_without_scores(DEFAULT, role)[0] >= decide_without_scores(PERMISSIVE, role)[0]


@given(st.sampled_from(Role), scores)
@settings(deadline=None)
def test_any_scores_are_judged_in_order_of_strictness(role: Role, scores: Scores) -> None:
    """Whatever the model says, strict is no milder than default, and default no milder than permissive."""
    assert_in_order(role, scores)


@pytest.mark.parametrize("policy", STORE.policies, ids=lambda policy: policy.name)
def test_certainty_is_acted_upon(policy: Policy) -> None:
    """Certain harm of users and agents is noticed, certain serious harm is blocked, and what is harmless passes."""
    harmless = Scores(0.0, dict.fromkeys(HAZARDS, 0.0))
    for role in Role:
        assert decide(policy, role, harmless) == (Action.ALLOW, ())
    for role in (Role.USER, Role.AGENT):
        assert all(decide(policy, role, certain)[0] >= Action.FLAG for certain in single(1.0))
        assert decide(policy, role, Scores(0.0, {**harmless.hazards, "S9": 1.0}))[0] is Action.BLOCK
    assert decide(policy, Role.TOOL, Scores(0.0, {**harmless.hazards, "X3": 1.0}))[0] is Action.BLOCK
