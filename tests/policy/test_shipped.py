"""The policies that come with Guard: complete, and as strict as their names say."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.model.normalise import undisguise
from guard.policy.compile import Policy
from guard.policy.decide import decide, decide_without_scores
from guard.policy.store import PolicyStore, policy_files
from guard.policy.testing import files_of, policy_of, run
from guard.types import HAZARDS, Action, Role, Scores

POLICIES = Path(__file__).parents[2] / "policies"
STORE = PolicyStore.load(POLICIES)
GENERAL = DEFAULT, PERMISSIVE, STRICT = tuple(STORE.get(name) for name in ("default", "permissive", "strict"))
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
    """In every policy each hazard feeds a category, and the overall score another; general ones have the same."""
    assert [policy.name for policy in STORE.policies] == [
        "children",
        "default",
        "developer-assistant",
        "permissive",
        "strict",
    ]
    for policy in STORE.policies:
        assert {code for category in policy.categories for code in category.hazards} == set(HAZARDS)
        assert [category.name for category in policy.categories if not category.hazards] == ["unsafe"]
    for policy in GENERAL:
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


@pytest.mark.parametrize("path", files_of(POLICIES), ids=lambda path: path.name)
def test_shipped_policies_pass_their_own_tests(path: Path) -> None:
    """There are at least thirty for each, none needs the model, and no category or rule is left untested."""
    policy = STORE.get(path.name.removesuffix("_test.yaml"))
    result = run(path, policy, lambda text: {text, undisguise(text)})
    assert [(outcome.name, outcome.failures) for outcome in result.outcomes if outcome.failures] == []
    assert len({outcome.name for outcome in result.outcomes}) == len(result.outcomes) >= 30
    assert (result.skipped, result.untested) == (0, ())


def test_every_shipped_policy_has_tests() -> None:
    """A policy without tests is not shipped."""
    assert [policy_of(path) for path in files_of(POLICIES)] == policy_files(POLICIES)
