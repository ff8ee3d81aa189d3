"""What a model's scores are worth on labelled rows: metrics, and the thresholds for a false-positive rate."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from guard.training.data import Example
from guard.types import HAZARDS, Role

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

HEADS = ("unsafe", *HAZARDS)
FALSE_POSITIVE_RATES = (0.005, 0.01, 0.02, 0.05)


def labels(examples: Sequence[Example]) -> tuple[Bools, Bools]:
    """[rows, 1 + hazards]: what is true of each row, and where that is known."""
    known = [[True, *[example.hazards is not None] * len(HAZARDS)] for example in examples]
    return np.array([example.labels for example in examples], bool), np.array(known, bool)


def metrics(scores: Floats, positive: Bools) -> dict[str, float]:
    """Of probabilities, [rows]; what needs both labels is left out where one is missing."""
    found: dict[str, float] = {"rows": len(scores), "positives": int(positive.sum())}
    if not positive.all():
        found["fpr_at_0.5"] = float((scores[~positive] >= 0.5).mean())
    if positive.any():
        found["recall_at_0.5"] = float((scores[positive] >= 0.5).mean())
    if positive.any() and not positive.all():
        found["auprc"] = float(average_precision_score(positive, scores))
        found["auroc"] = float(roc_auc_score(positive, scores))
        threshold = threshold_at(scores[~positive], 0.01)
        found["recall_at_fpr_0.01"] = float((scores[positive] >= threshold).mean())
        found["ece"] = calibration_error(scores, positive)
    return {name: round(value, 4) for name, value in found.items()}


def calibration_error(scores: Floats, positive: Bools, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width."""
    which = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = (abs(scores[which == b].sum() - positive[which == b].sum()) for b in range(bins))
    return float(sum(gaps) / len(scores))


def threshold_at(negatives: Floats, rate: float) -> float:
    """The lowest threshold that at most a share `rate` of these scores of harmless rows reaches."""
    allowed = int(rate * len(negatives))
    return float(np.nextafter(np.sort(negatives)[::-1][allowed], 2.0))


def evaluate(scores: Floats, examples: Sequence[Example]) -> dict[str, Any]:
    """Metrics of `unsafe` over all rows and by role, language and source, and of each hazard; scores [rows, heads]."""
    true, known = labels(examples)

    def grouped(keys: Iterable[str]) -> dict[str, dict[str, float]]:
        of = np.array(list(keys))
        return {str(key): metrics(scores[of == key, 0], true[of == key, 0]) for key in np.unique(of)}

    return {
        "unsafe": metrics(scores[:, 0], true[:, 0]),
        "by_role": grouped(example.role for example in examples),
        "by_language": grouped(example.lang for example in examples),
        "by_source": grouped(example.source for example in examples),
        "hazards": {
            code: metrics(scores[known[:, head], head], true[known[:, head], head])
            for head, code in enumerate(HEADS)
            if head and true[known[:, head], head].any()
        },
    }


def thresholds(scores: Floats, examples: Sequence[Example]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By role and head: for each false-positive rate among harmless rows the threshold, and the recall it leaves.

    A head without a positive row of the role is left out.
    """
    true, known = labels(examples)
    roles = np.array([example.role for example in examples])
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    for role in (Role.USER, Role.AGENT):
        harmless = (roles == role) & ~true[:, 0]
        table[role] = {}
        for head, code in enumerate(HEADS):
            positive = (roles == role) & true[:, head] & known[:, head]
            if positive.any() and harmless.any():
                table[role][code] = [
                    _operating_point(scores[harmless, head], scores[positive, head], rate)
                    for rate in FALSE_POSITIVE_RATES
                ]
    return table


def _operating_point(negatives: Floats, positives: Floats, rate: float) -> dict[str, float]:
    threshold = threshold_at(negatives, rate)
    return {
        "fpr": rate,
        "threshold": round(threshold, 4),
        "recall": round(float((positives >= threshold).mean()), 4),
        "positives": len(positives),
    }
