"""The strata of an audit's turns: who speaks, what was decided on what grounds, how near to that allowed ones came."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

from guard.policy.columns import UNSAFE
from guard.types import Action

Facts = Mapping[str, Any]
"""What audit.json says."""

BY = {
    "language": "coalesce(language, '')",
    "source": "coalesce(source, '')",
    "policy": "policy.name",
    "day": "coalesce(strftime(make_timestamp(epoch_us(time)), '%Y-%m-%d'), '')",
}
"""What else can tell strata apart, in SQL."""

_SURE = 0.01  # labels differ so much at least, wherever scores are surer than that
_NEAR = ((0.5, "near"), (0.1, "below"))  # the highest score, as a share of its threshold; others are far
_UNSAFE = 0.5  # stands for the threshold of the overall score, which tells harm that no category is about
_LOWEST = 1e-6  # of thresholds, as shares of 0 are none


@dataclass(frozen=True, slots=True)
class Choice:
    """What is drawn: `by` are names of BY; `action` and `category` leave only turns that have them."""

    size: int = 400
    seed: int = 0
    by: tuple[str, ...] = ()
    action: Action | None = None
    category: str = ""


class Stratum(NamedTuple):
    name: str
    role: str
    is_allowed: bool
    size: int
    unsafe: float

    @property
    def doubt(self) -> float:
        """The standard deviation of the labels, if scores are right, times the size."""
        share = min(max(self.unsafe, _SURE), 1 - _SURE)
        return self.size * sqrt(share * (1 - share))


def view(parts: Sequence[str], facts: Facts, hazards: Collection[str], choice: Choice) -> str:
    """SQL that makes the view `turns`: rows of the parts with what was `said`, a `stratum` and a number to `draw` by.

    Without a stratum is what no model scored, and allowed turns of roles that have no thresholds. What was said is also
    told of a policy in shadow.
    """
    near = [
        f"WHEN policy.name = {_quoted(name)} AND role = {_quoted(role)} THEN greatest({', '.join(shares)})"
        for name, policy in facts["policies"].items()
        for role, shares in _shares(policy["categories"], hazards).items()
    ]
    bands = " ".join(f"WHEN near >= {share} THEN {_quoted(name)}" for share, name in _NEAR)
    by = "".join(f", {BY[name]}" for name in choice.by)
    return f"""
        CREATE VIEW turns AS
        WITH told AS (
            SELECT *,
                coalesce(violations[1].action, 'allow') AS said,
                coalesce(nullif(violations[1].category, ''), violations[1].rule) AS about,
                CASE {" ".join(near)} ELSE NULL END AS near
            FROM read_parquet([{", ".join(map(_quoted, parts))}])
        )
        SELECT *,
            CASE
                WHEN scores IS NULL OR (said = 'allow' AND near IS NULL) THEN NULL
                WHEN said = 'allow' THEN concat_ws(' / ', role, 'allow', CASE {bands} ELSE 'far' END{by})
                ELSE concat_ws(' / ', role, said, about{by})
            END AS stratum,
            md5_number_lower(concat_ws(':', {choice.seed:d}, input, row, turn)) AS draw
        FROM told WHERE {" AND ".join(_wanted(choice))}
    """


def _wanted(choice: Choice) -> Iterator[str]:
    yield "true"
    if choice.action is not None:
        yield f"said = {_quoted(choice.action.name.lower())}"
    if choice.category:
        yield f"list_contains([v.category FOR v IN violations], {_quoted(choice.category)})"


def _shares(categories: Mapping[str, Any], hazards: Collection[str]) -> Mapping[str, list[str]]:
    """By role, how far each score is on its way to the mildest threshold; in SQL."""
    shares = dict[str, list[str]]()
    for category in categories.values():
        if all(code in hazards for code in category["hazards"]):
            for role, thresholds in category["thresholds"].items():
                least = max(min(thresholds.values()), _LOWEST)
                shares.setdefault(role, [f"scores.unsafe / {_UNSAFE}"]).append(f"({_score(category)}) / {least}")
    return shares


def _score(category: Mapping[str, Any]) -> str:
    fed = [f"scores.hazards.{_name(code)}" for code in category["hazards"]]
    match category["scoring"] if fed else UNSAFE:
        case "unsafe":
            return "scores.unsafe"
        case "any":
            return "1 - " + " * ".join(f"(1 - {one})" for one in fed)
        case "weighted":
            return " + ".join(f"{weight} * {one}" for weight, one in zip(category["weights"], fed, strict=True))
        case _:
            return f"greatest({', '.join(fed)})"


def _quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
