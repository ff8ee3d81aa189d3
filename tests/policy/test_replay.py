"""What is logged is judged again as it was, and changes of policy are told as they would be."""

from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.policy.compile import Policy, compile_policy
from guard.policy.replay import Change, diff, replay
from guard.policy.schema import PolicySpec
from guard.policy.store import load_policy
from guard.types import Action, Role, Scores
from tests.policy.files import CALIBRATION, WHOLE, write
from tests.policy.logs import Said, verdict, write_log

HAZARDS = ("S1", "S2", "S10", "own-topic")

# Few values, so that scores often equal thresholds and each other; 0.1 and 0.9 are none of float32's.
thresholds = st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]) | st.floats(0, 1)
scores = st.sampled_from([0.0, 0.10000000149011612, 0.25, 0.5, 0.75, 0.8999999761581421, 1.0]) | st.floats(
    0, 1, width=32
)
weights = st.floats(0.0625, 2)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, object]:
    flag, redirect, block = sorted(draw(st.tuples(thresholds, thresholds, thresholds)))
    every = {"flag": flag, "redirect": {"at": redirect, "reply": "sorry"}, "block": block}
    chosen = draw(st.sets(st.sampled_from(sorted(every)), min_size=1))
    return {action: step for action, step in every.items() if action in chosen}


by_role = st.dictionaries(st.sampled_from([role.value for role in Role]), steps(), min_size=1)
hazards = st.lists(st.sampled_from(HAZARDS), min_size=1, unique=True).map(tuple)
category = st.fixed_dictionaries({"title": st.just("T"), "thresholds": by_role}).flatmap(
    lambda made: st.one_of(
        st.just({**made, "score": "unsafe"}),
        st.builds(
            lambda codes, how: {**made, "hazards": codes, "score": how}, hazards, st.sampled_from(["max", "any"])
        ),
        st.dictionaries(st.sampled_from(HAZARDS), weights, min_size=1).map(
            lambda weighed: {**made, "hazards": weighed, "score": "weighted"}
        ),
    )
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    categories = draw(st.dictionaries(st.sampled_from("abc"), category, min_size=1))
    overlay = st.fixed_dictionaries(
        {
            "when": st.dictionaries(st.sampled_from(["app", "it's"]), st.sampled_from(["x", 'y"']), min_size=1),
            "thresholds": st.dictionaries(
                st.sampled_from(sorted(categories)), by_role | st.just({"user": {}}), min_size=1
            ),
        }
    )
    rule = st.fixed_dictionaries(
        {
            "terms": st.just(("word",)),
            "roles": st.lists(st.sampled_from([role.value for role in Role]), min_size=1, unique=True).map(tuple),
            "action": st.sampled_from(["flag", "block"]),
        }
    )
    spec = {
        "description": "Any.",
        "mode": draw(st.sampled_from(["enforce", "enforce", "shadow"])),
        "on_error": draw(st.dictionaries(st.sampled_from(["user", "agent"]), st.sampled_from(["allow", "block"]))),
        "replies": {"sorry": "Sorry."},
        "categories": categories,
        "overlays": tuple(draw(st.lists(overlay, max_size=3))),
        "rules": {"first": draw(rule), "second": draw(rule)},
    }
    return compile_policy("any", PolicySpec.model_validate(spec))


said = st.builds(
    Said,
    st.sampled_from(Role),
    st.none() | st.builds(Scores, scores, st.fixed_dictionaries(dict.fromkeys(HAZARDS, scores))),
    st.frozensets(st.sampled_from(["first", "second", "unknown"])),
    st.dictionaries(st.sampled_from(["app", "it's"]), st.sampled_from(["x", 'y"'])),
)


@given(policies(), st.lists(said, min_size=1, max_size=30))
@settings(max_examples=30)
def test_a_replay_gives_what_was_live(policy: Policy, turns: list[Said]) -> None:
    """Whatever policy and turns: actions, violations, their scores and thresholds, to the bit."""
    with TemporaryDirectory() as directory:
        log = write_log(Path(directory) / "log", policy, turns)
        report = replay(policy, [log])
    assert (report.same, report.differing.ids, dict(report.changes)) == (len(turns), [], {})


@given(policies(), policies(), st.lists(said, min_size=1, max_size=30))
@settings(max_examples=30)
def test_a_diff_is_that_of_verdicts(old: Policy, new: Policy, turns: list[Said]) -> None:
    """Its changes are those that deciding one by one shows: of verdicts, of categories and of rules."""
    with TemporaryDirectory() as directory:
        report = diff(old, new, [write_log(Path(directory) / "log", old, turns)])
    expected = Counter[Change]()
    for turn in turns:
        before, after = (_levels(policy, turn) for policy in (old, new))
        for about in before.keys() | after.keys():
            was, becomes = before.get(about, Action.ALLOW), after.get(about, Action.ALLOW)
            if was is not becomes:
                expected[Change(about, turn.role.value, was.name.lower(), becomes.name.lower())] += 1
    assert {change: found.count for change, found in report.changes.items()} == expected
    assert report.turns == Counter(turn.role.value for turn in turns)


def _levels(policy: Policy, turn: Said) -> dict[str, Action]:
    made = verdict(policy, turn)
    found = {f"rule {one.rule}" if one.rule else one.category: one.action for one in made.violations}
    return {"verdict": made.action, **found}


def whole(directory: Path, old: str = "", new: str = "") -> Policy:
    directory.mkdir(exist_ok=True)
    assert old in WHOLE
    return load_policy(write(directory, WHOLE.replace(old, new)), CALIBRATION)


SAFE = Scores(0.0, dict.fromkeys(("S1", "S2", "S7", "S8", "S10", "S11", "X1"), 0.0))
LEAK = Scores(0.0, {**SAFE.hazards, "S7": 0.5})
TURNS = [Said(Role.USER, SAFE), Said(Role.AGENT, LEAK), Said(Role.AGENT, SAFE), Said(Role.AGENT, None)]


def test_a_log_that_was_changed_is_found(tmp_path: Path) -> None:
    """Of the same revision any other action, violation, score or threshold is a difference; of others a change."""
    policy = whole(tmp_path)
    log = write_log(tmp_path / "log", policy, TURNS)
    honest = log.read_text()
    for true, false in (
        ('"action":"allow","violations":[],', '"action":"block","violations":[],'),
        ('"score":0.375,', '"score":0.376,'),
        ('"threshold":0.25}', '"threshold":0.26}'),
        ('"S7":0.5', '"S7":0.75'),
        ('"category":"leaks","rule":"",', '"category":"hate","rule":"",'),
        ('"category":"leaks","rule":"",', '"category":null,"rule":"",'),
    ):
        assert true in honest
        log.write_text(honest.replace(true, false, 1))
        report = replay(policy, [log])
        assert (report.same, report.differing.count) == (4, 1)
    log.write_text(honest.replace(policy.revision, "0" * 16).replace('"action":"flag"', '"action":"block"'))
    report = replay(policy, [log])
    assert (report.same, report.differing.count) == (0, 0)
    assert report.changes[Change("leaks", "agent", "block", "flag")].ids == ["d1/0"]


def test_a_diff_counts_over_all_logs(tmp_path: Path) -> None:
    """Counts add up, shares are those of the role's verdicts, and a few ids are told."""
    old = whole(tmp_path / "old")
    new = whole(tmp_path / "new", "{flag: 0.25, block: 0.5}", "{flag: 0.25, block: 0.375}")
    logs = [write_log(tmp_path / name, old, TURNS) for name in ("a", "b")]
    report = diff(old, new, logs)
    (verdicts, leaks) = report.by_size()
    assert verdicts[0] == Change("verdict", "agent", "flag", "block")
    assert leaks[0] == Change("leaks", "agent", "flag", "block")
    assert (verdicts[1].count, verdicts[1].ids, verdicts[2]) == (2, ["d1/0", "d1/0"], 2 / 6)
    assert diff(old, old, logs).changes == {}
    assert diff(old, new, logs, only="other").turns == {}


def test_what_a_log_cannot_tell_is_said(tmp_path: Path) -> None:
    """Matches of a rule that looks for something else, and metadata that nothing asked for."""
    old = whole(tmp_path / "old")
    new = whole(tmp_path / "new", "Project Falcon,", "Project Eagle,")
    assert diff(old, new, [write_log(tmp_path / "log", old, TURNS)]).notes == [
        "rule secrets looks for something else than before: its matches are those that were logged",
        "no logged request has app: kids; of metadata a log holds what policies in force ask for",
        "no logged request has tenant: acme; of metadata a log holds what policies in force ask for",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"id": "a"}\n', ": 1 lines have no roles that are known"),
        ('{"id": "a", "role": "user", "action": "flag"}\n{"id": }\n', ": is no decision log, at about line "),
        ('{"id": "a", "role": "users", "action": "flag"}\n', ": 1 lines have no roles that are known"),
        ('{"id": "a", "role": "user", "action": "flog"}\n', ": 1 lines have no actions that are known"),
        ('{"role": "user", "action": "flag"}\n', ": 1 lines have no ids that are known"),
        ('{"id": "a", "role": "user", "action": "flag", "turn": 0, "scores": {"unsafe": 0}}\n', "of S1"),
        (None, ": there is no such file"),
    ],
)
def test_a_file_that_is_no_log(tmp_path: Path, content: str | None, problem: str) -> None:
    """The error names the file, and where it can the line, and quotes nothing."""
    log = tmp_path / "log"
    if content is not None:
        log.write_text(content)
    policy = whole(tmp_path)
    for judge in (partial(replay, policy, [log]), partial(diff, policy, policy, [log])):
        with pytest.raises(ConfigError) as raised:
            judge()
        assert str(raised.value).startswith(f"{log}")
        assert problem in str(raised.value)


@pytest.mark.parametrize(("true", "false"), [('"action":"flag","score"', '"action":"flog","score"'), ("0.375", "null")])
def test_a_violation_that_is_none(tmp_path: Path, true: str, false: str) -> None:
    """One that no policy could have written is no difference but an error."""
    policy = whole(tmp_path)
    log = write_log(tmp_path / "log", policy, TURNS)
    log.write_text(log.read_text().replace(true, false))
    with pytest.raises(ConfigError, match=": 1 lines have no violations that are known"):
        replay(policy, [log])


def test_an_empty_log_holds_no_verdicts(tmp_path: Path) -> None:
    """As a file that was just rotated is."""
    (tmp_path / "log").touch()
    assert replay(whole(tmp_path), [tmp_path / "log"]).turns == {}
