"""What a stratified sample tells of the turns that it was drawn from: shares, with intervals that know the strata.

In each stratum the share of harmful turns has a beta distribution given the labels (a Dirichlet where decisions differ
within it), and what was not labelled is drawn from that: 2,000 possible audits, in 95 % of which a rate lies within its
interval (Webber, Approximate Recall Confidence Intervals, 2013). Bootstraps and normal approximations say nothing where
0 of 20 are harmful. The strata of one role and decision share one Jeffreys prior: one each would add harm by the number
of strata, and put the recall too low.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.audit.review.sample import Case, Sample

Interval = tuple[float, float]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

HARMLESS, HARMFUL, OTHERWISE, UNKNOWN = 0, 1, 2, -1
"""What a turn is: harmless, of the harm that is asked for, harmful in another way, or not told."""

_DRAWS = 2000
_PRIOR = 0.5  # Jeffreys'
_KINDS = 3
_OUTSIDE = 2 * _KINDS  # the cell of what a rate is not about; others are 3 times flagged plus what it is
_CELLS = _OUTSIDE + 1


@dataclass(frozen=True, slots=True)
class Share:
    """A share of turns as `rows` labelled ones tell it, with its 95 % interval."""

    value: float
    interval: Interval
    rows: int


@dataclass(frozen=True, slots=True)
class Rates:
    """How decisions about turns and labels agree; None where no labelled turn tells it.

    precision: of turns decided so, how many are harmful. recall: of harmful turns, how many are decided so. fpr: of
    harmless turns, how many are.
    """

    precision: Share | None
    recall: Share | None
    fpr: Share | None


class Strata:
    """The strata of a sample, and the cases of it that have a label.

    Where none of a stratum has one, those of the same role and decision stand in for it. `missing` turns are in strata
    for which none can. Of a sample that is not whole only precision is told.
    """

    def __init__(self, sample: Sample, labelled: Sequence[Case]) -> None:
        size = {case.stratum: case.size for case in sample.cases}
        domain = {case.stratum: case.domain for case in sample.cases}
        counted = Counter(case.stratum for case in labelled)
        whole, told = defaultdict[object, int](int), defaultdict[object, int](int)
        for name in size:
            whole[domain[name]] += size[name]
            told[domain[name]] += size[name] if counted[name] else 0
        names = sorted(counted)
        shared = Counter(domain[name] for name in names)
        self.missing = sum(size for of, size in whole.items() if not told[of])
        self.replaced = sum(size for of, size in whole.items() if told[of]) - sum(told.values())
        sizes = [size[name] * whole[domain[name]] / told[domain[name]] for name in names]
        self._is_whole = sample.is_whole
        self._sizes: Whole = np.round(np.array(sizes)).astype(np.int64)
        self._prior: Floats = np.array([_PRIOR / shared[domain[name]] for name in names])
        self._of: Whole = np.array([names.index(case.stratum) for case in labelled], np.int64)
        self._drawn: Whole = np.array([counted[name] for name in names], np.int64)
        self.weights: Floats = (self._sizes / self._drawn)[self._of]
        """How many turns each labelled case stands for."""

    def rates(self, decided: Bools, is_what: Whole, inside: Bools | None = None) -> Rates:
        """Of the labelled cases `inside`, [cases] each; what is UNKNOWN tells nothing."""
        known = is_what != UNKNOWN
        cells = np.where(inside if inside is not None else True, _KINDS * decided + is_what, _OUTSIDE)
        return self._rates(cells[known], self._of[known])

    def _rates(self, cells: Whole, of: Whole) -> Rates:
        counts = np.zeros((len(self._sizes), _CELLS), np.int64)
        np.add.at(counts, (of, cells), 1)
        kept = counts.sum(axis=1) > 0
        if not kept.any():
            return Rates(None, None, None)
        counts, sizes, prior = counts[kept], self._sizes[kept], self._prior[kept]
        expected = (sizes[:, None] * counts / counts.sum(axis=1, keepdims=True)).sum(axis=0)
        possible = _possible_totals(counts, sizes, prior)
        rows = counts.sum(axis=0)
        yes, no = _KINDS, 0
        precision = _share(rows, expected, possible, [yes + HARMFUL], [yes + HARMLESS, yes + OTHERWISE])
        if not self._is_whole:
            return Rates(precision, None, None)
        return Rates(
            precision,
            _share(rows, expected, possible, [yes + HARMFUL], [no + HARMFUL]),
            _share(rows, expected, possible, [yes + HARMLESS], [no + HARMLESS]),
        )


def _possible_totals(counts: Whole, sizes: Whole, prior: Floats) -> Whole:
    """[draws, cells]: how many turns of all strata may be in each cell; the same for the same counts."""
    random = np.random.default_rng(0)
    shapes = counts + np.where(_may_be(counts), prior[:, None], 0.0)
    shares = random.standard_gamma(np.broadcast_to(shapes, (_DRAWS, *shapes.shape)))
    shares /= shares.sum(axis=2, keepdims=True)
    rest = np.maximum(sizes - counts.sum(axis=1), 0)
    totals: Whole = random.multinomial(rest, shares).sum(axis=1) + counts.sum(axis=0)
    return totals


def _may_be(counts: Whole) -> Bools:
    """[strata, cells]: of what is decided as some labelled turn of the stratum is, any may be harmless or harmful."""
    seen = counts > 0
    for first in (0, _KINDS):
        either = seen[:, first : first + _KINDS].any(axis=1)
        seen[:, first + HARMLESS] |= either
        seen[:, first + HARMFUL] |= either
    return seen


def _share(rows: Whole, expected: Floats, possible: Whole, hits: list[int], misses: list[int]) -> Share | None:
    every = hits + misses
    if not rows[every].sum():
        return None
    value = float(expected[hits].sum() / expected[every].sum())
    of = possible[:, every].sum(axis=1)
    found = possible[of > 0][:, hits].sum(axis=1) / of[of > 0]
    low, high = np.quantile(found, (0.025, 0.975))
    return Share(value, (min(float(low), value), max(float(high), value)), int(rows[every].sum()))
