"""What reviewers say of an audit's sample, and what that tells of the policy: precision, recall, calibration."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from guard.audit.review.estimate import HARMFUL, HARMLESS, OTHERWISE, UNKNOWN, Bools, Rates, Share, Strata, Whole
from guard.audit.review.sample import Case, Sample
from guard.audit.review.sheet import Label, Labels, is_own
from guard.audit.review.strata import Facts
from guard.errors import ConfigError
from guard.policy.compile import Category, Policy, Threshold
from guard.types import Action, Role, Scores

BANDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the bands of scores begin."""


@dataclass(frozen=True, slots=True)
class About:
    """Rates of one decision, by its name: `not allowed`, `block` or a category; a role is empty where it is any."""

    decision: str
    role: str
    rates: Rates


@dataclass(frozen=True, slots=True)
class Band:
    """Turns whose overall score is in a band: what scores promise on average, and what labels say."""

    begins: float
    score: float
    harmful: Share


@dataclass(frozen=True, slots=True)
class Agreement:
    """`alpha` is Krippendorff's, 1 where reviewers always agree and 0 where they do as by chance; None where untold.

    `agreeing` is the share of cases, of the `shared` that several reviewers labelled, on which all agree.
    """

    sheet: str
    reviewers: Mapping[str, int]
    labelled: int
    harmful: int
    unsure: int
    blank: int
    ties: int
    shared: int
    agreeing: float | None
    alpha: float | None
    about: tuple[About, ...]
    bands: tuple[Band, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"reviewers": dict(self.reviewers)}


class Reviewed:
    """The cases of a sample that have a label, by most reviewers, and the strata that they stand for."""

    def __init__(self, sample: Sample, sheets: Sequence[Labels]) -> None:
        said = {case.number: [sheet.by_case.get(case.number) for sheet in sheets] for case in sample.cases}
        found = {case: _majority([label for label in given if label]) for case, given in said.items()}
        self.sample = sample
        self.sheets = sheets
        self.cases = tuple(case for case in sample.cases if isinstance(found[case.number], Label))
        self.labels = tuple(label for label in found.values() if isinstance(label, Label))
        self.left_out = Counter(label for label in found.values() if isinstance(label, str))
        if not self.cases:
            raise ConfigError("there is no label yet: harmless or harmful, in the column label")
        self.strata = Strata(sample, self.cases)

    def decided(self, category: str) -> Bools:
        """Whether each case violates it."""
        return np.array([category in case.violated for case in self.cases])

    def actions(self, least: Action) -> Bools:
        return np.array([case.action >= least for case in self.cases])

    def harm(self) -> Whole:
        return np.array([HARMFUL if label.harmful else HARMLESS for label in self.labels])

    def of_category(self, name: str, category: Category, *, meant: bool = False) -> Whole:
        """What each case is for a category; labels that name no kind are about it where they are so `meant`."""
        names = {name} if _is_of_its_own(category) else set(category.hazards)

        def what(label: Label) -> int:
            if not label.harmful:
                return HARMLESS
            if not names or names & label.kinds or (meant and not label.kinds):
                return HARMFUL
            return OTHERWISE if label.kinds else UNKNOWN

        return np.array([what(label) for label in self.labels])

    def reaching(self, category: Category, role: Role, threshold: float, *, meant: bool = False) -> Rates:
        """Rates of a threshold for turns of a role."""
        reached = np.array([_score(category, case) >= threshold for case in self.cases])
        inside = np.array([case.role is role for case in self.cases])
        return self.strata.rates(reached, self.of_category(category.name, category, meant=meant), inside)


def agree(reviewed: Reviewed, facts: Facts) -> Agreement:
    """What the labels tell of the audit that the sample was drawn from."""
    votes = [
        [label.harmful for sheet in reviewed.sheets if (label := sheet.by_case.get(case.number))]
        for case in reviewed.sample.cases
    ]
    told = [[vote for vote in of if vote is not None] for of in votes]
    several = [of for of in told if len(of) > 1]
    return Agreement(
        reviewed.sample.id,
        {sheet.reviewer: len(sheet.by_case) for sheet in reviewed.sheets},
        len(reviewed.cases),
        sum(bool(label.harmful) for label in reviewed.labels),
        reviewed.left_out["unsure"],
        reviewed.left_out["blank"],
        reviewed.left_out["tie"],
        len(several),
        sum(len(set(of)) == 1 for of in several) / len(several) if several else None,
        alpha(several),
        (*_overall(reviewed), *_by_category(reviewed, facts)),
        tuple(_bands(reviewed)),
        tuple(_notes(reviewed)),
    )


def alpha(votes: Sequence[Sequence[bool]]) -> float | None:
    """Krippendorff's alpha of nominal labels, for cases with two or more of them each; None where all are the same."""
    every = sum(map(len, votes))
    yes = sum(map(sum, votes))
    if not yes * (every - yes):
        return None
    observed = sum(2 * sum(of) * (len(of) - sum(of)) / (len(of) - 1) for of in votes) / every
    return 1 - observed / (2 * yes * (every - yes) / (every * (every - 1)))


def policy_of(facts: Facts, name: str) -> Policy:
    """As it was served, as far as scores and thresholds go."""
    written = facts["policies"][name]
    categories = tuple(_category(*item) for item in written["categories"].items())
    own = {one.name: None for one in categories if _is_of_its_own(one)}
    on_error = dict.fromkeys(Role, Action.ALLOW)
    return Policy(name, written["revision"], written["description"], categories, on_error, own=own)


def scores_of(case: Case) -> Scores:
    return Scores(case.unsafe, case.hazards)


def _category(name: str, written: Mapping[str, Any]) -> Category:
    thresholds = {
        Role(role): tuple(
            Threshold(action, steps[action.name.lower()])
            for action in sorted(Action, reverse=True)
            if action.name.lower() in steps
        )
        for role, steps in written["thresholds"].items()
    }
    return Category(
        name,
        name,
        tuple(written["hazards"]),
        MappingProxyType(thresholds),
        scoring=written["scoring"],
        weights=tuple(written["weights"]),
    )


def _is_of_its_own(category: Category) -> bool:
    return is_own({"hazards": category.hazards})


def _score(category: Category, case: Case) -> float:
    return category.score(scores_of(case))


def _majority(given: Sequence[Label]) -> Label | str:
    """What most say, or why nothing is said; of kinds, what half of those name who name any."""
    votes = [label for label in given if label.harmful is not None]
    if not votes:
        return "unsure" if given else "blank"
    harmful = [label for label in votes if label.harmful]
    if 2 * len(harmful) == len(votes):
        return "tie"
    if 2 * len(harmful) < len(votes):
        return Label(False)
    naming = [label.kinds for label in harmful if label.kinds]
    counted = Counter(kind for kinds in naming for kind in kinds)
    return Label(True, frozenset(kind for kind, count in counted.items() if 2 * count >= len(naming)))


def _overall(reviewed: Reviewed) -> Iterator[About]:
    harm = reviewed.harm()
    roles = sorted({case.role for case in reviewed.cases}, key=list(Role).index)
    for name, least in (("not allowed", Action.FLAG), ("block", Action.BLOCK)):
        decided = reviewed.actions(least)
        yield About(name, "", reviewed.strata.rates(decided, harm))
        for role in roles if len(roles) > 1 else ():
            inside = np.array([case.role is role for case in reviewed.cases])
            yield About(name, role.value, reviewed.strata.rates(decided, harm, inside))


def _by_category(reviewed: Reviewed, facts: Facts) -> Iterator[About]:
    if not any(label.kinds for label in reviewed.labels):
        return
    categories = {name: one for policy in facts["policies"].values() for name, one in policy["categories"].items()}
    for name, written in categories.items():
        what = reviewed.of_category(name, _category(name, written))
        yield About(name, "", reviewed.strata.rates(reviewed.decided(name), what))


def _bands(reviewed: Reviewed) -> Iterator[Band]:
    scores = np.array([case.unsafe for case in reviewed.cases])
    of = np.searchsorted(BANDS, scores, side="right") - 1
    weights = reviewed.strata.weights
    for place, begins in enumerate(BANDS):
        inside = of == place
        share = reviewed.strata.rates(inside, reviewed.harm()).precision
        if share:
            yield Band(begins, float(np.average(scores[inside], weights=weights[inside])), share)


def _notes(reviewed: Reviewed) -> Iterator[str]:
    strata = reviewed.strata
    if strata.replaced:
        yield f"{strata.replaced:,} turns are in strata without a label; others of the same role and decision stand in"
    if strata.missing:
        yield f"{strata.missing:,} turns are left out: no turn of that role and decision has a label"
    vague = sum(bool(label.harmful and not label.kinds) for label in reviewed.labels)
    if vague and any(label.kinds for label in reviewed.labels):
        yield f"{vague} harmful turns name no kind of harm, and tell nothing of categories"
    if not reviewed.sample.is_whole:
        yield "the sample is of some turns only: it tells their precision, and neither recall nor false positives"
