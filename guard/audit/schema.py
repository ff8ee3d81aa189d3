"""The rows that an audit writes, one for each judged turn: those of a decision log, and where they come from."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from guard.audit.records import Record
from guard.types import Revision, Verdict, Violation

_WORD = pa.dictionary(pa.int32(), pa.string())
_REVISION = pa.struct([("name", pa.string()), ("revision", pa.string())])
_VIOLATION = pa.struct(
    [
        ("category", pa.string()),
        ("rule", pa.string()),
        ("action", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
    ]
)


def schema(scores: Sequence[str], *, text: bool, compared: bool) -> pa.Schema:
    """`scores` are the names of the hazards and heads. Where the model could not answer, the struct of scores is null.

    `id` is that of the conversation, `turn` counts from 0 in it; `input` and `row` are its first row's. `characters`
    is the length of the text. `hits` are rules of the policy that match, also those not for this role. `metadata` is
    what policies ask for. `language` and `source` are null where the input does not tell. `compare` is what the other
    policy says.
    """
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        ("turn", pa.int32()),
        ("input", _WORD),
        ("row", pa.int64()),
        ("role", _WORD),
        ("time", pa.timestamp("us", "UTC")),
        ("language", _WORD),
        ("source", _WORD),
        ("metadata", pa.map_(pa.string(), pa.string())),
        ("characters", pa.int32()),
        *([("text", pa.string())] if text else []),
        (
            "scores",
            pa.struct([("unsafe", pa.float32()), ("hazards", pa.struct([(name, pa.float32()) for name in scores]))]),
        ),
        ("hits", pa.list_(pa.string())),
        ("action", _WORD),
        ("violations", pa.list_(_VIOLATION)),
        ("coverage", pa.struct([("seen", pa.int32()), ("total", pa.int32())])),
        ("degraded", pa.bool_()),
        ("shadow", pa.bool_()),
        ("policy", _REVISION),
        ("model", _REVISION),
        *(
            [
                (
                    "compare",
                    pa.struct([("policy", _REVISION), ("action", pa.string()), ("violations", pa.list_(_VIOLATION))]),
                )
            ]
            if compared
            else []
        ),
    ]
    return pa.schema(fields)


class Row(NamedTuple):
    """A judged turn. `metadata` is what policies ask for; `compare` is what another policy says of the same turn."""

    record: Record
    verdict: Verdict
    policy: Revision
    model: Revision
    metadata: Mapping[str, str]
    compare: tuple[Revision, Verdict] | None = None


def table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """The rows in columns."""
    columns = [pa.array([_VALUES[field.name](row) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _revision(revision: Revision) -> dict[str, str]:
    return {"name": revision.name, "revision": revision.revision}


def _violation(violation: Violation) -> dict[str, Any]:
    return {
        "category": violation.category,
        "rule": violation.rule,
        "action": violation.action.name.lower(),
        "score": violation.score,
        "threshold": violation.threshold,
    }


def _said(verdict: Verdict) -> dict[str, Any]:
    return {
        "action": verdict.action.name.lower(),
        "violations": [_violation(violation) for violation in verdict.violations],
    }


def _scores(verdict: Verdict) -> dict[str, Any] | None:
    scores = verdict.scores
    return {"unsafe": scores.unsafe, "hazards": scores.hazards} if scores else None


def _compared(row: Row) -> dict[str, Any] | None:
    if row.compare is None:
        return None
    policy, verdict = row.compare
    return {"policy": _revision(policy), **_said(verdict)}


_VALUES: Mapping[str, Callable[[Row], Any]] = MappingProxyType(
    {
        "id": lambda row: row.record.id,
        "turn": lambda row: row.verdict.turn,
        "input": lambda row: row.record.place.input,
        "row": lambda row: row.record.place.row,
        "role": lambda row: row.record.turns[row.verdict.turn].role.value,
        "time": lambda row: row.record.time,
        "language": lambda row: row.record.language or None,
        "source": lambda row: row.record.source or None,
        "metadata": lambda row: sorted(row.metadata.items()),
        "characters": lambda row: len(row.record.turns[row.verdict.turn].text),
        "text": lambda row: row.record.turns[row.verdict.turn].text,
        "scores": lambda row: _scores(row.verdict),
        "hits": lambda row: sorted(row.verdict.hits),
        "action": lambda row: row.verdict.action.name.lower(),
        "violations": lambda row: _said(row.verdict)["violations"],
        "coverage": lambda row: {"seen": row.verdict.coverage.seen, "total": row.verdict.coverage.total},
        "degraded": lambda row: row.verdict.degraded,
        "shadow": lambda row: row.verdict.shadow,
        "policy": lambda row: _revision(row.policy),
        "model": lambda row: _revision(row.model),
        "compare": _compared,
    }
)
