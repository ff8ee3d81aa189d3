"""The scores of each category, as its policy makes them of the hazards, and the turns at their ends and edges."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from guard.audit.report.finished import LEVELS, Finished, parquet, quoted
from guard.types import Role

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BINS = 50
_NEAR = 0.1  # a score that is further from its threshold is no doubtful one
_OF_EACH = 2  # cases of one category, so that no category takes all the room
_SHOWN = 10  # cases of each kind
_CHARACTERS = 200  # of a text
_ORDER = "f: filename, r: file_row_number"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Scores of the turns of a role that the policy judges in a category; each bin is 1/BINS wide.

    The last bin holds scores of 1, too. `turns` are those that the model scored.
    """

    policy: str
    category: str
    role: str
    thresholds: Mapping[str, float]
    turns: int
    highest: float | None
    bins: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A turn whose score is `above` its threshold or below it; `text` is the beginning, None where it is not shown.

    `action` is what stands at the threshold: of a score above it what was found, below it what was not.
    """

    id: str
    turn: int
    input: str
    row: int
    role: str
    category: str
    action: str
    score: float
    threshold: float
    above: bool
    text: str | None


class _Place(NamedTuple):
    file: str
    row: int


class _Pick(NamedTuple):
    """A case that is not yet looked up."""

    distance: float
    place: _Place
    category: str
    action: str
    score: float
    threshold: float


def histograms(database: "DuckDBPyConnection", policies: Mapping[str, Mapping[str, Any]]) -> tuple[Histogram, ...]:
    return tuple(
        histogram
        for policy, told in policies.items()
        for category, spec in told["categories"].items()
        for histogram in _histograms(database, policy, category, spec)
    )


def cases(database: "DuckDBPyConnection", finished: Finished, text: bool) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The most certain ones, strictest action first, and the most doubtful ones, closest to the threshold first."""
    certain = [pick for action in reversed(LEVELS[1:]) for pick in _closest(_reached(database, "-margin"), action)]
    above = _closest(pick for pick in _reached(database, "margin") if pick.distance <= _NEAR)
    below = _closest(
        pick
        for policy, told in finished.policies.items()
        for category, spec in told["categories"].items()
        for pick in _missed(database, policy, category, spec)
    )
    looked_up = _look_up(database, finished, [pick.place for pick in (*certain, *above, *below)], text)
    doubtful = [*(_case(pick, True, looked_up) for pick in above), *(_case(pick, False, looked_up) for pick in below)]
    return (
        tuple(_case(pick, True, looked_up) for pick in certain),
        tuple(sorted(doubtful, key=lambda case: (not case.above, abs(case.score - case.threshold)))),
    )


def score(spec: Mapping[str, Any]) -> str:
    """A category's score in SQL, as guard.policy.columns computes it."""
    if not spec["hazards"]:
        return "scores.unsafe::DOUBLE"
    fed = ['scores.hazards."' + code.replace('"', '""') + '"::DOUBLE' for code in spec["hazards"]]
    match spec["scoring"]:
        case "weighted":
            weighted = (f"{weight} * {one}" for weight, one in zip(spec["weights"], fed, strict=True))
            return f"least(1.0, {' + '.join(weighted)})"
        case "any":
            either = " * ".join(f"(1.0 - {one})" for one in fed)
            return f"greatest(1.0 - {either}, {', '.join(fed)})"
        case _:
            return f"greatest({', '.join(fed)})"


def _histograms(
    database: "DuckDBPyConnection", policy: str, category: str, spec: Mapping[str, Any]
) -> Iterator[Histogram]:
    bins: defaultdict[str, list[int]] = defaultdict(lambda: [0] * BINS)
    highest: dict[str, float] = {}
    found = database.execute(
        f"SELECT role::VARCHAR, least({BINS - 1}, floor(score * {BINS}))::INT AS bin, count(*), max(score) "
        f"FROM {_scored(policy, spec)} GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for role, place, count, top in found:
        bins[role][place] = count
        highest[role] = max(highest.get(role, 0.0), top)
    for role in _judged(spec):
        yield Histogram(
            policy, category, role, spec["thresholds"][role], sum(bins[role]), highest.get(role), tuple(bins[role])
        )


def _judged(spec: Mapping[str, Any]) -> list[str]:
    return [role.value for role in Role if spec["thresholds"].get(role.value)]


def _scored(policy: str, spec: Mapping[str, Any]) -> str:
    """The scores of the turns that a policy judged, as a table of SQL."""
    return (
        f"(SELECT role, filename, file_row_number, {score(spec)} AS score FROM turns "
        f"WHERE policy.name = {quoted(policy)} AND scores.unsafe IS NOT NULL)"  # scores alone would read each of them
    )


def _reached(database: "DuckDBPyConnection", first: str) -> Iterator[_Pick]:
    """Violations by score, of each category and action those that come first by `margin` or `-margin`."""
    found = database.execute(
        f"SELECT action, category, min_by({{f: filename, r: file_row_number, s: score, t: threshold}}, "
        f"{{d: {first}, {_ORDER}}}, {_OF_EACH}) "
        "FROM (SELECT *, score - threshold AS margin FROM "
        "(SELECT filename, file_row_number, unnest(violations, max_depth := 2) FROM "
        "(SELECT filename, file_row_number, violations FROM turns WHERE len(violations) > 0)) WHERE rule = '') "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    sign = -1 if first.startswith("-") else 1
    for action, category, ones in found:
        for one in ones:
            margin = one["s"] - one["t"]
            yield _Pick(sign * margin, _Place(one["f"], one["r"]), category, action, one["s"], one["t"])


def _missed(database: "DuckDBPyConnection", policy: str, category: str, spec: Mapping[str, Any]) -> Iterator[_Pick]:
    """Scores just below the next threshold of their role."""
    if not (judged := _judged(spec)):
        return
    steps = {role: sorted((at, action) for action, at in spec["thresholds"][role].items()) for role in judged}
    whens = " ".join(
        f"WHEN role = {quoted(role)} AND score < {at} THEN {{a: {quoted(action)}, t: {at}::DOUBLE}}"
        for role in judged
        for at, action in steps[role]
    )
    found = database.execute(
        f"SELECT step.a, min_by({{f: filename, r: file_row_number, s: score, t: step.t}}, "
        f"{{d: step.t - score, {_ORDER}}}, {_OF_EACH}) "
        f"FROM (SELECT *, CASE {whens} END AS step FROM {_scored(policy, spec)}) "
        f"WHERE step.t - score <= {_NEAR} GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for action, ones in found:
        for one in ones:
            yield _Pick(one["t"] - one["s"], _Place(one["f"], one["r"]), category, action, one["s"], one["t"])


def _closest(picks: Iterator[_Pick], action: str = "") -> list[_Pick]:
    """Those of an action, or of all, with so many of each category."""
    taken: defaultdict[str, int] = defaultdict(int)

    def some() -> Iterator[_Pick]:
        for pick in sorted(one for one in picks if action in ("", one.action)):
            taken[pick.category] += 1
            if taken[pick.category] <= _OF_EACH:
                yield pick

    return list(islice(some(), _SHOWN))


def _look_up(
    database: "DuckDBPyConnection", finished: Finished, places: Sequence[_Place], text: bool
) -> dict[_Place, tuple[Any, ...]]:
    """What is told of the turns at those places: only the parts that hold them are read."""
    if not places:
        return {}
    files = sorted({place.file for place in places})
    shown = f"left(text, {_CHARACTERS + 1})" if text else "NULL"
    wanted = ", ".join(f"({quoted(place.file)}, {place.row})" for place in sorted(set(places)))
    found = database.execute(
        f"SELECT filename, file_row_number, id, turn, input::VARCHAR, row, role::VARCHAR, {shown} "
        f"FROM {parquet([Path(file) for file in files])} WHERE (filename, file_row_number) IN ({wanted})"
    ).fetchall()
    return {_Place(file, row): tuple(told) for file, row, *told in found}


def _case(pick: _Pick, above: bool, looked_up: Mapping[_Place, tuple[Any, ...]]) -> Case:
    id, turn, input, row, role, text = looked_up[pick.place]
    if text is not None and len(text) > _CHARACTERS:
        text = text[:_CHARACTERS] + "…"
    return Case(id, turn, input, row, role, pick.category, pick.action, pick.score, pick.threshold, above, text)
