"""Folders of audits as `guard audit` writes them, small and made up, for tests of what people review."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.schema import schema

HAZARDS = ("S1", "S10", "X1", "rivals")
CATEGORIES: Mapping[str, Any] = {
    "hate": {
        "hazards": ["S10", "X1"],
        "scoring": "max",
        "weights": [],
        "thresholds": {"user": {"flag": 0.4, "block": 0.8}, "agent": {"block": 0.5}},
    },
    "violence": {"hazards": ["S1"], "scoring": "max", "weights": [], "thresholds": {"user": {"block": 0.6}}},
    "rivals": {"hazards": ["rivals"], "scoring": "max", "weights": [], "thresholds": {"user": {"flag": 0.5}}},
}


class Judged(NamedTuple):
    """A turn; every one that follows one of the same `id` is of its conversation. `row` is its number unless told."""

    id: str
    role: str = "user"
    text: str = "text"
    scores: Mapping[str, float] | None = MappingProxyType({})
    language: str = "en"
    time: datetime = datetime(2026, 3, 1, tzinfo=UTC)
    rule: str = ""
    input: str = "logs.jsonl"
    row: int = 0


def write_audit(
    out: Path,
    turns: Sequence[Judged],
    *,
    text: bool = False,
    shadow: bool = False,
    part: int = 1000,
    categories: Mapping[str, Any] = CATEGORIES,
) -> Path:
    """The folder of an audit of these turns under the policy `shop`, so many of them in each part."""
    (out / "parts").mkdir(parents=True)
    policy = {"revision": "5" * 12, "description": "For tests.", "shadow": shadow, "categories": categories}
    facts = {"format": 1, "version": "0.1.0", "policies": {"shop": policy}, "policy": "shop", "with_text": text}
    (out / "audit.json").write_text(json.dumps(facts))
    rows = _rows(turns, categories, shadow)
    names = [f"parts/part-{place:06}.parquet" for place in range(-(-len(rows) // part))]
    for place, name in enumerate(names):
        some = [row if text else row | {"text": None} for row in rows[place * part : (place + 1) * part]]
        table = pa.Table.from_pylist(some, schema(HAZARDS, text=text, compared=False))
        pq.write_table(table, out / name)
    lines = [json.dumps({"part": name}) for name in names]
    (out / "manifest.jsonl").write_text("\n".join([*lines, '{"complete": true}', '{"part": "parts/torn']))
    return out


def _rows(turns: Sequence[Judged], categories: Mapping[str, Any], shadow: bool) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for number, turn in enumerate(turns, 1):
        goes_on = bool(rows) and rows[-1]["id"] == turn.id
        violations = _violations(turn, categories)
        scores = None if turn.scores is None else dict.fromkeys(("unsafe", *HAZARDS), 0.0) | dict(turn.scores)
        rows.append(
            {
                "id": turn.id,
                "turn": rows[-1]["turn"] + 1 if goes_on else 0,
                "input": turn.input,
                "row": rows[-1]["row"] if goes_on else turn.row or number,
                "role": turn.role,
                "time": turn.time,
                "language": turn.language,
                "source": "",
                "text": turn.text,
                "characters": len(turn.text),
                "scores": scores and {"unsafe": scores.pop("unsafe"), "hazards": scores},
                "hits": [turn.rule] * bool(turn.rule),
                "action": "allow" if shadow or not violations else violations[0]["action"],
                "violations": violations,
                "degraded": turn.scores is None,
                "shadow": shadow,
                "policy": {"name": "shop", "revision": "5" * 12},
                "model": {"name": "m", "revision": "7" * 12},
            }
        )
    return rows


def _violations(turn: Judged, categories: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = list[dict[str, Any]]()
    if turn.rule:
        found.append({"category": "", "rule": turn.rule, "action": "block", "score": 0.0, "threshold": 0.0})
    for name, category in categories.items():
        score = max((turn.scores or {}).get(code, 0.0) for code in category["hazards"])
        steps = sorted(category["thresholds"].get(turn.role, {}).items(), key=lambda step: -step[1])
        if step := next((step for step in steps if score >= step[1]), None):
            found.append({"category": name, "rule": "", "action": step[0], "score": score, "threshold": step[1]})
    return sorted(found, key=lambda one: ["block", "redirect", "flag"].index(one["action"]))
