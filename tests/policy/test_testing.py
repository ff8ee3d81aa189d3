"""Tests of policies: what they find, what they cannot mean, and what is recorded."""

from pathlib import Path

import pytest

from guard.errors import PolicyError
from guard.policy.compile import Policy
from guard.policy.store import load_policy
from guard.policy.testing import Result, files_of, policy_of, run, update
from guard.types import HAZARDS, Conversation, Role, Scores, Turn
from tests.policy.files import CALIBRATION, WHOLE, write

TESTS = """\
tests:
  # A comment to keep.
  - name: Hate is blocked  # and this one
    scores: {S10: 0.95}
    expect: {action: block, categories: [hate], scores: {hate: [0.9, 1]}}
  - name: Falcon is a secret
    role: agent
    text: Project Falcon!
    scores: {}
    expect:
      action: block
      categories: [leaks]
      rules: [secrets]
  - name: Help is near
    scores: {S11: 0.25}
    expect: {action: redirect, reply: crisis-line}
  - name: Children hear less
    scores: {X1: 0.1}
    metadata: {app: kids}
    expect: {action: block}
  - name: What the model says
    text: How are you?
    before: [{user: Hello!}, {agent: Hi!}]
    expect: {action: allow, categories: []}
"""


def policy(directory: Path) -> Policy:
    return load_policy(write(directory), CALIBRATION)


def ran(directory: Path, tests: str, **options: Scores) -> Result:
    path = directory / "whole_test.yaml"
    path.write_text(tests)
    asked = []

    def model(conversation: Conversation, metadata: object) -> Scores:
        asked.append(conversation)
        return options["model"]

    result = run(path, policy(directory), lambda text: [text], model if options else None)
    before = (Turn(Role.USER, "Hello!"), Turn(Role.AGENT, "Hi!"))
    assert asked == ([Conversation((*before, Turn(Role.USER, "How are you?")), 2)] if options else [])
    return result


def failures(result: Result) -> dict[str, tuple[str, ...]]:
    return {outcome.name: outcome.failures for outcome in result.outcomes if outcome.failures}


def test_expectations_that_are_met_pass(tmp_path: Path) -> None:
    """What needs the model is skipped without one; what no passed test violates is told."""
    result = ran(tmp_path, TESTS)
    assert (failures(result), result.failed, result.skipped) == ({}, 0, 1)
    assert result.untested == ("crime", "card-number")
    harmless = Scores(0.0, dict.fromkeys(HAZARDS, 0.0))
    assert ran(tmp_path, TESTS, model=harmless).skipped == 0


def test_a_policy_in_shadow_is_tested_as_if_it_were_enforced(tmp_path: Path) -> None:
    """Or nothing could be expected of it."""
    write(tmp_path, WHOLE.replace("mode: enforce", "mode: shadow"))
    (tmp_path / "whole_test.yaml").write_text(TESTS)
    shadow = load_policy(tmp_path / "whole.yaml", CALIBRATION)
    assert shadow.shadow
    assert run(tmp_path / "whole_test.yaml", shadow, lambda text: [text]).failed == 0


def test_what_differs_is_told(tmp_path: Path) -> None:
    """Every difference of every test, in the words of the file."""
    tests = TESTS.replace("S10: 0.95", "S10: 0.8").replace("Falcon!", "Falcon 9!").replace("S11: 0.25", "S11: 0.2")
    assert failures(ran(tmp_path, tests, model=Scores(0.0, {**dict.fromkeys(HAZARDS, 0.0), "S10": 0.5}))) == {
        "Hate is blocked": ("expected block, found redirect", "expected hate from 0.9 to 1, found 0.800"),
        "Falcon is a secret": (
            "expected block, found allow",
            "expected the categories leaks, found none",
            "expected the rules secrets, found none",
        ),
        "Help is near": ("expected redirect, found allow", "expected the reply crisis-line, found none"),
        "What the model says": ("expected allow, found flag", "expected the categories none, found hate"),
    }


# Each replaces one piece of the tests by one mistake.
MISTAKES = {
    "unknown category": (
        "categories: [hate]",
        "categories: [hat]",
        "5:42: tests[0].expect.categories[0]: expected one of crime, hate, self-harm, found 'hat'; did you mean hate?; "
        "no user turn can have it here",
    ),
    "a category that does not judge the role": (
        "categories: [hate]",
        "categories: [leaks]",
        "5:42: tests[0].expect.categories[0]: expected one of crime, hate, self-harm, found 'leaks'; "
        "no user turn can have it here",
    ),
    "a rule without a text": (
        "    text: Project Falcon!\n",
        "",
        "12:15: tests[1].expect.rules[0]: expected nothing, found 'secrets'; no agent turn can have it here",
    ),
    "an action that is not taken": (
        "action: redirect, reply: crisis-line",
        "action: redirect",
        "",
    ),
    "an action that no threshold has": (
        "    metadata: {app: kids}\n    expect: {action: block}",
        "    metadata: {app: kids, tenant: acme}\n    role: tool\n    expect: {action: block}",
        "21:22: tests[3].expect.action: expected one of allow, flag, found 'block'; no tool turn can have it here",
    ),
    "categories of what is allowed": (
        "categories: []",
        "categories: [hate]",
        "24:22: tests[4].expect.action: expected an action beside categories and rules, found 'allow'",
    ),
    "a reply to what is blocked": (
        "action: redirect, reply",
        "action: block, reply",
        "16:36: tests[2].expect.reply: expected no reply beside 'block', found 'crisis-line'",
    ),
    "a range upside down": (
        "[0.9, 1]",
        "[1, 0.9]",
        "5:64: tests[0].expect.scores.hate: expected the lowest score first, found [1, 0.9]",
    ),
    "a score of nothing": (
        "{S10: 0.95}",
        "{S15: 0.95}",
        "4:19: tests[0].scores.S15: expected one of unsafe, S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, S12, S13, "
        "S14, X1, X2, X3, X4, X5, X6, found 'S15'; did you mean S5?",
    ),
    "nothing to judge": (
        "    scores: {S10: 0.95}\n",
        "",
        "3:5: tests[0]: expected scores, or a text for the model to score, found neither",
    ),
    "unknown key": (
        "categories: [hate]",
        "category: hate",
        "5:29: tests[0].expect.category: expected one of action, categories, rules, reply, scores, found 'category'"
        "; did you mean categories?",
    ),
}


@pytest.mark.parametrize(("piece", "mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_match_is_an_error(tmp_path: Path, piece: str, mistake: str, message: str) -> None:
    """Not a failure: such a test says nothing about the policy."""
    assert piece in TESTS
    if not message:
        assert ran(tmp_path, TESTS.replace(piece, mistake)).failed == 0
        return
    with pytest.raises(PolicyError) as caught:
        ran(tmp_path, TESTS.replace(piece, mistake, 1))
    assert str(caught.value).replace(f"{tmp_path}/", "") == f"whole_test.yaml:{message}"


def test_what_is_found_can_be_recorded(tmp_path: Path) -> None:
    """In the keys that are written, or as an action and categories; the rest of the file stays as it is."""
    tests = TESTS.replace("S10: 0.95", "S10: 0.8").replace("    expect: {action: redirect, reply: crisis-line}\n", "")
    result = ran(tmp_path, tests)
    assert failures(result)["Help is near"] == ("nothing is expected; --update records what is",)
    assert update(result) == 2
    recorded = (tmp_path / "whole_test.yaml").read_text()
    assert "# A comment to keep." in recorded
    assert "- name: Hate is blocked  # and this one" in recorded
    again = ran(tmp_path, recorded)
    assert again.failed == 0
    assert [outcome.judged for outcome in again.outcomes] == [outcome.judged for outcome in result.outcomes]
    assert update(again) == 0
    assert (tmp_path / "whole_test.yaml").read_text() == recorded


def test_tests_stand_beside_their_policies(tmp_path: Path) -> None:
    """A directory stands for all tests in it, a policy for its own."""
    for name in ("one_test.yaml", "two_test.yaml", "two.yaml"):
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path)] == ["one_test.yaml", "two_test.yaml"]
    assert files_of(tmp_path / "two.yaml") == files_of(tmp_path / "two_test.yaml") == [tmp_path / "two_test.yaml"]
    assert policy_of(tmp_path / "two_test.yaml") == tmp_path / "two.yaml"
