"""What a second policy says otherwise about the same turns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guard.audit.report.finished import LEVELS, level
from guard.audit.report.intervals import Share

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_IDS = 5  # for each kind


@dataclass(frozen=True, slots=True)
class Flip:
    """Turns of a role about which the second policy says `after`, not `before`; some of them, as ID/TURN.

    Of a category, empty for rules that have none, or None: of the verdict as a whole. The share is of the role's turns.
    """

    category: str | None
    role: str
    before: str
    after: str
    share: Share
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flips:
    """How many turns come out otherwise as a whole; `matrix` counts all turns by before and after, in order of LEVELS.

    Flips of verdicts come first, then those of categories; the most frequent first.
    """

    verdicts: Share
    stricter: int
    milder: int
    matrix: tuple[tuple[int, ...], ...]
    flips: tuple[Flip, ...]


def flips(database: "DuckDBPyConnection", spoken: Mapping[str, int]) -> Flips:
    """`spoken` are the turns of each role. A policy in shadow is taken by what it would have done."""
    matrix = [[0] * len(LEVELS) for _ in LEVELS]
    for before, after, count in database.execute(
        "SELECT level, other_level, count(*) FROM turns GROUP BY ALL"
    ).fetchall():
        matrix[before][after] = count
    stricter = sum(count for before, row in enumerate(matrix) for count in row[before + 1 :])
    milder = sum(count for before, row in enumerate(matrix) for count in row[:before])
    found = [
        Flip(category, role, LEVELS[before], LEVELS[after], Share.make(count, spoken[role]), tuple(ids))
        for query in (_verdicts(), _categories())
        for category, role, before, after, count, ids in database.execute(query).fetchall()
    ]
    verdicts = Share.make(stricter + milder, sum(map(sum, matrix)))
    return Flips(verdicts, stricter, milder, tuple(map(tuple, matrix)), tuple(found))


def _verdicts() -> str:
    return _counted(
        "SELECT NULL::VARCHAR AS category, role, level AS before, other_level AS after, "
        "id, turn, filename, file_row_number FROM turns WHERE level <> other_level"
    )


def _categories() -> str:
    """The strictest violation of each category on either side, of the turns with any; 0 where there is none."""
    sides = " UNION ALL ".join(
        f"SELECT filename, file_row_number, role, id, turn, {other} AS other, unnest({violations}, max_depth := 2) "
        f"FROM turns WHERE len({violations}) > 0 AND violations IS DISTINCT FROM compare.violations"
        for other, violations in (("false", "violations"), ("true", "compare.violations"))
    )
    found = level("action")
    return _counted(
        "SELECT category, any_value(role) AS role, any_value(id) AS id, any_value(turn) AS turn, "
        f"filename, file_row_number, coalesce(max({found}) FILTER (NOT other), 0) AS before, "
        f"coalesce(max({found}) FILTER (other), 0) AS after "
        f"FROM ({sides}) GROUP BY category, filename, file_row_number HAVING before <> after"
    )


def _counted(differing: str) -> str:
    return (
        "SELECT category, role::VARCHAR, before, after, count(*), "
        f"min_by(id || '/' || turn, {{f: filename, r: file_row_number}}, {_IDS}) "
        f"FROM ({differing}) GROUP BY ALL ORDER BY 5 DESC, 1, 2, 3, 4"
    )
