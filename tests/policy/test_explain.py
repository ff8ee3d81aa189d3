"""Why a turn was judged as it was: what is told holds for any scores."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from guard.policy.decide import decide
from guard.policy.explain import explain
from guard.policy.store import load_policy
from guard.types import HAZARDS, Action, Role, Scores
from tests.policy.files import CALIBRATION, write

with TemporaryDirectory() as directory:
    POLICY = load_policy(write(Path(directory)), CALIBRATION)
probabilities = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75, 1.0]) | st.floats(0, 1)
scores = st.builds(Scores, probabilities, st.fixed_dictionaries(dict.fromkeys(HAZARDS, probabilities)))
metadata = st.sampled_from([{}, {"app": "kids"}, {"app": "kids", "tenant": "acme"}])


@given(st.sampled_from(Role), scores, st.sets(st.sampled_from(["secrets", "card-number"])), metadata)
def test_an_explanation_is_that_of_the_verdict(
    role: Role, scores: Scores, hits: set[str], metadata: dict[str, str]
) -> None:
    """The same action and violations; what is decisive has that action, what is missed is not reached."""
    told = explain(POLICY, role, scores, hits, metadata)
    assert (told.action, told.violations) == decide(POLICY, role, scores, hits, metadata)
    assert all(violation.action is told.action for violation in told.decisive)
    assert bool(told.decisive) == (told.action is not Action.ALLOW)
    reached = {step.category for step in told.steps if step.gap <= 0}
    assert reached == {violation.category for violation in told.violations if not violation.rule}
    gaps = [step.gap for step in told.steps if step.gap > 0]
    assert (told.nearest.gap if told.nearest else None) == min(gaps, default=None)
    stricter = [step.gap for step in told.steps if step.gap > 0 and step.action > told.action]
    assert (told.stricter.gap if told.stricter else None) == min(stricter, default=None)
