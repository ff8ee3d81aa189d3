"""What the tests of reloads and of roll-outs share: policies in a directory, and what a server tells of them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from guard.policy.store import load_policy
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Running, Service

STRICT, MILD = 0.5, 0.9  # the stand-in's "attack" is unsafe by 0.875


def policy(block: float, more: str = "") -> str:
    thresholds = f"{{user: {{block: {block}}}}}"
    unsafe = f"  unsafe:\n    title: Unsafe\n    score: unsafe\n    thresholds: {thresholds}\n"
    return f"description: For tests.\n{more}categories:\n{unsafe}"


def save(path: Path, text: str) -> str:
    """As a careful editor does it; the revision."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
    return load_policy(path).revision


def save_to_volume(directory: Path, **files: str) -> None:
    """As Kubernetes fills the volume of a ConfigMap: links into a directory that one link swaps for another."""
    number = sum(path.is_dir() and not path.is_symlink() for path in directory.iterdir())
    fresh = directory / f"..{number}"
    fresh.mkdir()
    for name, text in files.items():
        (fresh / f"{name}.yaml").write_text(text)
    (directory / "..data_tmp").symlink_to(fresh.name)
    (directory / "..data_tmp").rename(directory / "..data")
    for name in files:
        if not (link := directory / f"{name}.yaml").is_symlink():
            link.symlink_to(f"..data/{name}.yaml")


async def check(service: Service, conversation_id: str = "") -> tuple[str, str]:
    """The revision that judges an attack, and its action."""
    answer = await service.client.check([("user", "attack")], conversation_id=conversation_id)
    return answer.provenance.policy_revision, pb.Action.Name(answer.verdict.action).removeprefix("ACTION_").lower()


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """As `until`, of what must be asked for."""
    while not await condition():  # noqa: ASYNC110 # what is waited for has no event
        await asyncio.sleep(0.01)


async def healthz(service: Service) -> Any:
    async with httpx.AsyncClient() as session:
        response = await session.get(f"{service.url}/healthz")
        assert response.status_code == 200
        return response.json()


async def metrics(service: Running, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric by the values of their labels, in order of the labels' names."""
    async with httpx.AsyncClient() as session:
        response = await session.get(f"{service.url}/metrics")
        text = response.text
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"guard_{name}"
    }
