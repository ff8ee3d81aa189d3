"""Thresholds from labelled rows: laws of the arithmetic, and which rows count for what."""

from dataclasses import replace
from math import ceil
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.policy.compile import Policy, compile_policy
from guard.policy.schema import PolicySpec
from guard.training.data import Example
from guard.training.fit import Fitted, fit
from guard.types import Action, Conversation, Role, Scores, Turn

SPEC = {
    "description": "For tests.",
    "replies": {"sorry": "Sorry."},
    "categories": {
        "hate": {
            "title": "Hate",
            "hazards": ("S10", "X1"),
            "thresholds": {"user": {"flag": 0.0, "block": 0.5}, "agent": {"block": 0.5}},
        },
        "unsafe": {
            "title": "Unsafe",
            "score": "unsafe",
            "thresholds": {"user": {"redirect": {"at": 0.5, "reply": "sorry"}}},
        },
        "rivals": {"title": "Rivals", "examples": "rivals.csv", "thresholds": {"user": {"block": 0.5}}},
    },
}
POLICY = compile_policy("tests", PolicySpec.model_validate(SPEC))
Row = tuple[Example, Scores]

scores = st.floats(0, 1, width=32)


def row(label: bool, score: float, hazards: tuple[str, ...] | None = None, role: Role = Role.USER) -> Row:
    """Rows with a label of 1 are hate where nothing else is said."""
    known = frozenset(hazards if hazards is not None else ("S10",) if label else ())
    example = Example("", "", "und", Conversation((Turn(role, "text"),), 0), label, known)
    return example, POLICY.scores({"unsafe": score, "S10": score, "rivals": score})


def vague(score: float) -> Row:
    """A label of 1 that does not say of what."""
    example, own = row(True, score)
    return replace(example, hazards=None), own


def fitted(
    rows: list[Row],
    kind: Literal["max_fpr", "min_recall"] = "max_fpr",
    share: float = 0.25,
    *,
    category: str | None = "hate",
    role: Role | None = Role.USER,
    action: Action | None = None,
    policy: Policy = POLICY,
) -> tuple[list[Fitted], list[str]]:
    examples, own = [row[0] for row in rows], [row[1] for row in rows]
    return fit(policy, examples, own, (kind, share), category=category, role=role, action=action)


@given(st.lists(scores, min_size=1), st.lists(scores), st.floats(0.01, 0.99))
def test_the_lowest_threshold_that_keeps_to_a_rate_is_found(
    harmless: list[float], hits: list[float], rate: float
) -> None:
    """No more harmless rows reach it, and no score of them below it keeps to the rate, but for the rounding."""
    found, notes = fitted([*(row(False, one) for one in harmless), *(row(True, one) for one in hits)], share=rate)
    if not found:
        assert sum(one == 1 for one in harmless) > rate * len(harmless)
        assert notes == ["hate of user turns is left as it is: more harmless rows than that have a score of 1"]
        return
    (one,) = found
    assert (one.fpr.rows, one.recall.rows) == (len(harmless), len(hits))
    assert one.fpr.hits == sum(score >= one.threshold for score in harmless) <= rate * len(harmless)
    assert one.recall.hits == sum(score >= one.threshold for score in hits)
    lower = [score for score in harmless if score < one.threshold - 2e-6]
    assert all(sum(other >= score for other in harmless) > rate * len(harmless) - 1e-6 for score in lower)
    low, high = one.interval
    assert low <= one.threshold <= high + 2e-6


@given(st.lists(scores), st.lists(scores, min_size=1), st.floats(0.01, 0.99))
def test_the_highest_threshold_that_keeps_to_a_recall_is_found(
    harmless: list[float], hits: list[float], recall: float
) -> None:
    """So many rows of the category reach it, and fewer a higher one."""
    rows = [*(row(False, one) for one in harmless), *(row(True, one) for one in hits)]
    ((one,), notes) = fitted(rows, "min_recall", recall)
    assert notes == []
    assert one.recall.hits >= recall * len(hits) - 1e-6
    assert sum(score >= one.threshold + 2e-6 for score in hits) < ceil(recall * len(hits) - 1e-6)


@given(
    st.lists(st.tuples(st.booleans(), scores, st.integers(1, 4)), min_size=1),
    st.sampled_from(("max_fpr", "min_recall")),
    st.floats(0.01, 0.99),
)
def test_a_row_of_a_weight_counts_as_so_many_rows(
    weighed: list[tuple[bool, float, int]], kind: Literal["max_fpr", "min_recall"], share: float
) -> None:
    """The threshold and the shares are those of the rows repeated; the interval is no narrower for it."""
    rows = [(replace(row(label, score)[0], weight=weight), row(label, score)[1]) for label, score, weight in weighed]
    repeated = [row(label, score) for label, score, weight in weighed for _ in range(weight)]
    (found, notes), (expected, said) = fitted(rows, kind, share), fitted(repeated, kind, share)
    assert notes == said
    for one, other in zip(found, expected, strict=True):
        assert one.threshold == other.threshold
        assert one.interval[0] - 2e-6 <= one.threshold <= one.interval[1] + 2e-6
        for mine, theirs in ((one.fpr, other.fpr), (one.recall, other.recall)):
            assert mine.value == pytest.approx(theirs.value)
            assert mine.effective <= mine.rows <= theirs.rows


def test_intervals_are_those_of_the_binomial() -> None:
    """Of the shares Wilson's, of the threshold that of the quantile; both are narrower where rows are more."""
    widths = []
    for count in (300, 3000):
        values = np.linspace(0, 0.999, count)
        ((one,), _) = fitted([*(row(False, float(value)) for value in values), row(True, 0.9)], share=0.01)
        low, high = one.interval
        assert low < one.threshold < high
        assert one.fpr.interval[0] < 0.01 < one.fpr.interval[1]
        widths.append((high - low, one.fpr.interval[1] - one.fpr.interval[0]))
    assert all(more < fewer for fewer, more in zip(*widths, strict=True))


@pytest.mark.parametrize(
    ("kind", "share", "needed"), [("max_fpr", 0.01, 299), ("max_fpr", 0.1, 29), ("min_recall", 0.9, 29)]
)
def test_how_many_rows_it_takes_is_told(kind: Literal["max_fpr", "min_recall"], share: float, needed: int) -> None:
    """So many that none of them on the wrong side would prove the target, with 95 % confidence."""
    ((one,), _) = fitted([row(False, 0.1), row(True, 0.9)], kind, share)
    assert one.needed == needed
    assert (1 - (share if kind == "max_fpr" else 1 - share)) ** needed <= 0.05


def test_rows_count_for_what_they_say() -> None:
    """Of the category, harmless, or harmful in another way, which says nothing of it; and for their role alone."""
    rows = [row(True, 0.9), row(True, 0.9, ("X1", "S1")), row(False, 0.1)]
    rows += [row(True, 0.8, ("S1",)), row(True, 0.8, role=Role.AGENT), row(False, 0.2, role=Role.AGENT)]
    found, notes = fitted(rows, category=None, role=None)
    assert [(one.category, one.role, one.action, one.fpr.rows, one.recall.rows) for one in found] == [
        ("hate", Role.USER, Action.BLOCK, 1, 2),
        ("hate", Role.AGENT, Action.BLOCK, 1, 1),
        ("unsafe", Role.USER, Action.REDIRECT, 1, 3),
    ]
    assert [one.loc for one in found[1:]] == [
        ("categories", "hate", "thresholds", "agent", "block"),
        ("categories", "unsafe", "thresholds", "user", "redirect", "at"),
    ]
    assert notes == [
        "rivals is left as it is: fit it by itself, with --category rivals, to rows whose label is about it"
    ]


def test_a_label_that_may_mean_anything_is_not_guessed() -> None:
    """Rows that name no categories are refused, until it is said which one their label is about."""
    rows = [vague(0.9), vague(0.9), row(False, 0.1), row(True, 0.9, ("S10",))]
    with pytest.raises(ConfigError, match=r"^2 rows are labelled 1 and name no categories: name them, or say"):
        fitted(rows, category=None)
    recalls = {name: fitted(rows, category=name)[0][0].recall.rows for name in ("hate", "unsafe", "rivals")}
    assert recalls == {"hate": 3, "unsafe": 3, "rivals": 2}


def test_what_has_no_rows_is_left_as_it_is() -> None:
    """And it is said."""
    only = [row(True, 0.9), row(False, 0.1, role=Role.AGENT)]
    assert fitted(only) == ([], ["hate of user turns is left as it is: no row of that role is labelled 0"])
    agent = fitted(only, "min_recall", role=Role.AGENT)
    assert agent == ([], ["hate of agent turns is left as it is: no row of that role is of the category"])


def test_thresholds_out_of_order_are_refused() -> None:
    """A block below a flag would be a policy that does not load; the other one is to be fitted first."""
    rows = [row(False, score / 10) for score in range(10)]
    ((flag,), _) = fitted(rows, share=0.5, action=Action.FLAG)
    assert flag.threshold == pytest.approx(0.4, abs=1e-5)
    with pytest.raises(ConfigError) as caught:
        fitted(rows, share=0.1, action=Action.FLAG)
    assert str(caught.value) == (
        "hate of user turns: flag would be 0.800001, above block at 0.5; fit that first, with --action block, or "
        "change it"
    )
    high = compile_policy(
        "high",
        PolicySpec.model_validate(
            SPEC
            | {
                "categories": {
                    "hate": {
                        "title": "Hate",
                        "hazards": ("S10",),
                        "thresholds": {"user": {"flag": 0.5, "block": 0.9}},
                    }
                }
            }
        ),
    )
    with pytest.raises(ConfigError, match=r"^hate of user turns: block would be 0\.1.*, below flag at 0\.5; fit that"):
        fitted(rows, share=0.8, policy=high)
