"""What an audit found, in numbers."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.audit.report.cases import BINS
from guard.audit.report.intervals import Share, wilson
from guard.audit.report.summary import summarise
from guard.errors import ConfigError
from tests.audit.report.outputs import PLAIN, Turn, audited, category, policy, rule, violation

BAD = Turn(action="flag", violations=[violation()], scores={"S10": 0.6})


def test_turns_and_conversations_are_counted(tmp_path: Path) -> None:
    """Turns by action, and conversations with a turn that was not allowed, each once."""
    blocked = Turn(2, 1, action="block", violations=[violation(action="block", score=0.9, threshold=0.8)])
    out = audited(
        tmp_path / "out", [Turn(1), Turn(1, 1), Turn(2), blocked], [Turn(3, action="flag"), Turn(3, 1, action="flag")]
    )
    summary = summarise(out)
    assert summary.turns.actions == {"allow": 3, "flag": 2, "redirect": 0, "block": 1}
    assert summary.turns.not_allowed == Share.make(3, 6)
    assert summary.totals.conversations_not_allowed == Share.make(2, 3)
    assert (summary.totals.tokens, summary.totals.seconds, summary.totals.turns_per_second) == (20, 4.0, 1.5)
    assert summary.is_complete


def test_only_parts_of_the_manifest_count(tmp_path: Path) -> None:
    """A part that was being written when the audit was stopped is not told, nor a line that is cut off."""
    out = audited(tmp_path / "out", [Turn(1)], [Turn(2)], complete=False)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(lines[0] + lines[1][:20])
    summary = summarise(out)
    assert (summary.turns.turns, summary.is_complete) == (1, False)


def test_rates_by_what_tells_turns_apart(tmp_path: Path) -> None:
    """By role, policy, language and source, the most frequent first; what is not told has no name."""
    turns = [Turn(1, language="de", source="web"), Turn(2, language="de", role="agent"), BAD]
    summary = summarise(audited(tmp_path / "out", turns))
    assert [(rate.name, rate.share.count, rate.share.of) for rate in summary.by_language] == [("de", 0, 2), ("", 1, 1)]
    assert [(rate.name, rate.share.of) for rate in summary.by_role] == [("user", 2), ("agent", 1)]
    assert [(rate.name, rate.share.of) for rate in summary.by_source] == [("", 2), ("web", 1)]
    assert [(rate.name, rate.share.of) for rate in summary.by_policy] == [("plain", 3)]


def test_long_tails_are_told_together(tmp_path: Path) -> None:
    """Of hundreds of sources the most frequent stand alone, and all others in one row, so that none disappears."""
    turns = [Turn(place, source=f"s{place:03}") for place in range(148)] + [Turn(200, source="s100", action="flag")]
    by_source = summarise(audited(tmp_path / "out", turns)).by_source
    assert by_source[0].name == "s100"
    assert (by_source[-1].name, by_source[-1].names) == (None, 123)
    assert sum(rate.share.of for rate in by_source) == 149


def test_days_are_those_of_utc(tmp_path: Path) -> None:
    """Days are in order, wherever the times were taken; turns without one come last."""
    late = datetime(2026, 1, 2, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    turns = [Turn(1), Turn(2, time=datetime(2026, 1, 2, 8, tzinfo=UTC)), Turn(3, time=late, violations=[violation()])]
    summary = summarise(audited(tmp_path / "out", turns))
    assert [rate.name for rate in summary.by_day] == ["2026-01-01", "2026-01-02", ""]
    assert [(cell.category, cell.of, cell.turns) for cell in summary.category_by_day] == [("hate", "2026-01-01", 1)]
    assert (summary.turns.first, summary.turns.last) == ("2026-01-01T23:00:00Z", "2026-01-02T08:00:00Z")
    assert summary.turns.without_time == 1


def test_a_turn_counts_once_in_a_category(tmp_path: Path) -> None:
    """A score and a rule of one category make one turn of it, at the stricter action; the rule is told beside it."""
    both = Turn(action="block", violations=[violation(), rule("slurs", "block", "hate"), rule("links", "flag")])
    summary = summarise(audited(tmp_path / "out", [both, Turn(2)]))
    found = [(one.category, one.flag, one.redirect, one.block, one.share.count) for one in summary.by_category]
    assert found == [("", 1, 0, 0, 1), ("hate", 0, 0, 1, 1)]
    assert [(one.category, one.rule, one.flag, one.block) for one in summary.by_rule] == [
        ("", "links", 1, 0),
        ("hate", "slurs", 0, 1),
    ]
    assert [(cell.category, cell.of, cell.share) for cell in summary.category_by_role] == [
        ("", "user", Share.make(1, 2)),
        ("hate", "user", Share.make(1, 2)),
    ]


def test_a_shadow_is_counted_by_what_it_would_do(tmp_path: Path) -> None:
    """A policy in shadow allows everything, which would tell nothing."""
    turns = [Turn(1, shadow=True, violations=[violation(action="block")]), Turn(2, shadow=True)]
    summary = summarise(audited(tmp_path / "out", turns, policies={"plain": policy("r1", {}, shadow=True)}))
    assert (summary.turns.actions["block"], summary.turns.shadow) == (1, 2)


SCORES = {"unsafe": 0.25, "S1": 0.5, "S10": 0.25, "S11": 0.125}
ANY = 1 - 0.5 * 0.75 * 0.875


@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ({"hazards": []}, 0.25),
        ({"hazards": ["S1", "S10"]}, 0.5),
        ({"hazards": ["S1", "S10", "S11"], "scoring": "any"}, ANY),
        ({"hazards": ["S1", "S10"], "scoring": "weighted", "weights": [0.5, 2.0]}, 0.75),
        ({"hazards": ["S1", "S10"], "scoring": "weighted", "weights": [2.0, 2.0]}, 1.0),
        ({"hazards": ["S11"], "scoring": "asked"}, 0.125),
    ],
)
def test_scores_are_those_of_the_policy(tmp_path: Path, spec: dict[str, object], score: float) -> None:
    """A histogram holds what the policy makes of the hazards, for the roles that it judges."""
    one = category([], {"flag": 0.9}) | spec
    turns = [Turn(1, scores=SCORES), Turn(2, scores=SCORES, role="agent"), Turn(3, scores=None)]
    (histogram,) = summarise(audited(tmp_path / "out", turns, policies={"plain": policy("r1", {"a": one})})).histograms
    assert (histogram.role, histogram.turns, histogram.highest) == ("user", 1, score)
    assert histogram.bins[min(BINS - 1, int(score * BINS))] == 1
    assert histogram.thresholds == {"flag": 0.9}


def test_scores_are_of_the_turns_that_a_policy_judged(tmp_path: Path) -> None:
    """Where rows name their policies, each has histograms of its own."""
    turns = [Turn(1), Turn(2, policy="other"), Turn(3, policy="other")]
    summary = summarise(audited(tmp_path / "out", turns, policies={"plain": PLAIN, "other": PLAIN}))
    assert [(one.policy, one.turns) for one in summary.histograms] == [("plain", 1), ("other", 2)]


def test_certain_and_doubtful_cases(tmp_path: Path) -> None:
    """The highest above its threshold is certain; what is next to a threshold, on either side, is doubtful."""

    def turn(place: int, score: float, action: str = "allow", at: float = 0.0) -> Turn:
        violations = [violation(action=action, score=score, threshold=at)] if at else []
        return Turn(place, scores={"S10": score}, action=action, violations=violations)

    turns = [
        turn(1, 0.01),
        turn(2, 0.4375),  # just below flag
        turn(3, 0.53125, "flag", 0.5),
        turn(4, 0.78125, "flag", 0.5),  # just below block
        turn(5, 0.8125, "block", 0.8),
        turn(6, 0.984375, "block", 0.8),
    ]
    summary = summarise(audited(tmp_path / "out", turns))
    assert [(one.id, one.action) for one in summary.most_certain] == [
        ("c6", "block"),
        ("c5", "block"),
        ("c4", "flag"),
        ("c3", "flag"),
    ]
    doubtful = [(one.id, one.action, one.above) for one in summary.most_doubtful]
    assert doubtful == [("c5", "block", True), ("c3", "flag", True), ("c4", "block", False), ("c2", "flag", False)]


def test_no_category_takes_all_the_room(tmp_path: Path) -> None:
    """Of equal cases the first in the order of the inputs are told, and few of a category."""
    turns = [Turn(place, action="flag", violations=[violation()], scores={"S10": 0.6}) for place in range(1, 50)]
    summary = summarise(audited(tmp_path / "out", turns[:20], turns[20:]))
    assert [one.id for one in summary.most_certain] == ["c1", "c2"]


def test_texts_only_where_asked_for(tmp_path: Path) -> None:
    """The numbers hold no text unless it is asked for, and then its beginning."""
    out = audited(tmp_path / "out", [replace(BAD, text="secret " * 100)], text=True)
    assert "secret" not in json.dumps(summarise(out).as_json())
    (case,) = summarise(out, text=True).most_certain
    assert case.text is not None
    assert case.text.startswith("secret secret")
    assert len(case.text) == 201


def test_texts_that_were_not_kept(tmp_path: Path) -> None:
    """Where an audit kept no texts, none are told, and that is said."""
    summary = summarise(audited(tmp_path / "out", [BAD]), text=True)
    assert not summary.has_text
    assert summary.most_certain[0].text is None


def test_flips(tmp_path: Path) -> None:
    """What the second policy says otherwise, of verdicts and of categories, by role."""
    strict = [violation("hate", "block", 0.6, 0.4), violation("insults", "flag", 0.6, 0.4)]
    turns = [
        Turn(1, action="flag", violations=[violation()], compare=("block", strict)),
        Turn(2, role="agent", action="flag", violations=[violation()]),
        Turn(3, action="flag", violations=[violation()], compare=("flag", [violation(threshold=0.3)])),
        Turn(4),
    ]
    compare = {"name": "other", **PLAIN}
    flips = summarise(audited(tmp_path / "out", turns, compare=compare)).flips
    assert flips is not None
    assert (flips.verdicts, flips.stricter, flips.milder) == (Share.make(2, 4), 1, 1)
    assert flips.matrix == ((1, 0, 0, 0), (1, 1, 0, 1), (0, 0, 0, 0), (0, 0, 0, 0))
    assert [(flip.category, flip.role, flip.before, flip.after, flip.share, flip.ids) for flip in flips.flips] == [
        (None, "agent", "flag", "allow", Share.make(1, 1), ("c2/0",)),
        (None, "user", "flag", "block", Share.make(1, 3), ("c1/0",)),
        ("hate", "agent", "flag", "allow", Share.make(1, 1), ("c2/0",)),
        ("hate", "user", "flag", "block", Share.make(1, 3), ("c1/0",)),
        ("insults", "user", "allow", "flag", Share.make(1, 3), ("c1/0",)),
    ]


def test_rejected_rows_by_reason(tmp_path: Path) -> None:
    """Reasons that differ in numbers alone are one; a whole input is told by its name."""
    rejects = [("a.jsonl", 3, "turns[7]: bad"), ("a.jsonl", 9, "turns[12]: bad"), ("b.csv", 0, "is no CSV")]
    summary = summarise(audited(tmp_path / "out", [Turn()], rejects=rejects))
    assert [(one.reason, one.count, one.places) for one in summary.rejected] == [
        ("turns[N]: bad", 2, ("a.jsonl:3", "a.jsonl:9")),
        ("is no CSV", 1, ("b.csv",)),
    ]
    assert summary.totals.rejected == 3


def test_rejects_that_the_manifest_does_not_count_yet(tmp_path: Path) -> None:
    """Lines that were being written when the audit was stopped are not told."""
    out = audited(tmp_path / "out", [Turn()], rejects=[("a.jsonl", 1, "bad")])
    with (out / "rejects.jsonl").open("a") as file:
        file.write('{"input": "a.jsonl", "row": 2, "reason": "worse"}\n{"input": "a.js')
    assert [one.reason for one in summarise(out).rejected] == ["bad"]


def test_nothing_judged(tmp_path: Path) -> None:
    """An audit without a turn has numbers, too: they are 0, and shares of nothing are none."""
    summary = summarise(audited(tmp_path / "out", compare={"name": "other", **PLAIN}))
    assert summary.turns.turns == 0
    assert summary.turns.not_allowed == Share(0, 0, None, None, None)
    assert not any([summary.by_category, summary.by_role, summary.by_day, summary.most_doubtful, summary.rejected])


def test_all_degraded(tmp_path: Path) -> None:
    """Turns without scores are counted, and have no histogram but an empty one."""
    turns = [Turn(place, scores=None, action="block", coverage=(3, 9)) for place in range(3)]
    summary = summarise(audited(tmp_path / "out", turns))
    assert (summary.turns.degraded, summary.turns.partly_seen, summary.turns.actions["block"]) == (3, 3, 3)
    assert [(one.turns, one.highest) for one in summary.histograms] == [(0, None)]


def test_names_are_no_sql(tmp_path: Path) -> None:
    """Quotes and brackets in names of policies, categories and folders mean nothing."""
    policies = {'it\'s "x"': policy("r1", {"'); DROP": category(["S10"], {"flag": 0.5})})}
    out = audited(tmp_path / "o'u[t]*", [Turn(1, policy='it\'s "x"', source="a'b")], policies=policies)
    summary = summarise(out)
    assert [one.turns for one in summary.histograms] == [1]
    assert summary.by_source[0].name == "a'b"


def test_the_same_audit_gives_the_same_numbers(tmp_path: Path) -> None:
    """Whatever the threads do."""
    turns = [Turn(place, source=f"s{place % 40}", scores={"S10": place % 97 / 97}) for place in range(500)]
    out = audited(tmp_path / "out", turns[:250], turns[250:])
    assert summarise(out) == summarise(out)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda out: (out / "audit.json").unlink(), "{out}: there is no audit, since there is no audit.json"),
        (lambda out: (out / "audit.json").write_text("{"), "{out}/audit.json: cannot be read"),
        (lambda out: (out / "manifest.jsonl").write_text("{\n"), "{out}/manifest.jsonl: cannot be read"),
        (
            lambda out: (out / "parts/part-000000.parquet").unlink(),
            "{out}/parts/part-000000.parquet: there is no such file, though the manifest names it",
        ),
        (
            lambda out: (out / "parts/part-000000.parquet").write_text("no parquet"),
            "{out}: its parts cannot be read (InvalidInputException)",
        ),
    ],
)
def test_no_audit_to_tell_of(tmp_path: Path, break_it: object, message: str) -> None:
    """A folder that holds no audit, or a broken one, is refused with what is wrong."""
    out = audited(tmp_path / "out", [Turn()])
    break_it(out)  # type: ignore[operator]
    with pytest.raises(ConfigError) as error:
        summarise(out)
    assert str(error.value) == message.format(out=out)


@given(st.integers(1, 10**9).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_a_share_lies_within_its_interval(counts: tuple[int, int]) -> None:
    """And the interval between 0 and 1."""
    low, high = wilson(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_the_interval_is_wilsons() -> None:
    """As scipy.stats.binomtest gives it."""
    assert wilson(7, 120) == pytest.approx((0.02854101, 0.11552592), abs=1e-8)
