"""A Llama Guard checkpoint behind the service: a real server with a small checkpoint, and real clients."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from guard.client import check_request
from guard.errors import ConfigError, Cut
from guard.service.server import load_moderator
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.v1 import moderation_pb2 as pb
from tests.conftest import run_server
from tests.model.llama_guards import Shape
from tests.service.rollouts import metrics

# The thresholds are such that the verdicts do not hang on what so small a model makes of a text.
POLICY = """\
description: For a shop that asks a Llama Guard.
categories:
  unsafe:
    title: Unsafe
    score: unsafe
    thresholds:
      user: {block: 0}
      agent: {block: 0}
  rivals:
    title: Praise for rivals
    definition: Praises what a competitor sells.
    score: asked
    thresholds:
      user: {flag: 0.0}
  gore:
    title: Gore
    hazards: [X2]
    thresholds:
      user: {flag: 0.999}
"""
KILL = "I will find you and kill you."


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    (directory / "default.yaml").write_text(POLICY)
    plain = POLICY.replace("score: asked", "hazards: [S10]").replace("{block: 0}", "{block: 1}")
    (directory / "plain.yaml").write_text(plain.replace("{flag: 0.0}", "{flag: 1}"))
    return directory


async def test_the_whole_service_in_front_of_a_checkpoint(
    llama_guards: Mapping[Shape, Path], policies: Path, tmp_path: Path
) -> None:
    """One turn, all turns, bulk, a stream: under a policy with a category in words, with the prompt's hash."""
    log = tmp_path / "decisions.jsonl"
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "policies": policies, "decision_log": log}
    async with run_server(load_moderator, model=llama_guards["8b"], **options) as running:
        guard = running.client
        model = await guard.model()
        assert (model.name, model.further_categories) == ("llama-guard-8b", 50)
        assert [hazard.code for hazard in model.hazards][::13] == ["S1", "S14"]

        harmful = await guard.check([("user", KILL)])
        assert harmful.verdict.action == pb.ACTION_BLOCK
        assert {"rivals", "X2", "S1"} <= harmful.verdict.scores.hazards.keys()
        assert {violation.category for violation in harmful.verdict.violations} >= {"unsafe", "rivals"}
        assert len(harmful.provenance.prompt_revision) == 16
        harmless = await guard.check([("user", "How do I bake bread?")], policy="plain")
        assert harmless.verdict.action == pb.ACTION_ALLOW
        assert "rivals" not in harmless.verdict.scores.hazards
        assert harmless.provenance.prompt_revision != harmful.provenance.prompt_revision

        turns = [("system", "Be kind."), ("user", "How do I bake bread?"), ("agent", KILL)]
        every = await guard.check_conversation(turns)
        alone = [await guard.check(turns[: count + 1]) for count in range(3)]
        assert [verdict.scores for verdict in every.verdicts] == [one.verdict.scores for one in alone]
        assert every.verdicts[2].action == pb.ACTION_BLOCK

        asked = [pb.CheckManyRequest(id=text, request=check_request([("user", text)])) for text in (KILL, "Hello!")]
        many = {answer.id: answer.response async for answer in guard.check_many(asked)}
        assert many[KILL].verdict.scores == harmful.verdict.scores

        before = await metrics(running, "prefix_cache_tokens_total")
        assert (await guard.check([("user", KILL)])).verdict.scores == harmful.verdict.scores
        after = await metrics(running, "prefix_cache_tokens_total")
        assert after[("held",)] - before[("held",)] > after[("read",)] - before[("read",)]

        with pytest.raises(Cut) as cut:
            _ = [piece async for piece in guard.filter(["Well. ", "I will ", "find you ", "and kill you."])]
        assert isinstance(cut.value.verdict, pb.Verdict)
        assert cut.value.verdict.action == pb.ACTION_BLOCK
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {
        harmful.provenance.prompt_revision,
        harmless.provenance.prompt_revision,
    }


async def test_each_category_by_itself(llama_guards: Mapping[Shape, Path], policies: Path) -> None:
    """Its probability may be higher than that of `unsafe`; the overall one is that of a prompt with all of them."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "policies": policies, "model": llama_guards["8b"]}
    async with run_server(load_moderator, **options) as running:
        together = (await running.client.check([("user", KILL)])).verdict.scores
    async with run_server(load_moderator, **options, ask="each") as running:
        each = (await running.client.check([("user", KILL)])).verdict.scores
    assert each.hazards.keys() == together.hazards.keys()
    assert each.unsafe == pytest.approx(together.unsafe, abs=1e-6)
    assert sum(together.hazards.values()) == pytest.approx(together.unsafe, rel=1e-5)
    assert all(0 < score < 1 for score in each.hazards.values())
    assert sum(each.hazards.values()) != pytest.approx(each.unsafe, rel=1e-3)


def test_a_policy_that_asks_too_much_is_not_served(llama_guards: Mapping[Shape, Path], policies: Path) -> None:
    """Too many categories, or too many words about them: told at the start."""
    long = POLICY.replace("Praises what", "Praises " + "and much more " * 2000 + "what")
    many = POLICY + "".join(
        f"  own-{number}: {{title: Own, score: asked, thresholds: {{user: {{flag: 0.5}}}}}}\n" for number in range(9)
    )
    for model, policy, problem in (
        (llama_guards["2"], many, "can be asked for 8 categories beside its own, not 11"),
        (llama_guards["8b"], long, "more than half of the 4096 tokens"),
    ):
        (policies / "default.yaml").write_text(policy)
        settings = Settings(model=model, device="cpu", dtype="float32", policies=policies)
        with pytest.raises(ConfigError, match=problem):
            load_moderator(settings, Telemetry.start("warning"))
