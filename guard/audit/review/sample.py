"""A sample of an audit's turns for people to judge: drawn so that few labels tell precision and recall.

Every role has half of its cases among the turns that are not allowed, which tell precision, and half among the allowed,
which tell recall. Within a half the strata get cases in proportion to their size times the standard deviation of their
labels (Neyman's allocation, after which estimates vary least), and scores, which are calibrated, say what that is.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.output import part_files, read_facts
from guard.audit.records import Place
from guard.audit.review.strata import BY, Choice, Facts, Stratum, view
from guard.errors import ConfigError, InputError
from guard.policy.messages import one_of
from guard.types import Action, Role, Turn

Texts = Callable[[Collection[Place]], Mapping[Place, Sequence[Turn]]]
"""The turns of the conversations that begin at these places; a place that is not found is left out."""

_LEAST = 2  # cases of a stratum; one would not tell how far its labels differ


@dataclass(frozen=True, slots=True)
class Case:
    """A turn that was drawn, one of `size` in its stratum, and what was decided about it.

    `action` is that of the strictest violation, also of a policy in shadow. `turns` are the conversation up to and with
    it; None without texts.
    """

    number: int
    place: Place
    id: str
    turn: int
    role: Role
    language: str
    policy: str
    stratum: str
    size: int
    action: Action
    violated: tuple[str, ...]
    unsafe: float
    hazards: Mapping[str, float]
    turns: tuple[Turn, ...] | None = None

    @property
    def domain(self) -> tuple[Role, bool]:
        """What precision or recall is told of."""
        return self.role, self.action is Action.ALLOW


@dataclass(frozen=True, slots=True)
class Sample:
    """Cases in the order of the sheet. `left_out` are turns that no model scored, or that no threshold is for.

    It `is_whole` where it was drawn from all other turns, and not from those of one action or category.
    """

    id: str
    cases: tuple[Case, ...]
    turns: int
    left_out: int
    is_whole: bool = True

    @property
    def weights(self) -> Mapping[str, float]:
        """How many turns of a stratum one that was drawn stands for."""
        drawn = Counter(case.stratum for case in self.cases)
        return {case.stratum: case.size / drawn[case.stratum] for case in self.cases}


def draw(out: Path, choice: Choice, texts: Texts | None = None) -> Sample:
    """The same for the same audit and choice. Raises ConfigError and InputError."""
    facts = read_facts(out)
    _check(choice, facts)
    with _turns(out, facts, choice) as database:
        strata, left_out = _strata(database)
        if not strata:
            raise ConfigError(f"{out}: no turn is judged" + " as asked for" * bool(choice.action or choice.category))
        sizes = allocate(strata, choice.size)
        rows = _drawn(database, strata, sizes)
    Random(choice.seed).shuffle(rows)
    found = texts({Place(row["input"], row["row"]) for row in rows}) if texts else {}
    cases = tuple(_case(number, row, found if texts else None) for number, row in enumerate(rows, 1))
    told = json.dumps([choice.seed, *((case.place.input, case.place.row, case.turn) for case in cases)])
    is_whole = choice.action is None and not choice.category
    return Sample(sha256(told.encode()).hexdigest()[:8], cases, sum(one.size for one in strata), left_out, is_whole)


def allocate(strata: Sequence[Stratum], size: int) -> list[int]:
    """How many cases each gets: two at least where it has them, and no more than it has.

    One by one, to where it lowers the variance most (Wright, 2012: Neyman's allocation in whole numbers).
    """
    if size < (least := sum(min(_LEAST, one.size) for one in strata)):
        raise InputError("size", f"expected at least {least}, as there are {len(strata)} strata, found {size}")
    doubt = defaultdict[tuple[str, bool], float](float)
    for one in strata:
        doubt[one.role, one.is_allowed] += one.doubt
    share = [one.doubt / doubt[one.role, one.is_allowed] for one in strata]
    sizes = [min(_LEAST, one.size) for one in strata]
    queue = [(-share[place] / sqrt(n * (n + 1)), place) for place, n in enumerate(sizes)]
    heapq.heapify(queue)
    left = size - sum(sizes)
    while queue and left:
        _, place = heapq.heappop(queue)
        if sizes[place] < strata[place].size:
            sizes[place] += 1
            left -= 1
            heapq.heappush(queue, (-share[place] / sqrt(sizes[place] * (sizes[place] + 1)), place))
    return sizes


def texts_of(out: Path) -> Texts:
    """The texts that an audit wrote down, where it was asked to."""

    def read(places: Collection[Place]) -> Mapping[Place, Sequence[Turn]]:
        wanted = [{"input": place.input, "row": place.row} for place in places]
        query = (
            "SELECT input, row, role, text FROM read_parquet($parts) JOIN (SELECT unnest($wanted, recursive := true)) "
            "USING (input, row) ORDER BY input, row, turn"
        )
        found = defaultdict[Place, list[Turn]](list)
        with duckdb.connect() as database:
            rows = database.execute(query, {"parts": _parts(out), "wanted": wanted})
            while batch := rows.fetchmany(1000):
                for name, row, role, text in batch:
                    found[Place(name, row)].append(Turn(Role(role), text))
        return found

    return read


def _check(choice: Choice, facts: Facts) -> None:
    for name in choice.by:
        if name not in BY:
            raise InputError("by", one_of(list(BY), name))
    known = sorted({name for policy in facts["policies"].values() for name in policy["categories"]})
    if choice.category and choice.category not in known:
        raise InputError("category", one_of(known, choice.category))


def _parts(out: Path) -> list[str]:
    """Raises ConfigError where there are none."""
    names = list(map(str, part_files(out)))
    if not names:
        raise ConfigError(f"{out}: nothing is judged yet")
    return names


@contextmanager
def _turns(out: Path, facts: Facts, choice: Choice) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the view of guard.audit.review.strata."""
    parts = _parts(out)
    with duckdb.connect() as database:
        try:
            hazards = pq.read_schema(parts[0]).field("scores").type.field("hazards").type
            database.execute(view(parts, facts, {field.name for field in hazards}, choice))
            yield database
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            raise ConfigError(f"{out}: a part cannot be read: {type(error).__name__}") from None


def _strata(database: duckdb.DuckDBPyConnection) -> tuple[list[Stratum], int]:
    """All of them in order, and how many turns are in none."""
    counted = database.execute(
        "SELECT stratum, any_value(role), bool_and(said = 'allow'), count(*), avg(scores.unsafe) FROM turns "
        "GROUP BY stratum ORDER BY stratum"
    ).fetchall()
    return [Stratum(*row) for row in counted if row[0] is not None], sum(row[3] for row in counted if row[0] is None)


def _drawn(
    database: duckdb.DuckDBPyConnection, strata: Sequence[Stratum], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Of each stratum the turns with the lowest numbers."""
    lowest = dict(
        database.execute(
            f"SELECT stratum, min(draw, {max(sizes)}) FROM turns WHERE stratum IS NOT NULL GROUP BY stratum"
        ).fetchall()
    )
    last = {one.name: lowest[one.name][size - 1] for one, size in zip(strata, sizes, strict=True)}
    rows = database.execute(
        "SELECT id, turn, input, row, role, language, policy.name AS policy, turns.stratum, said AS action, "
        "[v.category FOR v IN violations IF v.category <> ''] AS violated, scores.unsafe, scores.hazards FROM turns "
        "JOIN (SELECT unnest($strata) AS stratum, unnest($last) AS last) AS limits "
        "ON turns.stratum = limits.stratum AND draw <= last ORDER BY draw",
        {"strata": list(last), "last": list(last.values())},
    )
    names = [column[0] for column in rows.description or ()]
    stratum_size = {one.name: one.size for one in strata}
    return [
        found | {"size": stratum_size[found["stratum"]]}
        for found in (dict(zip(names, row, strict=True)) for row in rows.fetchall())
    ]


def _case(number: int, row: Mapping[str, Any], texts: Mapping[Place, Sequence[Turn]] | None) -> Case:
    place, turn = Place(row["input"], row["row"]), row["turn"]
    said = None if texts is None else tuple(texts.get(place, ())[: turn + 1])
    if said is not None and len(said) <= turn:
        raise ConfigError(f"{place.input}:{place.row}: the conversation is not there any more")
    return Case(
        number,
        place,
        row["id"],
        turn,
        Role(row["role"]),
        row["language"] or "",
        row["policy"] or "",
        row["stratum"],
        row["size"],
        Action[row["action"].upper()],
        tuple(row["violated"]),
        row["unsafe"],
        row["hazards"],
        said,
    )
