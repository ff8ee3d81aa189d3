"""From a conversation to a decision: with a small stand-in for the model, and with the embedded one where it counts."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.engine.moderator import Classifier, Moderator
from guard.errors import ConfigError, InputError, NotFound
from guard.model.chat import ChatTokenizer
from guard.policy.compile import Category, Policy
from guard.policy.decide import decide
from guard.policy.store import PolicyStore
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Action, Conversation, Decision, Lane, ModelInfo, Revision, Role, Scores, Tokens, Turn
from tests.stand_ins import LENIENT, POLICY

WINDOW = 48
TOKENIZER = ChatTokenizer(Settings().model / "tokenizer.json", WINDOW)
ON_ERROR = {Role.USER: Action.ALLOW, Role.AGENT: Action.BLOCK, Role.SYSTEM: Action.FLAG, Role.TOOL: Action.BLOCK}
PARTIAL = Policy("partial", "0" * 16, "Differs by role.", (), MappingProxyType(ON_ERROR))
SAID = (
    Turn(Role.SYSTEM, "You are a helpful assistant."),
    Turn(Role.USER, "How do I get into my neighbour's house?"),
    Turn(Role.AGENT, ""),
    Turn(Role.TOOL, '{"weather": "rain"}\0'),
    Turn(Role.AGENT, "Ask them for a key. 🗝️"),
)


class CausalModel:
    """Reads windows of 48 tokens, and makes the scores of a turn up from all tokens before its end, and no others."""

    info = ModelInfo(Revision("causal", "0a"), "cpu", "float32", "crc32", 0, WINDOW, ("S7", "X1"))

    def __init__(self) -> None:
        self.fails = False

    def tokenise(self, conversation: Conversation) -> tuple[Tokens, ...]:
        return TOKENIZER.tokenise(conversation)

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        if self.fails:
            raise RuntimeError("out of memory")
        return [tuple(scores_after(tokens.ids[: span.end]) for span in tokens.spans) for tokens in batch]


def scores_after(ids: Sequence[int]) -> Scores:
    def score(output: str) -> float:
        return crc32(repr((ids, output)).encode()) / 2**32

    return Scores(score("unsafe"), {code: score(code) for code in CausalModel.info.hazards})


@contextmanager
def moderator(model: Classifier) -> Iterator[Moderator]:
    policies = PolicyStore([POLICY, LENIENT, PARTIAL], "default")
    telemetry = Telemetry.start("critical")
    made = Moderator(model, policies, telemetry, max_batch_tokens=64, max_queue_seconds=3600)
    try:
        yield made
    finally:
        made.close()


def judge(judged: Conversation, policy: str = "") -> Decision:
    with moderator(CausalModel()) as made:
        return asyncio.run(made.judge(judged, policy=policy))


turns = st.lists(
    st.builds(Turn, st.sampled_from(Role), st.text(max_size=60)), min_size=1, max_size=12
).map(tuple)  # fmt: skip


@given(turns)
def test_verdicts_are_those_of_the_policy_for_the_models_scores(said: tuple[Turn, ...]) -> None:
    """In every window of a long conversation, each turn is judged once, by its role, on what was read up to its end."""
    decision = judge(Conversation(said, None))
    assert [verdict.turn for verdict in decision.verdicts] == list(range(len(said)))
    spans = [(span, tokens) for tokens in TOKENIZER.tokenise(Conversation(said, None)) for span in tokens.spans]
    for verdict, turn, (span, tokens) in zip(decision.verdicts, said, spans, strict=True):
        scores = scores_after(tokens.ids[: span.end])
        assert (verdict.scores, verdict.coverage, verdict.degraded) == (scores, span.coverage, False)
        assert (verdict.action, verdict.violations) == decide(POLICY, turn.role, scores)


@given(turns, st.data())
def test_a_target_is_judged_as_if_nothing_came_after_it(said: tuple[Turn, ...], data: st.DataObject) -> None:
    """The verdict on a turn is that on the last turn of the conversation up to it."""
    target = data.draw(st.integers(0, len(said) - 1))
    whole, truncated = judge(Conversation(said, target)), judge(Conversation(said[: target + 1], target))
    assert whole.verdicts == truncated.verdicts
    assert [verdict.turn for verdict in whole.verdicts] == [target]


async def test_a_long_conversation_is_read_in_windows_that_say_what_they_saw() -> None:
    """No turn of hundreds is left out, no window is longer than the model reads, and the coverage counts all."""
    said = tuple(Turn((Role.USER, Role.AGENT)[n % 2], f"number {n}") for n in range(300))
    with moderator(CausalModel()) as made:
        decision = await made.judge(Conversation(said, None), lane=Lane.BULK)
    assert [verdict.turn for verdict in decision.verdicts] == list(range(300))
    assert all(0 < verdict.coverage.seen <= WINDOW for verdict in decision.verdicts)
    totals = [verdict.coverage.total for verdict in decision.verdicts]
    assert totals == sorted(set(totals))
    assert totals[-1] > 300 * 5


@pytest.mark.parametrize("policy", ["partial", "default"])
async def test_without_the_model_on_error_answers_for_each_role(policy: str) -> None:
    """Every verdict is marked degraded and has no scores; once the model works again, so do verdicts."""
    with moderator(model := CausalModel()) as made:
        conversation = Conversation(SAID, None)
        model.fails = True
        decision = await made.judge(conversation, policy=policy)
        on_error = made.policies.get(policy).on_error
        assert [verdict.action for verdict in decision.verdicts] == [on_error[turn.role] for turn in SAID]
        assert {(verdict.scores, verdict.violations, verdict.degraded) for verdict in decision.verdicts} == {
            (None, (), True)
        }
        assert decision.verdicts[-1].coverage.total > 0
        model.fails = False
        assert not any(verdict.degraded for verdict in (await made.judge(conversation, policy=policy)).verdicts)


async def test_a_decision_says_what_was_in_force_and_has_a_name_of_its_own() -> None:
    """Policy and model by revision, the time spent, and an id that no other decision has."""
    with moderator(CausalModel()) as made:
        first, second = [await made.judge(Conversation(SAID, 1), policy="lenient") for _ in range(2)]
    assert (first.policy, first.model) == (Revision("lenient", LENIENT.revision), CausalModel.info.revision)
    assert min(first.timings.tokenise, first.timings.queue, first.timings.model) > 0
    assert first.id != second.id


async def test_wrong_requests_are_refused() -> None:
    """A policy that is not there, and a text that is no Unicode, are the caller's fault."""
    with moderator(CausalModel()) as made:
        with pytest.raises(NotFound):
            await made.judge(Conversation(SAID, 1), policy="none")
        with pytest.raises(InputError, match=r"^turns\[0\]\.text: "):
            await made.judge(Conversation((Turn(Role.USER, "\ud800"),), 0))


def test_a_policy_over_hazards_that_the_model_lacks_is_refused() -> None:
    """Before anything is served, with the names of policy, model and hazards."""
    categories = (Category("other", "Other", ("S1", "S7", "X6"), MappingProxyType({})),)
    policies = PolicyStore([POLICY, Policy("wide", "0" * 16, "", categories, POLICY.on_error)], "default")
    with pytest.raises(ConfigError, match=r"^policy wide: causal does not score S1, X6$"):
        Moderator(
            CausalModel(), policies, Telemetry.start("critical"), max_batch_tokens=64, max_queue_seconds=1
        )  # fmt: skip


async def test_one_pass_scores_every_turn_as_it_is_scored_alone(classifier: Classifier) -> None:
    """With the embedded model in float32, however the requests are batched: to the last bit with native kernels.

    torch's attention rounds otherwise where a sequence is longer.
    """
    with moderator(classifier) as made:
        together, *alone = await asyncio.gather(
            made.judge(Conversation(SAID, None)),
            *(made.judge(Conversation(SAID[: turn + 1], turn)) for turn in range(len(SAID))),
        )
    tolerance = 0.0 if classifier.info.kernels.startswith("native") else 1e-5
    in_one, by_themselves = (
        [verdict.scores.unsafe for decision in decisions for verdict in decision.verdicts if verdict.scores]
        for decisions in ([together], alone)
    )
    assert in_one == pytest.approx(by_themselves, rel=0, abs=tolerance)
    assert len(set(in_one)) == len(SAID)
