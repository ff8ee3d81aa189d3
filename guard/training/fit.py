"""What a policy learns from labelled rows: heads for its own categories, and thresholds that keep to a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import quantile_test

from guard.errors import ConfigError
from guard.model.checkpoint import Checkpoint
from guard.policy.compile import Category, Policy, Threshold
from guard.policy.heads import digest, make_head
from guard.policy.schema import PolicySpec
from guard.training.data import Example
from guard.training.evaluate import Bools, Floats, wilson
from guard.training.formats import read_examples
from guard.training.head import learn
from guard.types import Action, Head, Role, Scores

Interval = tuple[float, float]
Target = tuple[Literal["max_fpr", "min_recall"], float]

_DOUBT = 0.05  # what intervals of 95 % leave


@dataclass(frozen=True, slots=True)
class Share:
    """Of `rows` so many reach a threshold, a share `value` by weight; with its 95 % interval among others like them.

    As much as all of them tell, `effective` rows of one weight would tell (Kish).
    """

    hits: int
    rows: int
    value: float
    effective: int

    @property
    def interval(self) -> Interval:
        return wilson(round(self.value * self.effective), self.effective)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A threshold for turns of a role, in place of that `before`.

    `interval` is where 95 % of such thresholds lie, fitted on as many rows like these. `needed` is how many rows of the
    target's label it takes for the rows to tell, with 95 % confidence, that a threshold holds the target at all.
    """

    category: str
    role: Role
    action: Action
    before: float
    threshold: float
    interval: Interval
    fpr: Share
    recall: Share
    needed: int

    @property
    def loc(self) -> tuple[str, ...]:
        """Where it stands in a policy's file."""
        action = self.action.name.lower()
        place = (action, "at") if self.action is Action.REDIRECT else (action,)
        return ("categories", self.category, "thresholds", self.role.value, *place)


def teach(
    path: Path, spec: PolicySpec, heads: Mapping[str, Head], checkpoint: Checkpoint
) -> dict[str, tuple[Head, dict[str, Any]]]:
    """Heads with their metrics (see guard.training.head) for the policy's categories with examples, by category.

    Left out are those whose head was fitted to this model and from these examples. Raises ConfigError for examples
    that cannot be used.
    """
    taught = {}
    for name, category in spec.categories.items():
        if category.examples is None:
            continue
        file, head = path.with_name(category.examples), heads.get(name)
        there = digest(file)
        if head and head.model == checkpoint.revision and there in (None, head.examples):
            continue
        learned = learn(checkpoint, read_examples(file), name)
        head = make_head(name, checkpoint.revision, there or "", learned.weight, learned.bias)
        taught[name] = head, learned.metrics
    return taught


def fit(
    policy: Policy,
    examples: Sequence[Example],
    scores: Sequence[Scores],
    target: Target,
    *,
    category: str | None = None,
    role: Role | None = None,
    action: Action | None = None,
) -> tuple[list[Fitted], list[str]]:
    """A threshold for each category and role, and notes on what was left as it is.

    Each row counts by its weight. Without `category` it is those that hazards or `unsafe` feed; without `action` the
    strictest threshold that a role has. Harmless rows are those labelled 0; of a category are those labelled 1 that
    name a hazard of it, or no hazard where `category` says what the label is about. Raises ConfigError for rows that
    may or may not be of a category, and where thresholds would be out of order.
    """
    chosen, notes = _chosen(policy, examples, category)
    roles = np.array([example.role for example in examples])
    weights = np.array([example.weight for example in examples])
    fitted = []
    for one in chosen:
        belongs = np.array([_belongs(one, example) for example in examples])
        found = np.array([one.score(each) for each in scores])
        for judged, steps in one.thresholds.items():
            step = next((step for step in steps if action in (None, step.action)), None)
            if step is None or role not in (None, judged):
                continue
            harmless, hits = (_Rows.of(found, weights, (roles == judged) & (belongs == label)) for label in (0, 1))
            measured = _fitted(one.name, judged, step, harmless, hits, target)
            if isinstance(measured, str):
                notes.append(f"{one.name} of {judged} turns is left as it is: {measured}")
            else:
                _check_order(measured, steps)
                fitted.append(measured)
    return fitted, notes


def _chosen(policy: Policy, examples: Sequence[Example], category: str | None) -> tuple[list[Category], list[str]]:
    if category is not None:
        return [one for one in policy.categories if one.name == category], []
    chosen = [one for one in policy.categories if one.name not in policy.own]
    vague = sum(example.unsafe and example.hazards is None for example in examples)
    if vague and any(one.hazards for one in chosen):
        raise ConfigError(
            f"{vague} rows are labelled 1 and name no categories: name them, or say with --category which one the "
            "label is about"
        )
    return chosen, [
        f"{own} is left as it is: fit it by itself, with --category {own}, to rows whose label is about it"
        for own in policy.own
    ]


def _belongs(category: Category, example: Example) -> int:
    """1 for a row of the category, 0 for a harmless one, -1 for one that is harmful in another way."""
    if not example.unsafe:
        return 0
    named = not category.hazards or example.hazards is None or example.hazards.intersection(category.hazards)
    return 1 if named else -1


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Scores of rows, highest first, and their weights; [rows] each."""

    scores: Floats
    weights: Floats

    @classmethod
    def of(cls, scores: Floats, weights: Floats, chosen: Bools) -> "_Rows":
        order = np.flatnonzero(chosen)[np.argsort(-scores[chosen], kind="stable")]
        return cls(scores[order], weights[order])

    @property
    def effective(self) -> int:
        return round(self.weights.sum() ** 2 / (self.weights**2).sum()) if len(self.weights) else 0

    def reaching(self, threshold: float) -> Share:
        hits = int((self.scores >= threshold).sum())
        value = float(self.weights[:hits].sum() / self.weights.sum()) if hits else 0.0
        return Share(hits, len(self.scores), value, self.effective)

    def highest(self, share: float) -> float:
        """The score of the first row, from the top, with which more than that share of all is counted."""
        counted = np.cumsum(self.weights)
        return float(self.scores[min(np.searchsorted(counted, share * counted[-1], "right"), len(counted) - 1)])

    def least(self, share: float) -> float:
        """The score of the first row, from the top, with which at least that share of all is counted."""
        counted = np.cumsum(self.weights)
        return float(self.scores[np.searchsorted(counted, (share - 1e-9) * counted[-1])])

    def interval(self, share: float) -> Interval:
        """That of the score which a share of rows like these reaches."""
        if np.ptp(self.weights) == 0:
            low, high = quantile_test(self.scores, p=1 - share).confidence_interval(1 - _DOUBT)
            return 0.0 if np.isnan(low) else float(low), 1.0 if np.isnan(high) else float(high)
        # Woodruff's: where the share may be anywhere in its own interval, so may the score.
        doubt = 1.96 * sqrt(share * (1 - share) / self.effective)
        more, fewer = share + doubt, share - doubt
        return self.highest(more) if more < 1 else 0.0, self.highest(fewer) if fewer > 0 else 1.0


def _fitted(category: str, role: Role, step: Threshold, harmless: _Rows, hits: _Rows, target: Target) -> Fitted | str:
    """A threshold, or why there is none."""
    kind, share = target
    rows, missed = (harmless, share) if kind == "max_fpr" else (hits, 1 - share)
    if not rows.effective:
        return f"no row of that role is {'labelled 0' if kind == 'max_fpr' else 'of the category'}"
    if kind == "max_fpr":
        threshold = (floor(rows.highest(share) * 1e6) + 1) / 1e6
    else:
        threshold = floor(rows.least(share) * 1e6) / 1e6
    if threshold > 1:
        return "more harmless rows than that have a score of 1"
    return Fitted(
        category,
        role,
        step.action,
        step.score,
        threshold,
        rows.interval(share),
        harmless.reaching(threshold),
        hits.reaching(threshold),
        ceil(log(_DOUBT) / log(1 - missed)),
    )


def _check_order(fitted: Fitted, steps: Sequence[Threshold]) -> None:
    for step in steps:
        stricter, score = step.action > fitted.action, step.score
        if step.action != fitted.action and (score < fitted.threshold if stricter else score > fitted.threshold):
            raise ConfigError(
                f"{fitted.category} of {fitted.role} turns: {fitted.action.name.lower()} would be "
                f"{fitted.threshold:.6g}, {'above' if stricter else 'below'} {step.action.name.lower()} at "
                f"{score:.6g}; fit that first, with --action {step.action.name.lower()}, or change it"
            )
