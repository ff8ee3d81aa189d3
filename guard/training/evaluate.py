"""What a model's scores are worth on labelled rows: metrics and operating points, each with its 95 % interval."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score, roc_curve

from guard.training.data import Example
from guard.types import HAZARDS, Role

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

HEADS = ("unsafe", *HAZARDS)
METRICS = ("auprc", "auroc", "f1", "fpr", "recall", "recall_at_fpr_0.01", "ece")
FALSE_POSITIVE_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LENGTHS = (0, 100, 400, 1600)
"""Where the buckets of length begin; characters of the conversation."""
_BINS = 10  # of calibration
_FEWEST = 5  # rows of either label; resamples of fewer say nothing of how uncertain a metric is
_RESAMPLES = 500
_BLOCK = 4_000_000  # counts of rows that are held at a time


def labels(examples: Sequence[Example]) -> tuple[Bools, Bools]:
    """[rows, 1 + hazards]: what is true of each row, and where that is known."""
    known = [[True, *[example.hazards is not None] * len(HAZARDS)] for example in examples]
    return np.array([example.labels for example in examples], bool), np.array(known, bool)


def evaluate(scores: Floats, examples: Sequence[Example], threshold: float = 0.5) -> dict[str, Any]:
    """`metrics` of `unsafe` over all rows and by role, language, source and length, and of each hazard that occurs.

    `scores` are [rows, 1 + hazards], not a number where the model does not score a hazard. `curves` is what plots show.
    """
    true, _ = labels(examples)
    return {
        "threshold": threshold,
        **_sliced(examples, scores, lambda rows, head: metrics(scores[rows, head], true[rows, head], threshold)),
        "curves": curves(scores[:, 0], true[:, 0]),
    }


def compare(scores: Floats, others: Floats, examples: Sequence[Example], threshold: float = 0.5) -> dict[str, Any]:
    """`difference` of two models on the same rows, sliced as `evaluate` does."""
    true, _ = labels(examples)
    return {
        "threshold": threshold,
        **_sliced(
            examples,
            scores + others,
            lambda rows, head: difference(scores[rows, head], others[rows, head], true[rows, head], threshold),
        ),
    }


def metrics(scores: Floats, positive: Bools, threshold: float = 0.5) -> dict[str, Any]:
    """METRICS of probabilities [rows] and their `intervals`.

    Left out is what needs harmless or unsafe rows where there are none, or both where either are fewer than five.
    Intervals of the shares `fpr` and `recall` are Wilson's, which tell how little 0 of 20 says; the others are those
    of `_interval`.
    """
    estimates = _estimates(scores, positive, threshold)
    resampled = _resampled(positive, lambda counts: recount(scores, positive, counts, threshold))
    flagged = scores >= threshold
    shares = {"fpr": flagged[~positive], "recall": flagged[positive]}
    intervals = {
        name: wilson(int(shares[name].sum()), len(shares[name]))
        if name in shares
        else _interval(resampled[name], estimate)
        for name, estimate in estimates.items()
    }
    return _rounded({"rows": len(scores), "positives": int(positive.sum()), **estimates, "intervals": intervals})


def difference(scores: Floats, others: Floats, positive: Bools, threshold: float = 0.5) -> dict[str, Any]:
    """METRICS of `scores` minus those of `others`, [rows] each, with the intervals of the difference.

    Both models are measured on the same resamples of the rows; intervals of the shares `fpr` and `recall` are
    Newcombe's. `changed` is the share of rows whose verdict at the threshold differs.
    """
    of_others = _estimates(others, positive, threshold)
    estimates = {name: value - of_others[name] for name, value in _estimates(scores, positive, threshold).items()}

    def recounted(counts: Floats) -> dict[str, Floats]:
        subtrahend = recount(others, positive, counts, threshold)
        return {name: value - subtrahend[name] for name, value in recount(scores, positive, counts, threshold).items()}

    resampled = _resampled(positive, recounted)
    hits, of_other = scores >= threshold, others >= threshold
    changed = hits != of_other
    rows = {"fpr": ~positive, "recall": positive}
    intervals = {
        name: newcombe(hits[rows[name]], of_other[rows[name]]) if name in rows else _interval(resampled[name], estimate)
        for name, estimate in estimates.items()
    }
    intervals["changed"] = wilson(int(changed.sum()), len(changed))
    found = {"rows": len(scores), "positives": int(positive.sum()), "changed": float(changed.mean()), **estimates}
    return _rounded(found | {"intervals": intervals})


def recount(scores: Floats, positive: Bools, counts: Floats, threshold: float) -> dict[str, Floats]:
    """METRICS, [resamples] each, where row i counts `counts[:, i]` times; a missing label makes them meaningless."""
    order = np.argsort(-scores)
    descending = scores[order]
    last = np.flatnonzero(np.diff(descending, append=-1.0))  # of each run of equal scores
    found = [np.cumsum(counts[:, order] * label[order], axis=1)[:, last] for label in (positive, ~positive)]
    true, false = (np.pad(hits, ((0, 0), (1, 0))) for hits in found)  # [resamples, 1 + distinct scores]
    recall, fpr = (hits / np.maximum(hits[:, -1:], 1) for hits in (true, false))
    precision = true / np.maximum(true + false, 1)
    at = int((descending[last] >= threshold).sum())  # the column of what reaches the threshold
    return {
        "auprc": (np.diff(recall, axis=1) * precision[:, 1:]).sum(axis=1),
        "auroc": np.trapezoid(recall, fpr, axis=1),
        "f1": 2 * true[:, at] / np.maximum(true[:, at] + false[:, at] + true[:, -1], 1),
        "fpr": fpr[:, at],
        "recall": recall[:, at],
        "recall_at_fpr_0.01": np.where(fpr <= 0.01, recall, 0).max(axis=1),
        "ece": calibration_error(scores, positive, counts),
    }


def calibration_error(scores: Floats, positive: Bools, counts: Floats) -> Floats:
    """Expected calibration error over bins of equal width, [resamples], where row i counts `counts[:, i]` times."""
    gaps = (scores - positive)[:, None] * (_bin(scores, _BINS)[:, None] == np.arange(_BINS))  # [rows, bins]
    error: Floats = abs(counts @ gaps).sum(axis=1) / counts.sum(axis=1)
    return error


def curves(scores: Floats, positive: Bools) -> dict[str, Any]:
    """What plots show of probabilities [rows]: reliability by bin, counts of scores by label, precision over recall."""
    bins = _bin(scores, _BINS)
    reliability = [
        {
            "score": scores[bins == b].mean(),
            "unsafe": positive[bins == b].mean(),
            "interval": wilson(int(positive[bins == b].sum()), int((bins == b).sum())),
        }
        for b in np.unique(bins)
    ]
    counts = {
        label: np.bincount(_bin(scores[rows], 2 * _BINS), minlength=2 * _BINS).tolist()
        for label, rows in (("safe", ~positive), ("unsafe", positive))
    }
    found: dict[str, Any] = {"reliability": reliability, "scores": counts}
    if positive.any():
        precision, recall, _ = precision_recall_curve(positive, scores, drop_intermediate=True)
        some = np.unique(np.linspace(0, len(recall) - 1, 100).astype(int))
        found["precision_recall"] = {"precision": precision[some].tolist(), "recall": recall[some].tolist()}
    return _rounded(found)


def under(disguised: Mapping[str, Floats], examples: Sequence[Example], threshold: float = 0.5) -> dict[str, Any]:
    """By the name of a disguise: `recall`, `fpr` and their Wilson `intervals`, of scores of `unsafe`, [rows] each.

    The first ones are of the plain rows; for the others `change` is how much their recall differs from that, with the
    normal interval of a mean of differences, row by row.
    """
    true = labels(examples)[0][:, 0]
    plain = next(iter(disguised.values()))[true] >= threshold
    found: dict[str, Any] = {}
    for name, scores in disguised.items():
        hits = {"recall": scores[true] >= threshold, "fpr": scores[~true] >= threshold}
        shares: dict[str, Any] = {rate: float(rows.mean()) for rate, rows in hits.items()}
        intervals = {rate: wilson(int(rows.sum()), len(rows)) for rate, rows in hits.items()}
        if found:
            differences = hits["recall"].astype(float) - plain
            change, error = differences.mean(), 1.96 * differences.std() / len(differences) ** 0.5
            shares["change"], intervals["change"] = float(change), (float(change - error), float(change + error))
        found[name] = _rounded({"rows": len(scores), "positives": int(true.sum()), **shares, "intervals": intervals})
    return found


def thresholds(
    scores: Floats, examples: Sequence[Example], *, weighted: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """By role and head, for each of FALSE_POSITIVE_RATES the threshold that keeps to it, and what it then does.

    Negatives are all harmless rows of the role. Each of `points` has the threshold, `fpr` and `recall`, the shares of
    negatives and of positives that reach it, and their Wilson `intervals`. A head without a positive row of the role is
    left out, and so is a point which no threshold of at most 1 can keep. Where it is `weighted` a row counts for as
    many as its weight says, and intervals are of as many rows as would tell as much (Kish 1965).
    """
    true, known = labels(examples)
    weights = np.array([example.weight if weighted else 1.0 for example in examples])
    roles = np.array([example.role for example in examples])
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for role in (Role.USER, Role.AGENT):
        harmless = (roles == role) & ~true[:, 0]
        table[role] = {}
        for head in _scored(scores):
            positive = (roles == role) & true[:, head] & known[:, head]
            if positive.any() and harmless.any():
                table[role][HEADS[head]] = {
                    "negatives": int(harmless.sum()),
                    "positives": int(positive.sum()),
                    "points": list(
                        _points(
                            _Weighed(scores[harmless, head], weights[harmless]),
                            _Weighed(scores[positive, head], weights[positive]),
                        )
                    ),
                }
    return table


def threshold_at(negatives: Floats, rate: float, weights: Floats | None = None) -> float:
    """The lowest threshold, in millionths, that at most a share `rate` of these scores of harmless rows reaches."""
    order = np.argsort(-negatives)
    counted = np.cumsum(np.ones(len(order)) if weights is None else weights[order])
    first = negatives[order][np.searchsorted(counted, rate * counted[-1], "right")]
    return float(np.floor(first * 1e6) + 1) / 1e6


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    interval = binomtest(hits, rows).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def newcombe(hits: Bools, others: Bools) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of the same rows (Newcombe 1998, his method 10).

    doi:10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C
    """
    rows = len(hits)
    a, b, c, d = (int(both.sum()) for both in (hits & others, hits & ~others, ~hits & others, ~hits & ~others))
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    together = (a * d - b * c) / margins**0.5 if margins else 0.0
    one, other = (a + b) / rows, (a + c) / rows
    (low, high), (least, most) = wilson(a + b, rows), wilson(a + c, rows)

    def apart(below: float, above: float) -> float:
        return float(np.sqrt(max(0.0, below**2 - 2 * together * below * above + above**2)))

    return one - other - apart(one - low, most - other), one - other + apart(high - one, other - least)


class _Weighed(NamedTuple):
    """Scores, [rows], and for how many rows each counts."""

    scores: Floats
    weights: Floats

    def reaching(self, threshold: float) -> tuple[float, tuple[float, float]]:
        """The share that reaches it, and its interval."""
        share = float(self.weights[self.scores >= threshold].sum() / self.weights.sum())
        rows = self.weights.sum() ** 2 / (self.weights**2).sum()
        return share, wilson(round(share * rows), round(rows))


def _points(negatives: _Weighed, positives: _Weighed) -> Iterator[dict[str, Any]]:
    for rate in FALSE_POSITIVE_RATES:
        threshold = threshold_at(negatives.scores, rate, negatives.weights)
        if threshold <= 1:
            (fpr, of_fpr), (recall, of_recall) = negatives.reaching(threshold), positives.reaching(threshold)
            shares = {"fpr": fpr, "recall": recall, "intervals": {"fpr": of_fpr, "recall": of_recall}}
            yield {"max_fpr": rate, "threshold": threshold, **_rounded(shares)}


def _sliced(
    examples: Sequence[Example], scores: Floats, measure: Callable[[Bools, int], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` finds of the rows of each slice, for one head."""
    true, known = labels(examples)
    length = [sum(len(turn.text) for turn in example.conversation.turns) for example in examples]
    groups = {
        "by_role": np.array([str(example.role) for example in examples]),
        "by_language": np.array([example.lang for example in examples]),
        "by_source": np.array([example.source for example in examples]),
        "by_length": np.array(LENGTHS)[np.searchsorted(LENGTHS, length, "right") - 1],
    }
    return {
        "unsafe": measure(known[:, 0], 0),
        **{name: {str(key): measure(of == key, 0) for key in np.unique(of)} for name, of in groups.items()},
        "hazards": {
            HEADS[head]: measure(known[:, head], head)
            for head in _scored(scores)
            if head and true[known[:, head], head].any()
        },
    }


def _scored(scores: Floats) -> list[int]:
    return [head for head in range(len(HEADS)) if not np.isnan(scores[:, head]).any()]


def _estimates(scores: Floats, positive: Bools, threshold: float) -> dict[str, float]:
    flagged = scores >= threshold
    found: dict[str, float] = {}
    if not positive.all():
        found["fpr"] = float(flagged[~positive].mean())
    if positive.any():
        found["recall"] = float(flagged[positive].mean())
    if min(positive.sum(), (~positive).sum()) >= _FEWEST:
        fpr, recall, _ = roc_curve(positive, scores, drop_intermediate=False)
        found["auprc"] = float(average_precision_score(positive, scores))
        found["auroc"] = float(roc_auc_score(positive, scores))
        found["f1"] = float(f1_score(positive, flagged))
        found["recall_at_fpr_0.01"] = float(recall[fpr <= 0.01].max())
        found["ece"] = float(calibration_error(scores, positive, np.ones((1, len(scores))))[0])
    return found


def _resampled(positive: Bools, measure: Callable[[Floats], Mapping[str, Floats]]) -> dict[str, Floats]:
    """What `measure` finds of each resample of the rows, drawn within each label; the same for the same labels."""
    random = np.random.default_rng(0)
    blocks = []
    size = max(1, _BLOCK // len(positive))
    for start in range(0, _RESAMPLES, size):
        counts = np.zeros((min(size, _RESAMPLES - start), len(positive)))
        for rows in (positive, ~positive):
            if total := int(rows.sum()):
                counts[:, rows] = random.multinomial(total, np.full(total, 1 / total), len(counts))
        blocks.append(measure(counts))
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}


def _interval(resampled: Floats, estimate: float) -> tuple[float, float]:
    """The middle 95 % of resamples; with the estimate, as a resample's calibration error tends to be larger."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return min(float(low), estimate), max(float(high), estimate)


def _bin(scores: Floats, bins: int) -> NDArray[np.int_]:
    which: NDArray[np.int_] = np.minimum((scores * bins).astype(int), bins - 1)
    return which


def _rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it, floats to four digits."""
    rounded: dict[str, Any] = json.loads(json.dumps(found), parse_float=lambda digits: round(float(digits), 4))
    return rounded
