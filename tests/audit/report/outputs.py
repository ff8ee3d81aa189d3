"""Folders as an audit leaves them, with the turns that a test gives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.schema import schema

HAZARDS = ("S1", "S10", "S11")
MODEL = {"name": "stand-in", "revision": "m1"}


def category(hazards: Sequence[str], user: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A category as audit.json tells it, which judges users alone."""
    told = {"title": "", "hazards": list(hazards), "scoring": "max", "weights": [], "thresholds": {"user": dict(user)}}
    return told | more


def policy(revision: str, categories: Mapping[str, Any], *, shadow: bool = False) -> dict[str, Any]:
    return {"revision": revision, "description": "", "shadow": shadow, "categories": dict(categories)}


HATE = category(["S10"], {"flag": 0.5, "block": 0.8})
PLAIN = policy("r1", {"hate": HATE})


def violation(
    category: str = "hate", action: str = "flag", score: float = 0.6, threshold: float = 0.5
) -> dict[str, Any]:
    return {"category": category, "rule": "", "action": action, "score": score, "threshold": threshold}


def rule(name: str, action: str = "block", category: str = "") -> dict[str, Any]:
    return {"category": category, "rule": name, "action": action, "score": 0.0, "threshold": 0.0}


@dataclass(frozen=True)
class Turn:
    """A row of a part; without `scores` the model could not answer. `compare` is an action and its violations."""

    conversation: int = 1
    turn: int = 0
    id: str = ""
    role: str = "user"
    time: datetime | None = None
    language: str | None = None
    source: str | None = None
    text: str = "some words"
    scores: Mapping[str, float] | None = field(default_factory=dict)
    action: str = "allow"
    violations: Sequence[Mapping[str, Any]] = ()
    coverage: tuple[int, int] = (5, 5)
    shadow: bool = False
    policy: str = "plain"
    compare: tuple[str, Sequence[Mapping[str, Any]]] = ("allow", ())

    def row(self) -> dict[str, Any]:
        scores = None
        if self.scores is not None:
            hazards = {code: self.scores.get(code, 0.0) for code in HAZARDS}
            scores = {"unsafe": self.scores.get("unsafe", 0.0), "hazards": hazards}
        action, violations = self.compare
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("conversation", "scores")},
            "id": self.id or f"c{self.conversation}",
            "input": "logs.jsonl",
            "row": self.conversation,
            "metadata": [],
            "characters": len(self.text),
            "scores": scores,
            "hits": [],
            "coverage": dict(zip(("seen", "total"), self.coverage, strict=True)),
            "degraded": self.scores is None,
            "policy": {"name": self.policy, "revision": "r1"},
            "model": MODEL,
            "compare": {"policy": {"name": "other", "revision": "r2"}, "action": action, "violations": violations},
        }


def audited(
    out: Path,
    *parts: Sequence[Turn],
    rejects: Sequence[tuple[str, int, str]] = (),
    policies: Mapping[str, Any] | None = None,
    compare: Mapping[str, Any] | None = None,
    text: bool = False,
    complete: bool = True,
) -> Path:
    """The folder of an audit that wrote these parts."""
    (out / "parts").mkdir(parents=True)
    columns = schema(HAZARDS, text=text, compared=compare is not None)
    lines = [_part(out, place, turns, columns) for place, turns in enumerate(parts)]
    if rejects:
        said = [{"input": input, "row": row, "reason": reason} for input, row, reason in rejects]
        (out / "rejects.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
        lines.append(_line(None, rejected=len(rejects)))
    (out / "manifest.jsonl").write_text("".join([*lines, '{"complete": true}\n' if complete else ""]))
    facts = {
        "format": 1,
        "version": "0.1.0",
        "inputs": [{"url": "logs.jsonl", "size": 100, "modified": "2026-01-01T00:00:00Z"}],
        "server": None,
        "model": {**MODEL, "dtype": "int8"},
        "policies": policies or {"plain": PLAIN},
        "policy": "plain",
        "compare": compare,
        "with_text": text,
    }
    (out / "audit.json").write_text(json.dumps(facts))
    return out


def _part(out: Path, place: int, turns: Sequence[Turn], columns: pa.Schema) -> str:
    name = f"parts/part-{place:06}.parquet"
    rows = [turn.row() for turn in turns]
    arrays = [pa.array([row[field.name] for row in rows], field.type) for field in columns]
    pq.write_table(pa.Table.from_arrays(arrays, schema=columns), out / name)
    return _line(
        name, conversations=len({turn.conversation for turn in turns}), turns=len(turns), tokens=10, seconds=2.0
    )


def _line(part: str | None, **counted: float) -> str:
    none = {"conversations": 0, "turns": 0, "refused": 0, "rejected": 0, "incomplete": 0, "tokens": 0, "seconds": 0.0}
    return json.dumps({"part": part, **none, **counted, "rejects_bytes": 0, "end": {"input": 0, "rows": 0}}) + "\n"
