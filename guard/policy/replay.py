"""Logged verdicts, judged again without a model: by the policy that was in force, or by another one."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from guard.errors import ConfigError
from guard.policy.columns import ROLES, UNSAFE, Bools, Columns, Found, Ground, Judged, Rows, judge
from guard.policy.compile import Policy
from guard.types import Action

if TYPE_CHECKING:  # the extra `audit`
    from duckdb import DuckDBPyConnection

_SHOWN = 5  # ids for each kind of change
_VERDICT = "verdict"
_ACTIONS = [action.name.lower() for action in Action]
_COLUMNS = {
    "id": "VARCHAR",
    "turn": "INTEGER",
    "role": "VARCHAR",
    "hits": "VARCHAR[]",
    "metadata": "MAP(VARCHAR, VARCHAR)",
    "action": "VARCHAR",
    "violations": "STRUCT(category VARCHAR, rule VARCHAR, action VARCHAR, score DOUBLE, threshold DOUBLE)[]",
    "policy": "STRUCT(name VARCHAR, revision VARCHAR)",
}


class Change(NamedTuple):
    """Of the verdicts on turns of a role: `about` is "verdict", a category or "rule NAME"; actions are names."""

    about: str
    role: str
    before: str
    after: str


@dataclass(slots=True)
class Changed:
    """How often a change is seen, and some of the verdicts, as ID/TURN."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, batch: "_Logged", rows: Rows) -> None:
        self.count += len(rows)
        self.ids += [f"{batch.ids[row]}/{batch.turns[row]}" for row in rows[: _SHOWN - len(self.ids)]]


@dataclass(slots=True)
class Report:
    """What was found in a log: verdicts by role, and their changes.

    `same` verdicts were logged under the very revision that judged them again; `differing` are those of them that did
    not come out as they were logged. `notes` say what the log cannot tell.
    """

    turns: Counter[str] = field(default_factory=Counter)
    changes: defaultdict[Change, Changed] = field(default_factory=lambda: defaultdict(Changed))
    same: int = 0
    differing: Changed = field(default_factory=Changed)
    notes: list[str] = field(default_factory=list)

    def by_size(self) -> list[tuple[Change, Changed, float]]:
        """The changes and their share of the role's verdicts: of verdicts first, then the largest of each subject."""
        ordered = sorted(self.changes.items(), key=lambda item: (item[0].about != _VERDICT, -item[1].count, item[0]))
        return [(change, found, found.count / self.turns[change.role]) for change, found in ordered]


def replay(policy: Policy, logs: Sequence[Path], only: str = "", done: Callable[[], None] = lambda: None) -> Report:
    """What `policy` says about logged verdicts (those of the policy named `only`), against what was logged.

    `done` is called after each file. Raises ConfigError where a log cannot be read or has not the scores it takes.
    """
    return _report(None, policy, logs, only, done)


def diff(
    old: Policy, new: Policy, logs: Sequence[Path], only: str = "", done: Callable[[], None] = lambda: None
) -> Report:
    """What `new` says about logged turns, against what `old` says; otherwise as `replay`."""
    return _report(old, new, logs, only, done)


@dataclass(frozen=True, slots=True, eq=False)
class _Logged:
    """The verdicts of a file, and the turns they are about; arrays are [verdicts].

    `same` is where the revision is. That and violations are told only where they were asked for.
    """

    ids: Any
    turns: Any
    same: Bools
    columns: Columns
    verdicts: Judged


def _report(old: Policy | None, new: Policy, logs: Sequence[Path], only: str, done: Callable[[], None]) -> Report:
    policies = [new] if old is None else [old, new]
    report = Report()
    seen_pairs: set[tuple[str, str]] = set()
    for path in logs:
        batch = _read(path, policies, only, verdicts=old is None)
        with ThreadPoolExecutor(1) as thread:  # numpy lets the other one compute
            judging = thread.submit(judge, new, batch.columns)
            before = judge(old, batch.columns) if old else batch.verdicts
            after = judging.result()
        _compare(report, batch, before, after)
        if old is None:
            report.same += int(batch.same.sum())
            report.differing.add(batch, np.flatnonzero(batch.same & _differ(before, after)))
        seen_pairs |= {pair for pair, held in batch.columns.metadata.items() if held.any()}
        done()
    report.notes += _notes(old, new, seen_pairs)
    return report


def _compare(report: Report, batch: _Logged, before: Judged, after: Judged) -> None:
    pairs = [(_VERDICT, before.action, after.action)]
    pairs += [
        (_about(ground), *(_spread(one.rows, one.action, len(before.action)) for one in found))
        for ground, *found in _both(before, after)
    ]
    spoken = np.bincount(batch.columns.roles, minlength=len(ROLES))
    report.turns += Counter({role.value: int(count) for role, count in zip(ROLES, spoken, strict=True)})
    shape = len(ROLES), len(Action), len(Action)
    for about, was, becomes in pairs:
        differing = np.flatnonzero(was != becomes)
        kinds = np.ravel_multi_index((batch.columns.roles[differing], was[differing], becomes[differing]), shape)
        for kind in np.flatnonzero(np.bincount(kinds)):
            role, old, new = np.unravel_index(kind, shape)
            change = Change(about, ROLES[role].value, _ACTIONS[old], _ACTIONS[new])
            report.changes[change].add(batch, differing[kinds == kind])


def _about(ground: Ground) -> str:
    category, rule = ground
    return f"rule {rule}" if rule else category


def _both(before: Judged, after: Judged) -> Iterator[tuple[Ground, Found, Found]]:
    nothing = Found.nothing()
    for ground in sorted(before.found.keys() | after.found.keys()):
        yield ground, before.found.get(ground, nothing), after.found.get(ground, nothing)


def _spread(rows: Rows, values: Any, count: int) -> Any:
    """A column of them, with 0 elsewhere."""
    column = np.zeros(count, values.dtype)
    column[rows] = values
    return column


def _differ(before: Judged, after: Judged) -> Bools:
    """Where the action or any violation is another one, in whatever it says."""
    differ: Bools = before.action != after.action
    count = len(differ)
    for _, was, becomes in _both(before, after):
        for old, new in ((was.action, becomes.action), (was.score, becomes.score), (was.threshold, becomes.threshold)):
            differ |= _spread(was.rows, old, count) != _spread(becomes.rows, new, count)
    return differ


def _notes(old: Policy | None, new: Policy, seen: set[tuple[str, str]]) -> Iterator[str]:
    """What a log holds no trace of, since no text is in it and only such metadata as a policy in force asked for."""
    if old is not None:
        texts = {rule.name: (rule.terms, rule.pattern, rule.exceptions) for rule in old.rules}
        for rule in new.rules:
            if texts.get(rule.name) != (rule.terms, rule.pattern, rule.exceptions):
                yield f"rule {rule.name} looks for something else than before: its matches are those that were logged"
    asked = {pair for policy in (old, new) if policy for overlay in policy.overlays for pair in overlay.when}
    for key, value in sorted(asked - seen):
        yield f"no logged request has {key}: {value}; of metadata a log holds what policies in force ask for"


def _read(path: Path, policies: Sequence[Policy], only: str, *, verdicts: bool) -> _Logged:
    """The verdicts of a file with all that the policies look at; the last of them is the one that judges again.

    Logged revisions and violations are most of the work, and left out unless `verdicts` are asked for.
    """
    try:
        import duckdb
    except ModuleNotFoundError:
        raise ConfigError("reading decision logs needs the extra, pip install 'guard-moderation[audit]'") from None
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    with duckdb.connect() as database:
        try:
            return _query(database, path, policies, only, verdicts)
        except duckdb.Error as error:
            line = re.search(r"\bline (\d+)", str(error))
            about = f", at about line {line[1]}" if line else ""
            raise ConfigError(f"{path}: is no decision log{about}") from None


def _query(
    database: "DuckDBPyConnection", path: Path, policies: Sequence[Policy], only: str, verdicts: bool
) -> _Logged:
    heads = sorted({code for policy in policies for category in policy.categories for code in category.hazards})
    rules = sorted({rule.name for policy in policies for rule in policy.rules})
    pairs = sorted({pair for policy in policies for overlay in policy.overlays for pair in overlay.when})
    hazards = ", ".join(f'"{code}" FLOAT' for code in heads) or "none FLOAT"
    columns = {**_COLUMNS, "scores": f"STRUCT(unsafe FLOAT, hazards STRUCT({hazards}))"}
    selected = [
        "id",
        "turn",
        f"list_position({_list(ROLES)}, role) - 1 AS role",
        f"list_position({_list(_ACTIONS)}, action) - 1 AS action",
        *([f"coalesce(policy.revision = {_quoted(policies[-1].revision)}, false) AS same"] if verdicts else []),
        *(["violations"] if verdicts else []),
        "scores IS NOT NULL AS scored",
        "scores.unsafe AS s",
        *(f'scores.hazards."{code}" AS s{place}' for place, code in enumerate(heads)),
        *(f"coalesce(list_contains(hits, {_quoted(name)}), false) AS r{place}" for place, name in enumerate(rules)),
        *(
            f"coalesce(metadata[{_quoted(key)}] = {_quoted(value)}, false) AS m{place}"
            for place, (key, value) in enumerate(pairs)
        ),
    ]
    given: dict[str, Any] = {"path": str(path)}
    log = "read_parquet($path)"
    if path.suffix != ".parquet":  # which an audit writes
        log = "read_json($path, columns = $columns, format = 'newline_delimited')"
        given["columns"] = columns
    query = f"SELECT {', '.join(selected)} FROM {log}" + f" WHERE policy.name = {_quoted(only)}" * bool(only)
    # In the order of the file, which duckdb keeps unless it is told not to.
    if verdicts:
        database.execute(f"CREATE TABLE log AS {query}", given)
        numbers = database.execute("SELECT * EXCLUDE (violations) FROM log").fetchnumpy()
    else:
        numbers = database.execute(query, given).fetchnumpy()
    scored = _whole(path, "verdicts", numbers["scored"])
    roles = _whole(path, "roles", numbers["role"]).astype(np.int8)
    _whole(path, "ids", numbers["id"])
    named = {UNSAFE: "s", **{code: f"s{place}" for place, code in enumerate(heads)}}
    scores = {code: _scores(path, code, numbers[column], scored) for code, column in named.items()}
    hits = {name: numbers[f"r{place}"] for place, name in enumerate(rules)}
    metadata = {pair: numbers[f"m{place}"] for place, pair in enumerate(pairs)}
    return _Logged(
        numbers["id"],
        numbers["turn"],
        numbers["same"] if verdicts else np.zeros(len(roles), np.bool_),
        Columns(roles, scored, scores, hits, metadata),
        Judged(
            _whole(path, "actions", numbers["action"]).astype(np.int8),
            _violations(database, path) if verdicts else {},
        ),
    )


def _violations(database: "DuckDBPyConnection", path: Path) -> dict[Ground, Found]:
    """The logged ones. Raises ConfigError."""
    database.execute(
        "CREATE TABLE said AS SELECT row, coalesce(v.category, '') AS category, coalesce(v.rule, '') AS rule, "
        f"list_position({_list(_ACTIONS)}, v.action) - 1 AS action, v.score, v.threshold "
        "FROM (SELECT rowid AS row, unnest(violations) AS v FROM log)"
    )
    found = {}
    for ground in database.execute("SELECT DISTINCT category, rule FROM said").fetchall():
        ones = "SELECT row, action, score, threshold FROM said WHERE category = ? AND rule = ?"
        told = database.execute(ones, ground).fetchnumpy()
        row, action, score, threshold = (_whole(path, "violations", column) for column in told.values())
        found[ground] = Found(row, action.astype(np.int8), score, threshold)
    return found


def _whole(path: Path, what: str, column: Any) -> Any:
    """A column that has no gaps. Raises ConfigError."""
    if missing := int(np.ma.getmaskarray(column).sum()):
        raise ConfigError(f"{path}: {missing} lines have no {what} that are known")
    return np.asarray(column)


def _scores(path: Path, code: str, column: Any, scored: Bools) -> Any:
    """Float32, as logged, to float64, as judged."""
    if missing := int((np.ma.getmaskarray(column) & scored).sum()):
        raise ConfigError(f"{path}: {missing} verdicts have no score of {code}")
    return np.ma.getdata(column).astype(np.float64)


def _list(words: Iterable[str]) -> str:
    return f"[{', '.join(map(_quoted, words))}]"


def _quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"
