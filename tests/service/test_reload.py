"""The policies of a running server, as their directory changes."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tests.conftest import Serve, Service, health_of, until
from tests.service.rollouts import MILD, STRICT, check, eventually, healthz, metrics, policy, save, save_to_volume

BROKEN = {
    "no policy": (policy(2), ":6:32: categories.unsafe.thresholds.user.block: expected a number from 0 to 1, found 2"),
    "half a file": (
        policy(STRICT)[:-3],
        ":7:1: not YAML: while parsing a flow mapping, did not find expected ',' or '}'",
    ),
    "hazards that the model does not score": (
        policy(STRICT).replace("score: unsafe", "hazards: [S10]"),
        "policy default: words does not score S10",
    ),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    save(directory / "default.yaml", policy(STRICT))
    return directory


def served(service: Service) -> dict[str, str]:
    return {policy.name: policy.revision for policy in service.judge.policies.policies}


async def test_a_reload_under_load_fails_no_request(serve: Serve, directory: Path) -> None:
    """Whatever is saved meanwhile, each answer is that of one of the revisions, and some are of each."""
    revisions = {save(directory / "default.yaml", policy(block)): block for block in (STRICT, MILD)}
    seen: list[tuple[str, str]] = []
    over = asyncio.Event()

    async def ask() -> None:
        while not over.is_set():
            seen.append(await check(service))

    async with serve(policies=directory) as service:
        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for number in range(10):
            revision = save(directory / "default.yaml", policy((STRICT, MILD)[number % 2]))
            await until(lambda revision=revision: served(service)["default"] == revision)  # type: ignore[misc]
            answered = len(seen)
            await until(lambda answered=answered: len(seen) >= answered + 16)  # type: ignore[misc]
        over.set()
        await asyncio.gather(*asking)
    actions = {revision: "block" if block == STRICT else "allow" for revision, block in revisions.items()}
    assert set(seen) == set(actions.items())


async def test_a_volume_of_kubernetes_is_followed(serve: Serve, tmp_path: Path) -> None:
    """There files are links through a link, which alone is replaced."""
    save_to_volume(tmp_path, default=policy(STRICT), kids=policy(STRICT))
    async with serve(policies=tmp_path, policies_poll_seconds=600) as service:
        assert (await check(service))[1] == "block"
        before = served(service)
        save_to_volume(tmp_path, default=policy(MILD), kids=policy(STRICT))
        await until(lambda: served(service)["default"] != before["default"])
        assert (await check(service))[1] == "allow"
        assert served(service)["kids"] == before["kids"]
        assert [event["changed"] for event in service.events("policies_reloaded")] == [["default"]]


def move(directory: Path, name: str) -> None:
    directory.rename(directory.with_name(name))


def overwrite(directory: Path) -> None:
    (directory / "default.yaml").write_text(policy(MILD))


def swap_the_directory(directory: Path) -> None:
    """Nobody who watches the old one is told."""
    fresh = directory.with_name("fresh")
    shutil.copytree(directory, fresh)
    (fresh / "default.yaml").write_text(policy(MILD))
    move(directory, "old")
    move(fresh, directory.name)


@pytest.mark.parametrize("polling", ["false", "true"])
@pytest.mark.parametrize("change", [overwrite, swap_the_directory])
async def test_however_files_change_it_is_seen(
    serve: Serve, directory: Path, change: Callable[[Path], None], polling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and in whole directories, and also where the system is not asked to tell."""
    monkeypatch.setenv("WATCHFILES_FORCE_POLLING", polling)
    async with serve(policies=directory, policies_poll_seconds=0.05) as service:
        before = served(service)
        change(directory)
        await until(lambda: served(service) != before)
        assert (await check(service))[1] == "allow"


async def test_policies_come_and_go(serve: Serve, directory: Path) -> None:
    """A new file is a new policy; without its file one is gone; without the directory all stay."""
    async with serve(policies=directory, policies_poll_seconds=0.05) as service:
        save(directory / "kids.yaml", policy(MILD))
        await until(lambda: set(served(service)) == {"default", "kids"})
        (directory / "kids.yaml").unlink()
        await until(lambda: set(served(service)) == {"default"})
        move(directory, "gone")
        await until(lambda: service.events("policies_kept") != [])
        assert await healthz(service) == {
            "status": "SERVING",
            "policies_differ": [f"{directory}: cannot be read: No such file or directory"],
        }
        assert (await check(service))[1] == "block"
        move(directory.with_name("gone"), directory.name)
        save(directory / "kids.yaml", policy(MILD))
        await until(lambda: set(served(service)) == {"default", "kids"})
        assert await healthz(service) == {"status": "SERVING"}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_wrong_keeps_the_last_good_policies(serve: Serve, directory: Path, name: str) -> None:
    """Health says what differs and where, metrics that it does, and gRPC goes on serving; until it is mended."""
    broken, problem = BROKEN[name]
    async with serve(policies=directory) as service:
        good = await check(service)
        assert await metrics(service, "policies_differ") == {(): 0}
        assert await metrics(service, "policy_info") == {("default", good[0], "live"): 1}
        (directory / "default.yaml").write_text(broken)
        await until(lambda: service.events("policies_kept") != [])
        told = f"{directory}/default.yaml{problem}" if problem.startswith(":") else problem
        assert await healthz(service) == {"status": "SERVING", "policies_differ": [told]}
        assert service.events("policies_kept")[0]["problems"] == [told]
        assert await metrics(service, "policies_differ") == {(): 1}
        assert await check(service) == good
        health = await health_of(service.channel).Check(HealthCheckRequest())
        assert health.status == HealthCheckResponse.SERVING

        mended = save(directory / "default.yaml", policy(MILD))
        await until(lambda: served(service)["default"] == mended)
        assert await healthz(service) == {"status": "SERVING"}
        assert await metrics(service, "policies_differ") == {(): 0}
        assert await metrics(service, "policy_info") == {("default", mended, "live"): 1}
        reloads = await metrics(service, "policy_reloads_total")
        assert (reloads["changed",], reloads["refused",] >= 1) == (1, True)


async def is_unchanged(service: Service) -> bool:
    return ("unchanged",) in await metrics(service, "policy_reloads_total")


async def test_what_changes_nothing_is_no_change(serve: Serve, directory: Path) -> None:
    """A policy that is merely written otherwise keeps its revision."""
    async with serve(policies=directory) as service:
        before = served(service)
        save(directory / "default.yaml", "# A comment.\n" + policy(STRICT))
        await eventually(lambda: is_unchanged(service))
        assert served(service) == before
        assert service.events("policies_reloaded") == []
