"""Which conversations a candidate answers, and in what two verdicts differ."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from guard.policy.rollout import Candidate, Flip, flips
from guard.types import Action, Coverage, Verdict, Violation
from tests.stand_ins import POLICY

percents = st.floats(0, 100)
violations = st.builds(
    Violation, st.sampled_from(["hate", "crime"]), st.sampled_from(Action), rule=st.sampled_from(["", "terms"])
)
verdicts = st.builds(
    Verdict,
    st.just(0),
    st.sampled_from(Action),
    st.lists(violations, unique_by=lambda violation: (violation.category, violation.rule), max_size=3).map(tuple),
    st.none(),
    st.just(Coverage(1, 1)),
)


def candidate(percent: float) -> Candidate:
    return Candidate(POLICY, percent, 0.0, b"")


@given(st.text(), percents, percents)
def test_what_is_in_a_share_is_in_a_larger_one(conversation: str, one: float, other: float) -> None:
    """So that a canary that grows changes sides for nobody twice; all and none are what they say."""
    small, large = sorted((one, other))
    assert not candidate(small).answers(conversation) or candidate(large).answers(conversation)
    assert candidate(100).answers(conversation)
    assert not candidate(0).answers(conversation)


def test_a_share_is_that_of_the_conversations() -> None:
    """Of many, about so many in a hundred, and others for another revision."""
    one = candidate(20)
    other = replace(one, policy=replace(POLICY, revision="1111"))
    chosen = [{n for n in range(10_000) if tried.answers(str(n))} for tried in (one, other)]
    assert all(1_850 < len(found) < 2_150 for found in chosen)
    assert 300 < len(chosen[0] & chosen[1]) < 500


@given(verdicts, verdicts)
def test_flips_are_what_differs(live: Verdict, tried: Verdict) -> None:
    """Nothing where nothing does, and the same the other way round."""
    assert list(flips(live, live)) == []
    there, back = set(flips(live, tried)), set(flips(tried, live))
    assert {Flip(flip.about, flip.candidate, flip.live) for flip in there} == back
    assert (live.action is tried.action) == all(flip.about != "verdict" for flip in there)
    assert all(flip.live is not flip.candidate for flip in there)
