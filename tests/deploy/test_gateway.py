"""The Envoy in front of many Guards, for real: it brings each conversation to one of them, and copes when one goes."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
import yaml

from guard.client import check_request
from guard.service.sidecar import Sidecar, bootstrap, running
from guard.telemetry import Telemetry
from guard.v1 import admin_pb2
from guard.v1.admin_pb2_grpc import AdminStub
from guard.v1.moderation_pb2_grpc import ModerationStub
from tests.conftest import Serve, Service
from tests.deploy.chart import VALUES, of_kind, rendered

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(ENVOY is None, reason="needs Envoy")

REQUEST = check_request([("user", "Hi!")])


def config_of(values: str) -> str:
    text: str = of_kind("ConfigMap", rendered(VALUES[values]), "guard-gateway")["data"]["envoy.yaml"]
    return text


@pytest.mark.parametrize("values", ["gateway", "gateway with TLS"])
def test_envoy_takes_the_configuration(values: str, tmp_path: Path) -> None:
    """And knows nothing in it that it would rather not."""
    authority = trustme.CA()
    certificate = authority.issue_cert("guard.moderation.svc")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    file = tmp_path / "envoy.yaml"
    file.write_text(config_of(values).replace("/etc/guard/tls", str(tmp_path)), encoding="utf-8")
    assert ENVOY is not None
    command = [ENVOY, "--mode", "validate", "--log-level", "warning", "--config-path", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.replace("\n", "")) == (0, "")


def before(services: list[Service]) -> dict[str, Any]:
    """The chart's configuration with these in the place of what DNS would tell, on ports that are free."""
    config: dict[str, Any] = yaml.safe_load(config_of("gateway"))
    for listener in config["static_resources"]["listeners"]:
        listener["address"]["socket_address"] |= {"address": "127.0.0.1", "port_value": 0}
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    (replicas,) = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"]
    replicas["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each.server.grpc_port}}}}
        for each in services
    ]
    return config


@asynccontextmanager
async def gateway(services: list[Service], config: dict[str, Any] | None = None) -> AsyncIterator[grpc.aio.Channel]:
    telemetry = Telemetry.start(stream=services[0].log)
    async with (
        running(config or before(services), telemetry.log, 1),
        grpc.aio.insecure_channel(address_of(services)) as channel,
    ):
        yield channel


def address_of(services: list[Service]) -> str:
    """Where the gateway before them listens."""
    (event,) = services[0].events("envoy_listening")
    return f"127.0.0.1:{event['port']}"


async def answered_by(services: list[Service], channel: grpc.aio.Channel, conversation: str) -> int:
    """The index of the one that a call comes to."""
    counts = [len(each.judge.lanes) for each in services]
    metadata = (("x-conversation-id", conversation),) if conversation else ()
    await ModerationStub(channel).Check(REQUEST, metadata=metadata, timeout=10)
    (found,) = (index for index, each in enumerate(services) if len(each.judge.lanes) > counts[index])
    return found


async def found(services: list[Service], channel: grpc.aio.Channel) -> None:
    """Returns once Envoy has seen that each is healthy."""
    while not all(each.judge.lanes for each in services):
        await ModerationStub(channel).Check(REQUEST, timeout=10)
        await asyncio.sleep(0.01)


async def test_a_conversation_stays_where_it_is_known(serve: Serve) -> None:
    """Where its replica goes it moves; of the others most stay, though the ring is drawn anew."""
    conversations = [f"conversation-{number}" for number in range(48)]
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(serve()) for _ in range(2)]
        async with serve() as leaving:
            services.append(leaving)
            channel = await stack.enter_async_context(gateway(services))
            await found(services, channel)
            homes = {each: await answered_by(services, channel, each) for each in conversations}
            assert set(homes.values()) == {0, 1, 2}
            for _ in range(2):
                assert homes == {each: await answered_by(services, channel, each) for each in conversations}
            assert len({await answered_by(services, channel, "") for _ in range(32)}) == 3
        after = {each: await answered_by(services, channel, each) for each in conversations}
        others = [each for each, home in homes.items() if home != 2]
        assert sum(after[each] == homes[each] for each in others) > len(others) / 2
        assert {home for each, home in after.items() if homes[each] == 2} <= {0, 1}


async def test_one_that_is_full_is_helped_out(serve: Serve) -> None:
    """A refused call is tried with the other replica, and once more with the first, before its caller is told."""
    async with serve() as one, serve() as other:
        services = [one, other]
        async with gateway(services) as channel:
            await found(services, channel)
            for each in services:
                each.judge.lanes.clear()
            request = check_request([("user", "busy once")])
            await ModerationStub(channel).Check(request, timeout=10)
            assert sorted(len(each.judge.lanes) for each in services) == [1, 2]  # each is busy for its first


async def test_a_gateway_that_is_to_stop_says_so_first(serve: Serve) -> None:
    """What its preStop asks Envoy for makes it unready, while calls are answered still."""
    async with serve() as service:
        config = before([service])
        ports = [free_port(), free_port()]
        config["admin"]["address"]["socket_address"]["port_value"] = ports[0]
        config["static_resources"]["listeners"][1]["address"]["socket_address"]["port_value"] = ports[1]
        config["static_resources"]["clusters"][1] = yaml.safe_load(
            json.dumps(config["static_resources"]["clusters"][1]).replace("9901", str(ports[0]))
        )
        async with gateway([service], config) as channel, httpx.AsyncClient() as http:
            watch, pre_stop = f"http://127.0.0.1:{ports[1]}", pre_stop_of("gateway")
            assert (await http.get(f"{watch}/ready")).status_code == 200
            assert "envoy_cluster_upstream_rq" in (await http.get(f"{watch}/metrics")).text
            assert (await http.get(f"{watch}/quitquitquit")).status_code == 404
            script = pre_stop.replace("9901", str(ports[0])).replace("time.sleep(20)", "")
            stopping = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
            assert await stopping.wait() == 0
            assert (await http.get(f"{watch}/ready")).status_code == 503
            assert (await http.get(f"{watch}/metrics")).status_code == 200
            await ModerationStub(channel).Check(REQUEST, timeout=10)


def pre_stop_of(values: str) -> str:
    pod = of_kind("Deployment", rendered(VALUES[values]), "guard-gateway")["spec"]["template"]["spec"]
    python, option, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, option) == ("python", "-c")
    return str(script)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def test_operators_ask_each_replica_by_itself(serve: Serve, tmp_path: Path) -> None:
    """What one of them stages the others know nothing of."""
    tokens = tmp_path / "tokens"
    tokens.write_text("operator:sesame\n", encoding="utf-8")
    async with serve(admin_tokens_file=tokens) as service, gateway([service]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await AdminStub(channel).ListRollouts(admin_pb2.ListRolloutsRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_replica_that_loads_is_passed_over(serve: Serve) -> None:
    """The others answer in its place."""
    async with serve() as one, serve() as loading:
        await loading.server._set_health(False)
        async with gateway([one, loading]) as channel:
            assert {await answered_by([one, loading], channel, str(number)) for number in range(8)} == {0}
            await loading.server._set_health(True)
            await found([one, loading], channel)


class Backend(BaseHTTPRequestHandler):
    """One that says the same to everybody."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        said = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}}]}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """To nobody."""


@contextmanager
def backend() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Backend) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


async def test_a_sidecar_brings_a_conversation_to_where_it_is_known(serve: Serve) -> None:
    """Its exchanges go through the gateway to the replica that others' calls of the conversation go to."""
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(serve()) for _ in range(3)]
        channel = await stack.enter_async_context(gateway(services))
        await found(services, channel)
        sidecar = Sidecar(upstream=stack.enter_context(backend()), bind="127.0.0.1:0", admin="127.0.0.1:0")
        config = bootstrap(sidecar, address_of(services), False, 2**20)
        log = Telemetry.start(stream=services[0].log).log
        envoy = await stack.enter_async_context(running(config, log, 1))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{envoy.port}"))

        async def judged_by(conversation: str) -> list[int]:
            """How much of an exchange each of the replicas judged."""
            counts = [len(each.judge.lanes) for each in services]
            asked = {"messages": [{"role": "user", "content": "Hi!"}]}
            answer = await http.post("/v1/chat/completions", json=asked, headers={"x-conversation-id": conversation})
            assert (answer.status_code, answer.headers["x-guard-reply"]) == (200, "allow")
            return [len(each.judge.lanes) - count for each, count in zip(services, counts, strict=True)]

        homes = {each: await answered_by(services, channel, each) for each in map(str, range(12))}
        for conversation, home in homes.items():
            assert (await judged_by(conversation))[home] == 2  # the request and the reply
