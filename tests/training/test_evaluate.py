from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.training.data import Example
from guard.training.evaluate import (
    FALSE_POSITIVE_RATES,
    HEADS,
    METRICS,
    Bools,
    Floats,
    compare,
    curves,
    difference,
    evaluate,
    metrics,
    newcombe,
    recount,
    threshold_at,
    thresholds,
    under,
)
from guard.types import Conversation, Role, Turn

SCORES = np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05])
POSITIVE = np.array([1, 1, 0, 1, 1, 0, 1, 0, 0, 0], bool)

# Few distinct scores, so that many are equal.
few_scores = st.integers(0, 8).map(lambda eighths: eighths / 8)


def noisy(rows: int, seed: int = 1) -> tuple[Floats, Bools]:
    """Scores of a model that is right more often than not."""
    random = np.random.default_rng(seed)
    positive = random.random(rows) < 0.3
    return 1 / (1 + np.exp(-(random.normal(size=rows) + 2 * positive - 1))), positive


def example(number: int, unsafe: bool, text: str = "hello", **more: object) -> Example:
    fields: dict[str, object] = {"source": "words", "lang": "en", "role": Role.USER, "hazards": frozenset()} | more
    return Example(
        id=str(number),
        source=str(fields["source"]),
        lang=str(fields["lang"]),
        conversation=Conversation((Turn(Role(str(fields["role"])), text),), 0),
        unsafe=unsafe,
        hazards=fields["hazards"],  # type: ignore[arg-type] # given as it is
    )


def heads(unsafe: Floats) -> Floats:
    """Scores of all heads, [rows, 1 + hazards], each like that of `unsafe`."""
    return np.repeat(unsafe[:, None], len(HEADS), axis=1)


def test_metrics_are_those_computed_by_hand() -> None:
    """Ten rows whose metrics can be counted on the fingers."""
    found = metrics(SCORES, POSITIVE)
    assert {name: found[name] for name in ("rows", "positives", *METRICS)} == {
        "rows": 10,
        "positives": 5,
        "auprc": round((1 + 1 + 3 / 4 + 4 / 5 + 5 / 7) / 5, 4),
        "auroc": 21 / 25,  # pairs of an unsafe and a safe row that are in order
        "f1": 0.8,  # four found, one false, one missed
        "fpr": 0.2,
        "recall": 0.8,
        "recall_at_fpr_0.01": 0.4,
        "ece": round((0.05 + 0.15 + 0.75 + 0.35 + 0.45 + 0.45 + 0.65 + 0.25 + 0.15 + 0.05) / 10, 4),
    }
    assert found["intervals"]["fpr"] == [0.0362, 0.6245]  # Wilson's, of 1 in 5
    assert metrics(SCORES, POSITIVE, 0.9)["recall"] == 0.2


@given(st.lists(st.tuples(few_scores, st.booleans(), st.integers(0, 3)), min_size=1), few_scores)
def test_a_row_that_counts_twice_is_as_good_as_two(rows: list[tuple[float, bool, int]], threshold: float) -> None:
    """What resamples are measured by agrees with scikit-learn on the rows written out."""
    scores, positive, counts = (np.array(column) for column in zip(*rows, strict=True))
    found = recount(scores, positive, counts[None].astype(float), threshold) if counts.any() else {}
    expected = metrics(np.repeat(scores, counts), np.repeat(positive, counts), threshold) if counts.any() else {}
    for name in METRICS:
        if name in expected:
            assert found[name][0] == pytest.approx(expected[name], abs=1e-4)


def test_intervals_hold_the_estimate_and_narrow_with_rows() -> None:
    """Every interval is around its estimate, the same each time, and about half as wide for four times the rows."""
    few, many = (metrics(*noisy(rows)) for rows in (400, 6400))
    assert few == metrics(*noisy(400))
    for found in (few, many):
        assert found["intervals"].keys() == set(METRICS)
        assert all(low <= found[name] <= high for name, (low, high) in found["intervals"].items())
    for name in METRICS:
        widths = [found["intervals"][name][1] - found["intervals"][name][0] for found in (few, many)]
        assert 0 < widths[1] < 0.6 * widths[0]


def test_intervals_hold_what_is_true() -> None:
    """Of 40 samples, all but a few have an AUROC whose interval holds that of the model itself."""
    truth = NormalDist().cdf(2 / 2**0.5)  # two normal distributions, 2 apart
    held = [metrics(*noisy(300, seed))["intervals"]["auroc"] for seed in range(40)]
    assert sum(low <= truth <= high for low, high in held) >= 34


@pytest.mark.parametrize(("label", "left"), [(False, {"fpr"}), (True, {"recall"})])
def test_what_needs_the_other_label_is_left_out(label: bool, left: set[str]) -> None:
    """Harmless rows alone have a false-positive rate, unsafe ones alone a recall; and never was 0 in 20 certain."""
    found = metrics(np.full(20, 0.2), np.full(20, label))
    assert found.keys() & set(METRICS) == left == found["intervals"].keys()
    (name,) = left
    assert found[name] == 0
    assert found["intervals"][name] == [0, 0.1611]


def test_rows_are_sliced() -> None:
    """By role, language, source and length; hazards where they are known and occur."""
    examples = [
        example(0, False),
        example(1, True, lang="de", hazards=frozenset({"S1"})),
        example(2, True, "x" * 400, role=Role.AGENT, hazards=None),
        example(3, False, "x" * 99, source="others", role=Role.AGENT),
    ]
    found = evaluate(heads(np.array([0.1, 0.9, 0.4, 0.6])), examples, threshold=0.5)
    rows = {section: {key: own["rows"] for key, own in found[section].items()} for section in found if "by_" in section}
    assert rows == {
        "by_role": {"agent": 2, "user": 2},
        "by_language": {"de": 1, "en": 3},
        "by_source": {"others": 1, "words": 3},
        "by_length": {"0": 3, "400": 1},
    }
    assert found["by_role"]["agent"]["fpr"] == 1
    assert found["by_role"]["agent"]["recall"] == 0
    assert {code: (own["rows"], own["positives"]) for code, own in found["hazards"].items()} == {"S1": (3, 1)}


def test_a_hazard_that_is_not_scored_is_left_out() -> None:
    """A model of another taxonomy is measured on what it knows."""
    scores = heads(SCORES)
    scores[:, 2:] = np.nan
    examples = [
        example(n, bool(unsafe), hazards=frozenset({"S1", "S2"} if unsafe else ())) for n, unsafe in enumerate(POSITIVE)
    ]
    assert evaluate(scores, examples)["hazards"].keys() == {"S1"}
    assert thresholds(scores, examples)["user"].keys() == {"unsafe", "S1"}
    assert compare(heads(SCORES), scores, examples)["hazards"].keys() == {"S1"}


def test_a_model_does_not_differ_from_itself() -> None:
    """Every difference is nought, and so is its interval but of the shares, which so many rows do not make certain."""
    scores, positive = noisy(300)
    found = difference(scores, scores, positive)
    assert {found[name] for name in METRICS} == {0}
    shares = {"fpr", "recall"}
    assert {bound for name in {*METRICS} - shares for bound in found["intervals"][name]} == {0}
    assert all(low < 0 < high for low, high in (found["intervals"][name] for name in shares))
    assert found["changed"] == 0


def test_intervals_of_differences_of_shares_hold_what_is_true() -> None:
    """Also of few rows on which two models hardly ever say otherwise."""
    random = np.random.default_rng(3)
    held = []
    for _ in range(400):
        told = random.random((2, 30))
        hits, others = told[0] < 0.85, np.where(told[1] < 0.06, told[0] < 0.1, told[0] < 0.85)
        low, high = newcombe(hits, others)
        assert (low, high) == pytest.approx([-bound for bound in newcombe(others, hits)[::-1]])
        held.append(low <= 0.06 * 0.75 <= high)
    assert 0.93 <= np.mean(held) <= 0.995
    low, high = newcombe(np.array([True]), np.array([True]))
    assert low < -0.5
    assert high > 0.5


def test_differences_are_paired() -> None:
    """Of two models that nearly agree, the difference is far more certain than what either is worth."""
    scores, positive = noisy(400)
    worse = np.clip(scores + np.random.default_rng(2).normal(size=400) / 50, 0, 1)
    apart = difference(scores, worse, positive)
    for name in ("auroc", "auprc"):
        low, high = apart["intervals"][name]
        assert low <= apart[name] <= high
        alone = metrics(scores, positive)["intervals"][name]
        assert high - low < 0.5 * (alone[1] - alone[0])
        assert apart[name] == pytest.approx(metrics(scores, positive)[name] - metrics(worse, positive)[name], abs=2e-4)
    changed = ((scores >= 0.5) != (worse >= 0.5)).mean()
    assert apart["changed"] == pytest.approx(changed, abs=1e-4)
    assert difference(worse, scores, positive)["auroc"] == -apart["auroc"]


@given(st.lists(st.floats(0, 1), min_size=1), st.sampled_from(FALSE_POSITIVE_RATES))
def test_a_threshold_keeps_its_rate_and_is_the_lowest(negatives: list[float], rate: float) -> None:
    """No more than the allowed share reaches it, and a little below it more do."""
    scores = np.array(negatives)
    threshold = threshold_at(scores, rate)
    assert (scores >= threshold).mean() <= rate
    assert (scores >= threshold - 2e-6).mean() > rate or (scores >= threshold).sum() == int(rate * len(scores))


def test_operating_points_by_role_and_head() -> None:
    """Each says what its threshold does to the rows and how certain that is; more false alarms find more."""
    scores, positive = noisy(1000)
    examples = [example(n, bool(unsafe), hazards=None if unsafe else frozenset()) for n, unsafe in enumerate(positive)]
    table = thresholds(heads(scores), examples)
    assert {role: set(of_role) for role, of_role in table.items()} == {"user": {"unsafe"}, "agent": set()}
    curve = table["user"]["unsafe"]
    assert (curve["negatives"], curve["positives"]) == ((~positive).sum(), positive.sum())
    assert [point["max_fpr"] for point in curve["points"]] == list(FALSE_POSITIVE_RATES)
    recalls = [point["recall"] for point in curve["points"]]
    assert recalls == sorted(recalls)
    for point in curve["points"]:
        flagged = scores >= point["threshold"]
        assert point["fpr"] == pytest.approx(flagged[~positive].mean(), abs=1e-4)
        assert point["recall"] == pytest.approx(flagged[positive].mean(), abs=1e-4)
        for name in ("fpr", "recall"):
            low, high = point["intervals"][name]
            assert low <= point[name] <= high


def test_a_row_that_stands_for_several_counts_as_often() -> None:
    """Thresholds and shares are those of so many rows; only how certain they are is not."""
    scores, positive = noisy(200)
    times = np.random.default_rng(4).integers(1, 5, 200)
    rows = [example(n, bool(unsafe)) for n, unsafe in enumerate(positive)]
    weighed = [replace(row, weight=float(count)) for row, count in zip(rows, times, strict=True)]
    several = [row for row, count in zip(rows, times, strict=True) for _ in range(count)]
    found = thresholds(heads(scores), weighed, weighted=True)["user"]["unsafe"]["points"]
    expected = thresholds(heads(np.repeat(scores, times)), several)["user"]["unsafe"]["points"]
    assert [{**point, "intervals": None} for point in found] == [{**point, "intervals": None} for point in expected]
    for few, many in zip(found, expected, strict=True):
        assert np.ptp(few["intervals"]["recall"]) > np.ptp(many["intervals"]["recall"])
    assert thresholds(heads(scores), weighed) == thresholds(heads(scores), rows)


def test_a_rate_that_no_threshold_keeps_is_left_out() -> None:
    """Where harmless rows have the highest score there is, only rates that allow all of them have a threshold."""
    examples = [example(n, n < 5, hazards=None if n < 5 else frozenset()) for n in range(15)]
    scores = heads(np.array([0.5] * 5 + [1.0] + [0.1] * 9))
    points = thresholds(scores, examples)["user"]["unsafe"]["points"]
    assert [point["max_fpr"] for point in points] == [0.1, 0.2]
    assert points[0]["threshold"] == 0.100001


def test_curves_say_what_plots_show() -> None:
    """Counts of scores by label, the share that is unsafe of each bin, and precision over recall."""
    found = curves(SCORES, POSITIVE)
    assert sum(found["scores"]["safe"]) == sum(found["scores"]["unsafe"]) == 5
    assert [bin["unsafe"] for bin in found["reliability"]] == [float(label) for label in POSITIVE[::-1]]
    assert [bin["score"] for bin in found["reliability"]] == pytest.approx(SCORES[::-1])
    assert (found["precision_recall"]["recall"][0], found["precision_recall"]["precision"][0]) == (1, 0.5)


def test_disguises_are_told_beside_plain_rows() -> None:
    """Row by row: what they change is more certain than what either recall is."""
    scores, positive = noisy(2000)
    examples = [example(number, bool(unsafe)) for number, unsafe in enumerate(positive)]
    found = under({"plain": scores, "weaker": np.where(np.arange(2000) % 20, scores, 0.0)}, examples)
    plain, weaker = found["plain"], found["weaker"]
    assert "change" not in plain
    assert weaker["change"] == pytest.approx(weaker["recall"] - plain["recall"], abs=1e-4)
    low, high = weaker["intervals"]["change"]
    assert -0.08 < low < weaker["change"] < high < -0.01
    assert high - low < 0.7 * (plain["intervals"]["recall"][1] - plain["intervals"]["recall"][0])
    assert weaker["fpr"] < plain["fpr"]
