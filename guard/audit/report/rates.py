"""How often turns are not allowed: in all, and by whatever tells them apart."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guard.audit.report.finished import LEVELS, Finished, level, quoted
from guard.audit.report.intervals import Share

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_MOST = 25  # names, the others are told together
_MOST_DAYS = 1000
_MOST_REASONS = 50
_PLACES = 5  # of rejected rows with one reason


@dataclass(frozen=True, slots=True)
class Turns:
    """All of them. `actions` counts by action; `partly_seen` are those of which the model was not shown everything.

    `first` and `last` are times in UTC, None where no turn tells its own.
    """

    turns: int
    actions: Mapping[str, int]
    not_allowed: Share
    degraded: int
    shadow: int
    partly_seen: int
    without_time: int
    first: str | None
    last: str | None


@dataclass(frozen=True, slots=True)
class Rate:
    """Turns that were not allowed, of those that share a name: empty of those that tell none.

    Where there are too many names, the last rate is that of all others: its name is None, and `names` counts them.
    """

    name: str | None
    names: int
    share: Share


@dataclass(frozen=True, slots=True)
class Found:
    """Turns with a violation of a category, by the strictest action in it, or of a rule; `share` is of all turns."""

    category: str
    rule: str
    flag: int
    redirect: int
    block: int
    share: Share


@dataclass(frozen=True, slots=True)
class Cell:
    """Turns with a violation of a category that are of one role or day; `share` is of the turns of that role."""

    category: str
    of: str
    turns: int
    share: Share | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """Why rows are not judged, with numbers as N; some of them, as INPUT:ROW."""

    reason: str
    count: int
    places: tuple[str, ...]


def turns(database: "DuckDBPyConnection") -> Turns:
    counts = ", ".join(f"count(*) FILTER (level = {place})" for place in range(len(LEVELS)))
    (count, degraded, shadow, partly, timeless, first, last, *actions) = _row(
        database,
        "SELECT count(*), count(*) FILTER (degraded), count(*) FILTER (shadow), "
        "count(*) FILTER (coverage.seen < coverage.total), "
        f"count(*) FILTER (time IS NULL), {_utc('min(time)')}, {_utc('max(time)')}, {counts} FROM turns",
    )
    named = dict(zip(LEVELS, actions, strict=True))
    share = Share.make(count - named["allow"], count)
    return Turns(count, named, share, degraded, shadow, partly, timeless, first, last)


def conversations(database: "DuckDBPyConnection") -> int:
    """Those with a turn that was not allowed."""
    (count,) = _row(database, "SELECT count(*) FROM (SELECT DISTINCT input, row FROM turns WHERE level > 0)")
    return int(count)


def by(database: "DuckDBPyConnection", key: str, most: int = _MOST) -> tuple[Rate, ...]:
    """By a column of `turns`, the most frequent first."""
    found = database.execute(
        f"WITH grouped AS (SELECT coalesce({key}::VARCHAR, '') AS name, count(*) AS turns, "
        "count(*) FILTER (level > 0) AS hits FROM turns GROUP BY ALL), "
        "ranked AS (SELECT *, row_number() OVER (ORDER BY turns DESC, name) AS place FROM grouped) "
        f"SELECT CASE WHEN place <= {most} THEN name END, count(*), sum(hits)::BIGINT, sum(turns)::BIGINT "
        f"FROM ranked GROUP BY least(place, {most} + 1), 1 ORDER BY min(place)"
    ).fetchall()
    return tuple(Rate(name, names, Share.make(hits, count)) for name, names, hits, count in found)


def by_day(database: "DuckDBPyConnection") -> tuple[Rate, ...]:
    """In their order, then the turns without a time, and the days that are too many."""
    return tuple(
        sorted(by(database, "day", _MOST_DAYS), key=lambda rate: (rate.name is None, not rate.name, rate.name))
    )


def find(database: "DuckDBPyConnection") -> None:
    """Makes the table `found`: a row for each turn and category of its violations, at their strictest."""
    database.execute(
        "CREATE TEMP TABLE found AS SELECT any_value(role)::VARCHAR AS role, any_value(day) AS day, category, "
        f"max({level('action')}) AS level "
        "FROM (SELECT filename, file_row_number, role, day, unnest(violations, max_depth := 2) "
        "FROM (SELECT filename, file_row_number, role, day, violations FROM turns WHERE len(violations) > 0)) "
        "GROUP BY filename, file_row_number, category"
    )


def by_category(database: "DuckDBPyConnection", turns: int) -> tuple[Found, ...]:
    return _grounds(database, f"SELECT category, '', {_counted('level')} FROM found GROUP BY ALL", turns)


def by_rule(database: "DuckDBPyConnection", turns: int) -> tuple[Found, ...]:
    return _grounds(
        database,
        f"SELECT v.category, v.rule, {_counted(level('v.action'))} "
        "FROM (SELECT unnest(violations) AS v FROM turns WHERE len(violations) > 0) WHERE v.rule <> '' GROUP BY ALL",
        turns,
    )


def category_by_role(database: "DuckDBPyConnection", spoken: Mapping[str, int]) -> tuple[Cell, ...]:
    """`spoken` are the turns of each role."""
    found = database.execute("SELECT category, role, count(*) FROM found GROUP BY ALL ORDER BY ALL").fetchall()
    return tuple(Cell(category, role, count, Share.make(count, spoken[role])) for category, role, count in found)


def category_by_day(database: "DuckDBPyConnection") -> tuple[Cell, ...]:
    """Of turns that tell their time."""
    query = "SELECT category, day, count(*) FROM found WHERE day <> '' GROUP BY ALL ORDER BY day, category"
    return tuple(Cell(*cell) for cell in database.execute(query).fetchall())


def rejected(database: "DuckDBPyConnection", finished: Finished) -> tuple[Reason, ...]:
    """The most frequent first; of the file only those lines that the manifest counts."""
    counted = int(finished.total("rejected"))
    if not counted or not finished.rejects.is_file():
        return ()
    found = database.execute(
        "WITH rejects AS (SELECT regexp_replace(reason, '[0-9]+', 'N', 'g') AS reason, "
        "input || CASE WHEN row > 0 THEN ':' || row ELSE '' END AS place, row_number() OVER () AS number "
        f"FROM (SELECT * FROM read_json({quoted(glob.escape(str(finished.rejects)))}, format = 'newline_delimited', "
        "columns = {input: 'VARCHAR', row: 'BIGINT', reason: 'VARCHAR'}) "
        f"LIMIT {counted})) "
        f"SELECT reason, count(*) AS count, min_by(place, number, {_PLACES}) FROM rejects GROUP BY reason "
        "ORDER BY count DESC, reason"
    ).fetchall()
    kept = [Reason(reason, count, tuple(places)) for reason, count, places in found[:_MOST_REASONS]]
    if others := found[_MOST_REASONS:]:
        kept.append(Reason(f"{len(others)} other reasons", sum(count for _, count, _ in others), ()))
    return tuple(kept)


def _grounds(database: "DuckDBPyConnection", query: str, turns: int) -> tuple[Found, ...]:
    """The most frequent first."""
    found = [
        Found(category, rule, flag, redirect, block, Share.make(flag + redirect + block, turns))
        for category, rule, flag, redirect, block in database.execute(query).fetchall()
    ]
    return tuple(sorted(found, key=lambda one: (-one.share.count, one.category, one.rule)))


def _counted(of: str) -> str:
    return ", ".join(f"count(*) FILTER ({of} = {place})" for place in range(1, len(LEVELS)))


def _utc(time: str) -> str:
    return f"strftime(make_timestamp(epoch_us({time})), '%Y-%m-%dT%H:%M:%SZ')"


def _row(database: "DuckDBPyConnection", query: str) -> tuple[Any, ...]:
    row = database.execute(query).fetchone()
    assert row is not None  # which an aggregate always gives
    return row
