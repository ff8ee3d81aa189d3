"""`guard rollout …` against a real server, from a real shell's point of view."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.command import Result, guard
from tests.conftest import Serve, Service
from tests.service.rollouts import MILD, STRICT, check, policy, save


@pytest.fixture
async def service(serve: Serve, tmp_path: Path) -> AsyncIterator[Service]:
    """One that takes candidates, of one policy."""
    (tmp_path / "policies").mkdir()
    save(tmp_path / "policies" / "default.yaml", policy(STRICT))
    (tmp_path / "tokens").write_text("root:let-me-in\n")
    async with serve(policies=tmp_path / "policies", admin_tokens_file=tmp_path / "tokens") as service:
        yield service


async def rollout(service: Service, *arguments: str | Path) -> Result:
    return await guard("rollout", *arguments, "--server", service.target, GUARD_ADMIN_TOKEN="let-me-in")


async def test_a_candidate_from_stage_to_roll_back(service: Service, tmp_path: Path) -> None:
    """What an operator types, in order, and what a terminal shows."""
    (tmp_path / "default.yaml").write_text(policy(MILD, "include: [mild_include.yaml]\n"))
    (tmp_path / "mild_include.yaml").write_text("replies: {mild: Please be mild.}\n")
    live, _ = await check(service)
    staged = await rollout(service, "stage", tmp_path / "default.yaml", "--percent", "0", "--hours", "2", "--json")
    candidate = json.loads(staged.out)["candidate"]
    assert (staged.code, candidate["expiresInSeconds"]) == (0, "7200")
    for _ in range(4):
        await check(service)
    shown = await rollout(service, "status")
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[1] == ["default", live, candidate["revision"], "0", "%", *lines[1][5:7], "4", "0"]
    assert lines[2:] == [
        ["what", "default", candidate["revision"], "changes"],
        ["about", "live", "candidate", "verdicts", "share"],
        ["verdict", "block", "allow", "4", "100.000%"],
        ["unsafe", "block", "allow", "4", "100.000%"],
    ]
    promoted = await rollout(service, "promote", "default", "--revision", candidate["revision"])
    assert promoted.out.splitlines()[0].endswith("on disk: it includes what is not on disk")
    assert await check(service) == (candidate["revision"], "allow")
    assert json.loads((await rollout(service, "status", "--json")).out)["differences"] != []
    back = await rollout(service, "rollback", "default")
    assert (back.code, back.err) == (0, "")
    assert await check(service) == (live, "block")


async def test_a_candidate_is_withdrawn(service: Service, tmp_path: Path) -> None:
    """The live revision answers as before."""
    (tmp_path / "default.yaml").write_text(policy(MILD))
    live, _ = await check(service)
    await rollout(service, "stage", tmp_path / "default.yaml", "--percent", "100")
    assert (await check(service))[1] == "allow"
    assert "candidate" not in json.loads((await rollout(service, "withdraw", "default", "--json")).out)
    assert await check(service) == (live, "block")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            policy(2),
            "default.yaml:6:32: categories.unsafe.thresholds.user.block: expected a number from 0 to 1, found 2",
        ),
        (policy(STRICT).replace("score: unsafe", "hazards: [S10]"), "policy default: words does not score S10"),
    ],
)
async def test_what_is_wrong_with_a_candidate_is_told(
    service: Service, tmp_path: Path, text: str, message: str
) -> None:
    """By the server, in the words of its compiler."""
    (tmp_path / "default.yaml").write_text(text)
    result = await rollout(service, "stage", tmp_path / "default.yaml")
    assert (result.code, result.err) == (2, f"error: {message}\n")
