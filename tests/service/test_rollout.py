"""Candidates beside live policies: who may stage them, whom they answer, what is counted, and what becomes of them."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from guard.client import AdminClient
from guard.errors import GuardError, InputError, NotFound, PolicyError, Unanswered, Unauthenticated
from guard.v1 import admin_pb2 as pb
from guard.v1 import moderation_pb2
from tests.conftest import Serve, Service, until
from tests.service.rollouts import MILD, STRICT, check, eventually, healthz, metrics, policy, save, save_to_volume

ALLOW, BLOCK = moderation_pb2.ACTION_ALLOW, moderation_pb2.ACTION_BLOCK


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Operator:
    """An AdminClient for tests that share their event loop with the server."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        def call(*arguments: Any, **options: Any) -> Awaitable[Any]:
            return asyncio.to_thread(getattr(self._client, name), *arguments, **options)

        return call


Managed = Callable[..., Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    save(directory / "default.yaml", policy(STRICT))
    return directory


@pytest.fixture
def manage(serve: Serve, directory: Path, tmp_path: Path) -> Managed:
    """A server with those policies, and its operator."""
    (tmp_path / "tokens").write_text("root:let-me-in\n")

    @asynccontextmanager
    async def managed(**options: Any) -> AsyncIterator[tuple[Service, Operator]]:
        settings = {"policies": directory, "admin_tokens_file": tmp_path / "tokens"} | options
        async with serve(**settings) as service:
            with AdminClient(service.target, token="let-me-in") as client:
                yield service, Operator(client)

    return managed


async def test_in_shadow_a_candidate_answers_nobody_and_what_it_would_change_is_told(
    manage: Managed, tmp_path: Path
) -> None:
    """In metrics, in the status and in the decision log, by category and by the actions of both."""
    log = tmp_path / "log"
    async with manage(decision_log=log) as (service, operator):
        live, action = await check(service)
        staged = await operator.stage("default", policy(MILD))
        revision = staged.candidate.revision
        for _ in range(3):
            assert await check(service) == (live, action)
        await service.client.check([("user", "Hi!")])
        (rollout,) = (await operator.rollouts()).rollouts
        flips, verdicts = (
            await metrics(service, "candidate_flips_total"),
            await metrics(service, "candidate_verdicts_total"),
        )
        info = await metrics(service, "policy_info")
    assert rollout == pb.Rollout(
        policy="default",
        live_revision=live,
        candidate=pb.Candidate(
            revision=revision,
            expires_in_seconds=24 * 3600,
            verdicts=4,
            flips=[
                pb.Flip(about="verdict", live=BLOCK, candidate=ALLOW, count=3),
                pb.Flip(about="unsafe", live=BLOCK, candidate=ALLOW, count=3),
            ],
        ),
    )
    assert flips == {(about, "allow", "block", "default", revision): 3 for about in ("verdict", "unsafe")}
    assert verdicts == {("live", "default", revision): 4}
    assert info == {("default", live, "live"): 1, ("default", revision, "candidate"): 1}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["candidate" in line for line in lines] == [False, True, True, True, True]
    assert lines[1]["policy"]["revision"] == live
    assert lines[1]["candidate"] == {"revision": revision, "action": "allow", "violations": []}


async def test_as_canary_a_candidate_answers_a_share_of_the_conversations(manage: Managed, tmp_path: Path) -> None:
    """A conversation is always answered by the same revision; the live one is judged beside it, and told."""
    log = tmp_path / "log"
    async with manage(decision_log=log) as (service, operator):
        live, _ = await check(service)
        candidate = (await operator.stage("", policy(MILD), percent=50)).candidate.revision
        answers = {id: {await check(service, id) for _ in range(3)} for id in map(str, range(40))}
        single = {await check(service) for _ in range(40)}
        (rollout,) = (await operator.rollouts()).rollouts
        verdicts = await metrics(service, "candidate_verdicts_total")
    assert all(len(found) == 1 for found in answers.values())
    assert set.union(*answers.values()) == single == {(live, "block"), (candidate, "allow")}
    assert rollout.candidate.verdicts == 160
    assert 0 < rollout.candidate.answered < 160
    assert verdicts["candidate", "default", candidate] == rollout.candidate.answered
    assert {flip.count for flip in rollout.candidate.flips} == {160}
    lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    by_candidate = [line for line in lines if line["policy"]["revision"] == candidate]
    assert len(by_candidate) == rollout.candidate.answered
    assert all((line["live"]["revision"], line["live"]["action"]) == (live, "block") for line in by_candidate)


async def test_a_candidate_expires(manage: Managed) -> None:
    """From then on the live revision answers, and nothing is judged beside it."""
    clock = Clock()
    async with manage(clock=clock) as (service, operator):
        live, _ = await check(service)
        staged = (await operator.stage("default", policy(MILD), percent=100, ttl_seconds=60)).candidate
        assert staged.expires_in_seconds == 60
        clock.now += 59
        assert await check(service) == (staged.revision, "allow")
        clock.now += 1
        assert await check(service) == (live, "block")
        (rollout,) = (await operator.rollouts()).rollouts
        assert not rollout.HasField("candidate")
        assert await metrics(service, "policy_info") == {("default", live, "live"): 1}
        assert [event["reason"] for event in service.events("policy_dropped")] == ["it has expired"]


async def test_a_promoted_candidate_is_live_and_on_disk_and_the_one_before_comes_back(
    manage: Managed, directory: Path
) -> None:
    """Its file is written word for word, and restored by a roll-back, which another one undoes."""
    strict, mild = (directory / "default.yaml").read_text(), "# Milder.\n" + policy(MILD)
    async with manage() as (service, operator):
        live, _ = await check(service)
        candidate = (await operator.stage("default", mild)).candidate.revision
        promoted = await operator.promote("default", candidate[:6])
        assert promoted == pb.Rollout(policy="default", live_revision=candidate, previous_revision=live)
        assert await check(service) == (candidate, "allow")
        assert (directory / "default.yaml").read_text() == mild
        for revision, other, text in ((live, candidate, strict), (candidate, live, mild)):
            back = await operator.rollback("default")
            assert back == pb.Rollout(policy="default", live_revision=revision, previous_revision=other)
            assert (await check(service))[0] == revision
            assert (directory / "default.yaml").read_text() == text
        assert os.listdir(directory) == ["default.yaml"]  # noqa: PTH208 # in an async function
        assert await healthz(service) == {"status": "SERVING"}


async def is_as_on_disk(service: Service) -> bool:
    return "policies_differ" not in await healthz(service)


async def test_where_the_directory_is_not_ours_a_promoted_candidate_lives_in_memory(
    manage: Managed, tmp_path: Path
) -> None:
    """That it is not on disk is told, whatever else changes there, until its file is another one."""
    volume = tmp_path / "volume"
    volume.mkdir()
    save_to_volume(volume, default=policy(STRICT), kids=policy(STRICT))
    async with manage(policies=volume) as (service, operator):
        live, _ = await check(service)
        await operator.stage("default", policy(MILD))
        promoted = await operator.promote("default")
        told = f"{promoted.live_revision} is live and {live} on disk: {volume}/default.yaml is a link"
        assert promoted.difference == told
        assert (await healthz(service))["policies_differ"] == [f"policy default: {told}"]
        assert await metrics(service, "policies_differ") == {(): 1}

        save_to_volume(volume, default=policy(STRICT), kids=policy(MILD))
        await until(lambda: service.events("policies_reloaded") != [])
        assert await check(service) == (promoted.live_revision, "allow")
        assert (await operator.rollouts()).differences == [f"policy default: {told}"]

        save_to_volume(volume, default=policy(MILD), kids=policy(MILD))
        await eventually(lambda: is_as_on_disk(service))
        assert await check(service) == (promoted.live_revision, "allow")

        save_to_volume(volume, default=policy(0.7), kids=policy(MILD))
        await until(lambda: len(service.events("policies_reloaded")) == 2)
        assert (await check(service))[1] == "block"
        assert (await operator.rollback("default")).live_revision == promoted.live_revision
        assert await check(service) == (promoted.live_revision, "allow")


async def test_a_candidate_that_comes_by_disk_is_one_no_more(manage: Managed, directory: Path) -> None:
    """It is live then; and so it goes where its policy does, or reads another history."""
    save(directory / "kids.yaml", policy(STRICT))
    save(directory / "other.yaml", policy(STRICT))
    async with manage() as (service, operator):
        for name in ("default", "kids", "other"):
            await operator.stage(name, policy(MILD))
        revision = save(directory / "default.yaml", policy(MILD))
        (directory / "kids.yaml").unlink()
        save(directory / "other.yaml", policy(STRICT, "history: 3\n"))
        await until(lambda: len(service.events("policy_dropped")) == 3)
        assert {event["policy"]: event["reason"] for event in service.events("policy_dropped")} == {
            "default": f"revision {revision} is live",
            "kids": "the policy is gone",
            "other": "its `history` is not that of the live policy, so that both cannot judge from the same scores",
        }
        assert not any(rollout.HasField("candidate") for rollout in (await operator.rollouts()).rollouts)


async def test_a_candidate_is_withdrawn(manage: Managed, directory: Path) -> None:
    """And nothing else happens."""
    text = (directory / "default.yaml").read_text()
    async with manage() as (service, operator):
        live, _ = await check(service)
        await operator.stage("default", policy(MILD), percent=100)
        assert await operator.withdraw("default") == pb.Rollout(policy="default", live_revision=live)
        assert await check(service) == (live, "block")
        assert (directory / "default.yaml").read_text() == text


INCLUDE = "include: [mild_include.yaml]\n"
FRAGMENT = policy(MILD).removeprefix("description: For tests.\n").replace("unsafe:", "other:")


async def test_what_a_candidate_includes_comes_with_it(manage: Managed, directory: Path) -> None:
    """It is put into its file only where that gives the same policy on disk."""
    async with manage() as (_, operator):
        with pytest.raises(PolicyError) as raised:
            await operator.stage("default", policy(STRICT, INCLUDE))
        missing = "mild_include.yaml:1:1: cannot be read: No such file or directory"
        assert str(raised.value) == f"default.yaml:2:11: include[0]: cannot be included: {missing}"

        await operator.stage("default", policy(STRICT, INCLUDE), {"mild_include.yaml": FRAGMENT})
        promoted = await operator.promote("default")
        assert promoted.difference.endswith(" on disk: it includes what is not on disk")
        await operator.rollback("default")

        (directory / "mild_include.yaml").write_text(FRAGMENT.replace("Unsafe", "Other"))
        await operator.stage("default", policy(STRICT, INCLUDE), {"mild_include.yaml": FRAGMENT})
        assert (await operator.promote("default")).difference.endswith("it includes what is otherwise on disk")
        await operator.rollback("default")

        (directory / "mild_include.yaml").write_text(FRAGMENT)
        await operator.stage("default", policy(STRICT, INCLUDE), {"mild_include.yaml": FRAGMENT})
        assert (await operator.promote("default")).difference == ""
        assert (directory / "default.yaml").read_text() == policy(STRICT, INCLUDE)


REFUSED: list[tuple[str, str, dict[str, Any], type[GuardError], str]] = [
    ("", policy(2), {}, PolicyError, r"^default.yaml:6:32: categories.*: expected a number from 0 to 1, found 2$"),
    ("", policy(STRICT).replace("score: unsafe", "hazards: [S10]"), {}, PolicyError, "does not score S10"),
    ("", policy(STRICT), {}, InputError, "^policy: revision [0-9a-f]{16} is live$"),
    ("", policy(MILD, "history: 2\n"), {}, InputError, "^policy: its `history` is not that of the live policy"),
    ("defualt", policy(MILD), {}, NotFound, "no policy is named 'defualt'; did you mean default"),
    ("", policy(MILD), {"percent": 101}, InputError, "^percent: should be from 0 to 100$"),
    ("", policy(MILD), {"ttl_seconds": -1}, InputError, "^ttl_seconds: should be 0 or more$"),
]


@pytest.mark.parametrize(("name", "text", "options", "kind", "message"), REFUSED)
async def test_what_cannot_be_staged_is_told(
    manage: Managed, name: str, text: str, options: dict[str, Any], kind: type[GuardError], message: str
) -> None:
    """A file that is no policy by file, line and column; and nothing is changed."""
    async with manage() as (service, operator):
        before = service.judge.policies
        with pytest.raises(kind, match=message):
            await operator.stage(name, text, **options)
        assert service.judge.policies is before


async def test_more_problems_than_a_status_holds_are_counted(manage: Managed) -> None:
    """The first of them are told."""
    text = "".join(f"unknown-{number}: 1\n" for number in range(90))
    async with manage() as (_, operator):
        with pytest.raises(PolicyError) as raised:
            await operator.stage("default", text)
    *told, last = str(raised.value).splitlines()
    assert told[0] == "default.yaml:1:1: categories: expected categories or rules, found neither"
    assert 5 < len(told) < 50
    assert last == f"and {92 - len(told)} more"


async def test_there_must_be_something_to_promote_withdraw_or_return_to(manage: Managed) -> None:
    """Else it is NOT_FOUND, as it is where the candidate is not the one that is meant."""
    async with manage() as (_, operator):
        for call in (operator.promote, operator.withdraw):
            with pytest.raises(NotFound, match=r"^policy: default has no candidate$"):
                await call("default")
        with pytest.raises(NotFound, match=r"^policy: no other revision of default was in force since the start$"):
            await operator.rollback("default")
        await operator.stage("default", policy(MILD))
        with pytest.raises(NotFound, match=r"^revision: the candidate of default is [0-9a-f]{16}$"):
            await operator.promote("default", "0123")


async def test_the_admin_service_asks_for_a_token_of_its_own(manage: Managed, tmp_path: Path) -> None:
    """One that may check may not roll out, nor the other way round; who did is logged."""
    (tmp_path / "clients").write_text("alice:secret\n")
    async with manage(tokens_file=tmp_path / "clients") as (service, operator):
        for token in (None, "secret"):
            with AdminClient(service.target, token=token) as client, pytest.raises(Unauthenticated):
                await asyncio.to_thread(client.rollouts)
        await operator.rollouts()
        assert [event["client"] for event in service.events("call") if event["code"] == "OK"] == ["root"]
        bearer = (("authorization", "Bearer let-me-in"),)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await service.stub.GetModel(moderation_pb2.GetModelRequest(), metadata=bearer)
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_without_tokens_there_is_no_admin_service(service: Service) -> None:
    """It is not known at all."""
    with AdminClient(service.target) as client, pytest.raises(Unanswered, match=r"^UNIMPLEMENTED: "):
        await asyncio.to_thread(client.rollouts)
