"""Windows of conversations to rows: the verdicts of the service, at the price of as few passes as can be."""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.audit.judge import Judge, Judged, Remembered
from guard.audit.pack import pack
from guard.audit.records import Position, Record, Reject, Window
from guard.audit.stop import Stop, Stopped
from guard.engine.moderator import Moderator
from guard.errors import ModelFailed, PolicyError
from guard.policy.compile import Policy, compile_policy
from guard.policy.schema import PolicySpec
from guard.policy.store import PolicyStore
from guard.telemetry import Telemetry
from guard.types import Conversation, Decision, Role, Scores, Tokens, Turn
from tests.audit.sources import said
from tests.causal import CausalModel
from tests.stand_ins import LENIENT, POLICY

TIMED = compile_policy(
    "timed",
    PolicySpec.model_validate(
        {
            "description": "For tests.",
            "history": 1,
            "categories": {
                "unsafe": {"title": "Unsafe", "score": "unsafe", "thresholds": {"user": {"flag": 0.3}}},
                "privacy": {"title": "Privacy", "hazards": ("S7",), "thresholds": {"agent": {"block": 0.6}}},
            },
            "overlays": ({"when": {"app": "kids"}, "thresholds": {"unsafe": {"user": {"block": 0.1}}}},),
            "rules": {"bombs": {"terms": ("bomb",), "action": "block", "roles": ("user",)}},
        }
    ),
)
POLICIES = PolicyStore([POLICY, LENIENT, TIMED], "default")

texts = st.text(max_size=60) | st.sampled_from(["Hi!", "bоmb", "a bomb", "k\u200bill", "Hi! " * 30])
turns = st.lists(st.builds(Turn, st.sampled_from(Role), texts), min_size=1, max_size=6).map(tuple)
conversations = st.lists(
    st.tuples(turns, st.sampled_from(["", "timed"]), st.sampled_from(["kids", "work"])), max_size=8
)


def judge(model: CausalModel, **options: Any) -> Judge:
    return Judge(model, POLICIES, **({"max_batch_tokens": 64, "by_row": True} | options))


def judged(judge: Judge, *items: Record | Reject) -> Judged:
    return judge.tell(judge.score(judge.prepare(Window(items, Position(0, len(items)), 0.5)), Stop()))


@contextmanager
def moderator(policies: PolicyStore = POLICIES) -> Iterator[Moderator]:
    telemetry = Telemetry.start("critical")
    made = Moderator(CausalModel(), policies, telemetry, max_batch_tokens=64, max_queue_seconds=3600)
    try:
        yield made
    finally:
        made.close()


def live(said: tuple[Turn, ...], policy: str, metadata: dict[str, str]) -> Decision:
    with moderator() as made:
        return asyncio.run(made.judge(Conversation(said, None), policy=policy, metadata=metadata))


@given(conversations)
def test_an_audit_says_what_the_service_says(given: list[tuple[tuple[Turn, ...], str, str]]) -> None:
    """Of every turn, whatever stands beside its conversation: the action, the grounds, the scores and the coverage."""
    records = [
        replace(said("", row=row), turns=turns, policy=policy, metadata={"app": app, "tenant": "acme"})
        for row, (turns, policy, app) in enumerate(given, 1)
    ]
    rows = iter(judged(judge(CausalModel()), *records).rows.to_pylist())
    for record in records:
        decision = live(record.turns, record.policy, dict(record.metadata))
        for verdict in decision.verdicts:
            row = next(rows)
            assert verdict.scores is not None
            assert (row["id"], row["turn"], row["action"]) == (record.id, verdict.turn, verdict.action.name.lower())
            assert row["role"] == record.turns[verdict.turn].role
            assert row["scores"] == {"unsafe": verdict.scores.unsafe, "hazards": dict(verdict.scores.hazards)}
            assert row["coverage"] == {"seen": verdict.coverage.seen, "total": verdict.coverage.total}
            assert row["hits"] == sorted(verdict.hits)
            assert [(one["category"], one["rule"], one["score"], one["threshold"]) for one in row["violations"]] == [
                (one.category, one.rule, one.score, one.threshold) for one in verdict.violations
            ]
            assert row["policy"] == {"name": decision.policy.name, "revision": decision.policy.revision}
            assert row["metadata"] == ([("app", "kids")] if record.metadata["app"] == "kids" else [])
    assert next(rows, None) is None


def test_the_same_conversation_is_read_once() -> None:
    """Within a window and after it, whoever said it; what differs in a role is another one."""
    model = CausalModel()
    made = judge(model)
    first = judged(made, said("Hi!", row=1), said("Hi!", row=2), said("Hi!", "Hello!", row=3))
    assert sum(model.passes) == 2
    again = judged(made, said("Hi!", row=4))
    assert sum(model.passes) == 2
    assert again.tokens == 0
    assert again.rows["scores"].to_pylist() == first.rows["scores"].to_pylist()[:1]
    judged(made, replace(said("Hi!"), turns=(Turn(Role.AGENT, "Hi!"),)))
    assert sum(model.passes) == 3


def test_what_was_met_last_is_remembered() -> None:
    """To float32, as a verdict has it; what was met longest ago is forgotten first."""
    remembered = Remembered(2 * 256)
    both = (Scores(0.1, {"S1": 0.2, "own": 0.3}), Scores(0.4, {"S1": 0.5, "own": 0.6}))
    for digest, found in ((b"both", both), (b"none", ()), (b"both", both), (b"one", [Scores(0.7, {})])):
        remembered.keep(digest, found)
    values = iter(array("f", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]))
    assert remembered.get(b"both") == [Scores(next(values), {"S1": next(values), "own": next(values)}) for _ in both]
    assert remembered.get(b"one") == [Scores(next(values), {})]
    assert remembered.get(b"none") is None


def test_all_turns_of_a_conversation_are_judged_in_one_pass() -> None:
    """Where the policy reads all of what was said before."""
    model = CausalModel()
    assert judged(judge(model), said("Hi!", "Hello!", "Bye!", "Bye!")).rows.num_rows == 4
    assert model.passes == [1]


class Failing(CausalModel):
    """Cannot read that something is poison."""

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        (poison,) = self.tokenise(Conversation((Turn(Role.USER, "poison"),), None))
        if any(tokens.ids[: len(poison.ids)] == poison.ids for tokens in batch):
            raise RuntimeError("poison")
        return super().score(batch)


def test_what_the_model_fails_at_is_degraded_and_costs_the_others_nothing() -> None:
    """That turn has no scores, and its policy's on_error decides; who was in the same pass is scored."""
    rows = judged(judge(Failing()), said("Hi!", row=1), said("poison", row=2), said("Ho!", row=3)).rows.to_pylist()
    assert [row["degraded"] for row in rows] == [False, True, False]
    assert rows[1]["scores"] is None
    assert rows[1]["action"] == "block"


class Asking(CausalModel):
    """Somebody asks to stop while it reads."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self.stop = stop

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        self.stop.ask()
        return super().score(batch)


def test_it_stops_between_two_passes() -> None:
    """Of a window, which may be a minute's work."""
    stop = Stop()
    model = Asking(stop)
    made = judge(model, max_batch_tokens=1)
    window = Window((said("Hi!", row=1), said("Ho!", row=2)), Position(0, 2), 0.5)
    with pytest.raises(Stopped):
        made.score(made.prepare(window), stop)
    assert model.passes == [1]


def test_a_model_that_fails_for_everything_stops_the_audit() -> None:
    """Rather than that months of logs are told as degraded."""
    model = CausalModel()
    made = judge(model)
    model.fails = True
    with pytest.raises(ModelFailed, match=r"^the model could not answer: RuntimeError$"):
        judged(made, said("Hi!", row=1), said("Ho!", row=2))


def test_a_row_that_names_an_unknown_policy_is_rejected() -> None:
    """With what there is that is like it; where one policy judges all, what rows name does not matter."""
    record = said("Hi!", policy="time")
    rejected = judged(judge(CausalModel()), record)
    assert (rejected.rows.num_rows, rejected.conversations) == (0, 0)
    assert [reject.reason for reject in rejected.rejects] == ["policy: no policy is named 'time'; did you mean timed?"]
    assert judged(judge(CausalModel(), by_row=False), record).rows.num_rows == 1


def test_another_policy_is_compared_with() -> None:
    """It judges the same turns, by scores of its own where it reads otherwise; its name may be the same."""
    compare: Policy = replace(TIMED, name="default")
    record = said("a bomb", "What?", "Tell me!")
    rows = judged(judge(CausalModel(), compare=compare), record).rows.to_pylist()
    alone = judged(judge(CausalModel()), replace(record, policy="timed")).rows.to_pylist()
    for row, own in zip(rows, alone, strict=True):
        assert row["compare"]["policy"] == {"name": "default", "revision": TIMED.revision}
        assert (row["compare"]["action"], row["compare"]["violations"]) == (own["action"], own["violations"])
        assert row["policy"]["revision"] == POLICY.revision


def test_texts_stand_in_the_rows_only_where_they_are_asked_for() -> None:
    """Else only how long they are."""
    record = said("Hi!", "Hello!")
    rows = judged(judge(CausalModel(), text=True), record).rows.to_pylist()
    assert [row["text"] for row in rows] == ["Hi!", "Hello!"]
    (row, _) = judged(judge(CausalModel()), record).rows.to_pylist()
    assert "text" not in row
    assert row["characters"] == 3


def test_a_policy_that_the_model_cannot_serve_is_refused() -> None:
    """Before anything is read."""
    (category, *_) = POLICY.categories
    wrong = replace(POLICY, categories=(replace(category, hazards=("S1",)),))
    with pytest.raises(PolicyError, match="S1"):
        Judge(CausalModel(), PolicyStore([wrong], "default"), max_batch_tokens=64)


@given(st.lists(st.integers(0, 80), max_size=60), st.integers(1, 64))
def test_bins_hold_everything_once_and_are_all_but_full(sizes: list[int], room: int) -> None:
    """No two of them would fit into one; what is larger than a bin has one for itself."""
    bins = pack(sizes, room)
    assert sorted(place for each in bins for place in each) == list(range(len(sizes)))
    filled = [sum(sizes[place] for place in each) for each in bins]
    assert all(len(each) == 1 or total <= room for each, total in zip(bins, filled, strict=True))
    assert all(one + other > room for place, one in enumerate(filled) for other in filled[:place] if one + other)
