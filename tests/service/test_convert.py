"""What the wire makes of verdicts and policies that use the whole language."""

from pathlib import Path

from guard.policy.decide import decide
from guard.policy.store import load_policy
from guard.service.convert import from_decision, from_policy
from guard.types import HAZARDS, Coverage, Decision, Revision, Role, Scores, Verdict
from guard.v1 import moderation_pb2 as pb
from tests.policy.files import CALIBRATION, WHOLE, write


def answer(directory: Path, text: str = WHOLE) -> pb.Verdict:
    """On a user's turn that a rule and a score redirect."""
    policy = load_policy(write(directory, text), CALIBRATION)
    scores = Scores(0.5, {**dict.fromkeys(HAZARDS, 0.0), "S11": 0.5})
    action, violations = decide(policy, Role.USER, scores, {"card-number"})
    verdict = Verdict(0, action, violations, scores, Coverage(1, 1), shadow=policy.shadow)
    decision = Decision("id", (verdict,), Revision("whole", policy.revision), Revision("model", "00"))
    return from_decision(decision, pb.SCORE_DETAIL_NONE).verdict


def test_a_redirect_carries_its_reply(tmp_path: Path) -> None:
    """That of the rule, which stands first; a rule has a name and no score."""
    assert answer(tmp_path) == pb.Verdict(
        action=pb.ACTION_REDIRECT,
        violations=[
            pb.Violation(action=pb.ACTION_REDIRECT, rule="card-number"),
            pb.Violation(category="self-harm", action=pb.ACTION_REDIRECT, score=0.5, threshold=0.25, margin=0.25),
        ],
        coverage=pb.Coverage(seen=1, total=1),
        reply=pb.Reply(name="house-rules", text="Please keep to the rules of the house."),
    )


def test_a_verdict_in_shadow_says_so(tmp_path: Path) -> None:
    """It is allowed, has no reply, and tells what was found."""
    verdict = answer(tmp_path, WHOLE.replace("mode: enforce", "mode: shadow"))
    assert (verdict.action, verdict.shadow, verdict.HasField("reply")) == (pb.ACTION_ALLOW, True, False)
    assert [violation.action for violation in verdict.violations] == [pb.ACTION_REDIRECT] * 2


def test_a_policy_is_told_with_its_rules(tmp_path: Path) -> None:
    """And how each category is scored, and from which numbers on."""
    policy = from_policy(load_policy(write(tmp_path), CALIBRATION))
    assert [(category.name, category.scoring) for category in policy.categories] == [
        ("self-harm", "max"),
        ("leaks", "weighted"),
        ("hate", "any"),
        ("crime", "max"),
    ]
    assert policy.categories[0].thresholds == [pb.Threshold(role=pb.ROLE_USER, action=pb.ACTION_REDIRECT, score=0.25)]
    assert policy.categories[1].definition == "What only we may know."
    assert policy.rules == [
        pb.Rule(name="secrets", category="leaks", roles=[pb.ROLE_AGENT], action=pb.ACTION_BLOCK),
        pb.Rule(name="card-number", roles=[pb.ROLE_USER, pb.ROLE_AGENT], action=pb.ACTION_REDIRECT),
    ]
