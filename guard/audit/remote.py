"""Judges through a running server, on its bulk lane: who waits online there goes first."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from guard.audit.judge import Judged, Source
from guard.audit.records import Position, Record, Reject, Window
from guard.audit.schema import Row, schema, table
from guard.audit.stop import Stop
from guard.client import SyncClient, conversation_request
from guard.errors import Unanswered
from guard.policy.decide import NO_METADATA
from guard.types import Action, Coverage, Revision, Scores, Verdict, Violation
from guard.v1 import moderation_pb2 as pb

_LARGEST = 4 * 2**20  # bytes of a message, as servers take them unless they are told otherwise
_WINDOW = 32_768  # characters; whatever it is, the server keeps its batches full
_WRONG = {3, 5}  # INVALID_ARGUMENT and NOT_FOUND: another try would not help


@dataclass(slots=True)
class _Asked:
    """A window with the answers to its records that are there, by their place in it."""

    window: Window
    records: int
    answers: dict[int, pb.CheckConversationResponse | Reject] = field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        return len(self.answers) == self.records


class Remote:
    """Judges by the model and the policies of a server; what stops it is raised as an error of guard.client.

    `in_force` is what these are, as guard.audit.recipe tells it.
    Rows tell no metadata, and of the rules that match those alone that are for the turn's role.
    """

    def __init__(self, client: SyncClient, policy: str = "", *, text: bool = False) -> None:
        """`policy` judges in place of those that rows name."""
        model = client.model()
        named = [client.policy(policy)] if policy else client.policies().policies
        hazards = [hazard.code for hazard in model.hazards]
        hazards += [code for one in named for category in one.categories for code in category.hazards]
        self.schema: pa.Schema = schema(tuple(dict.fromkeys(hazards)), text=text, compared=False)
        self.in_force = {
            "model": {"name": model.name, "revision": model.revision, "dtype": model.dtype},
            "policies": {one.name: _policy_facts(one) for one in named},
            "compare": None,
        }
        self._client = client
        self._policy = policy

    def judged(self, source: Source, start: Position, stop: Stop) -> Iterator[Judged]:
        windows = source.windows(start, _WINDOW)
        asked: dict[int, _Asked] = {}  # by their numbers, in that order

        def requests() -> Iterator[pb.CheckManyRequest]:
            for number, window in enumerate(windows):
                records = [(place, item) for place, item in enumerate(window.items) if isinstance(item, Record)]
                asked[number] = one = _Asked(window, len(records))
                for place, record in records:
                    request = self._request(record)
                    if request.ByteSize() <= _LARGEST:
                        yield pb.CheckManyRequest(id=f"{number}/{place}", conversation=request)
                    else:
                        one.answers[place] = Reject(record.place, f"is larger than a server takes, {_LARGEST} bytes")

        for answer in self._client.check_many(requests()):
            stop.check()
            number, place = map(int, answer.id.split("/"))
            one = asked[number]
            one.answers[place] = _answered(one.window.items[place], answer)
            while asked and asked[first := next(iter(asked))].is_answered:
                yield self._tell(asked.pop(first))
        yield from map(self._tell, asked.values())  # in which nothing was left to ask

    def _request(self, record: Record) -> pb.CheckConversationRequest:
        return conversation_request(
            [(turn.role.value, turn.text) for turn in record.turns],
            policy=self._policy or record.policy,
            conversation_id=record.id,
            metadata=record.metadata,
        )

    def _tell(self, asked: _Asked) -> Judged:
        rows: list[Row] = []
        rejects: list[Reject] = []
        tokens = 0
        for place, item in enumerate(asked.window.items):
            answer = item if isinstance(item, Reject) else asked.answers[place]
            if isinstance(answer, Reject):
                rejects.append(answer)
            elif isinstance(item, Record):
                rows += _rows(item, answer)
                tokens += max((verdict.coverage.seen for verdict in answer.verdicts), default=0)
        return Judged(
            rows=table(rows, self.schema),
            rejects=tuple(rejects),
            conversations=len(asked.window.items) - len(rejects),
            refused=sum(row.verdict.action is not Action.ALLOW for row in rows),
            tokens=tokens,
            end=asked.window.end,
            read=asked.window.read,
        )


def _answered(item: Record | Reject, answer: pb.CheckManyResponse) -> pb.CheckConversationResponse | Reject:
    if not answer.HasField("error"):
        return answer.conversation
    if answer.error.code not in _WRONG:
        raise Unanswered(answer.error.message)
    return Reject(item.place, answer.error.message)


def _rows(record: Record, answer: pb.CheckConversationResponse) -> Iterator[Row]:
    provenance = answer.provenance
    policy = Revision(provenance.policy, provenance.policy_revision)
    model = Revision(provenance.model, provenance.model_revision)
    for verdict in answer.verdicts:
        yield Row(record, _verdict(verdict), policy, model, NO_METADATA)


def _verdict(verdict: pb.Verdict) -> Verdict:
    scores = verdict.scores if verdict.HasField("scores") else None
    return Verdict(
        turn=verdict.turn,
        action=_action(verdict.action),
        violations=tuple(
            Violation(each.category, _action(each.action), each.score, _decimal(each.threshold), each.rule)
            for each in verdict.violations
        ),
        scores=scores and Scores(scores.unsafe, dict(scores.hazards)),
        coverage=Coverage(verdict.coverage.seen, verdict.coverage.total),
        degraded=verdict.degraded,
        shadow=verdict.shadow,
        hits=frozenset(each.rule for each in verdict.violations if each.rule),
    )


def _decimal(threshold: float) -> float:
    """As it was written, 0.55, of what the wire has in float32: 0.550000012."""
    return float(str(np.float32(threshold)))


def _action(action: pb.Action.ValueType) -> Action:
    return Action[pb.Action.Name(action).removeprefix("ACTION_")]


def _policy_facts(policy: pb.Policy) -> Mapping[str, Any]:
    return {
        "revision": policy.revision,
        "description": policy.description,
        "shadow": policy.shadow,
        "categories": {category.name: _category_facts(category) for category in policy.categories},
    }


def _category_facts(category: pb.Category) -> Mapping[str, Any]:
    thresholds: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for step in category.thresholds:
        thresholds[pb.Role.Name(step.role).removeprefix("ROLE_").lower()][_action(step.action).name.lower()] = (
            step.score
        )
    return {
        "title": category.title,
        "hazards": list(category.hazards),
        "scoring": "max" if category.scoring == "unsafe" else category.scoring,
        "weights": list(category.weights),
        "thresholds": dict(thresholds),
    }
