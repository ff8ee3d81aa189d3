"""Heads that policies add to a model: on one of random weights, whose hidden states are as good as any."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from guard.engine.moderator import Moderator
from guard.model.turn_classifier import TurnClassifier
from guard.policy.heads import make_head, write_heads
from guard.policy.store import PolicyStore, load_policy
from guard.telemetry import Telemetry
from guard.types import Conversation, Head, Role, Scores, Tokens, Turn
from tests.training.untrained import write_model

SHOP = """\
description: For a shop.
categories:
  {name}:
    title: Competitors' products
    examples: rivals.csv
    thresholds:
      user: {{block: 0.5}}
"""
TEXTS = ("Hi!", "Is the Aurix any better?", "Where is my order?", "", "No.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TurnClassifier:
    return TurnClassifier(write_model(tmp_path_factory.mktemp("model")), "cpu", "float32")


def head(model: TurnClassifier, name: str, seed: int) -> Head:
    weight = np.random.default_rng(seed).normal(size=32).astype(np.float32)
    return make_head(name, model.info.revision.revision, "", weight, 0.1)


def tokens(model: TurnClassifier, heads: Sequence[Head], text: str) -> Tokens:
    (window,) = model.tokenise(Conversation((Turn(Role.USER, text),), 0))
    return Tokens(window.ids, window.spans, tuple(heads))


def test_a_head_is_scored_as_it_is_scored_alone(model: TurnClassifier) -> None:
    """To the bit, whatever is scored beside it and whatever other heads there are; the model's own scores stay."""
    some = [head(model, f"own-{number}", number) for number in range(40)]
    plain = [model.score([tokens(model, (), text)])[0][0] for text in TEXTS]
    alone = [model.score([tokens(model, some[7:8], text)])[0][0] for text in TEXTS]
    mixed = [tokens(model, (some, some[7:8], (), some[:8])[number % 4], TEXTS[number % 5]) for number in range(60)]
    for window, (scores,) in zip(mixed, model.score(mixed), strict=True):
        place = [tokens(model, (), text).ids for text in TEXTS].index(window.ids)
        names = [one.name for one in window.heads]
        assert list(scores.hazards) == [*model.info.hazards, *names]
        assert {code: scores.hazards[code] for code in model.info.hazards} == plain[place].hazards
        assert scores.unsafe == plain[place].unsafe
        if some[7].name in names:
            assert scores.hazards[some[7].name] == alone[place].hazards[some[7].name]
    assert len({scores.hazards[some[7].name] for scores in alone}) == len(TEXTS)


def test_a_score_is_that_of_the_hidden_state(model: TurnClassifier) -> None:
    """Opposite weights give the opposite probability, and without weights it is that of the bias."""
    one = head(model, "own", 1)
    opposite = make_head("not", one.model, "", -np.array(one.weight), -one.bias)
    neither = make_head("bias", one.model, "", np.zeros(32), 0.5)
    for text in TEXTS:
        ((scores,),) = model.score([tokens(model, (one, opposite, neither), text)])
        assert scores.hazards[one.name] + scores.hazards[opposite.name] == pytest.approx(1)
        assert scores.hazards[neither.name] == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_every_policy_of_a_store_is_scored_for(model: TurnClassifier, tmp_path: Path) -> None:
    """So that a verdict can be judged by another of them; a request keeps the heads that it came with."""
    for number, name in enumerate(("rivals", "cats")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(SHOP.format(name=name))
        write_heads(path, {name: head(model, name, number)})
    store = PolicyStore([load_policy(tmp_path / f"{name}.yaml") for name in ("rivals", "cats")], "cats")
    moderator = Moderator(model, store, Telemetry.start("critical"), max_batch_tokens=64, max_queue_seconds=3600)

    async def judged() -> tuple[Scores | None, Scores | None]:
        conversation = Conversation((Turn(Role.USER, "Hi!"),), 0)
        before = asyncio.create_task(moderator.judge(conversation, policy="rivals"))
        await asyncio.sleep(0)
        moderator.policies = PolicyStore([store.get("cats")], "cats")
        after = await moderator.judge(conversation)
        return (await before).verdicts[0].scores, after.verdicts[0].scores

    try:
        before, after = asyncio.run(judged())
    finally:
        moderator.close()
    assert before
    assert after
    names = {name: head(model, name, number).name for number, name in enumerate(("rivals", "cats"))}
    assert before.hazards.keys() - after.hazards.keys() == {names["rivals"]}
    assert before.hazards[names["cats"]] == after.hazards[names["cats"]]
