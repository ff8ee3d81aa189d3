"""The life of a server: listening, loading, serving, draining, gone."""

import asyncio
import io
import json
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from guard.client import Client, check_request
from guard.errors import CheckpointError, ConfigError, Unanswered
from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Serve, Service, health_of, reflection_of, until
from tests.stand_ins import WordJudge

HI = [("user", "Hi!")]
NAMES = ["", "guard.v1.Moderation"]


async def health(channel: grpc.aio.Channel, name: str = "") -> str:
    answer = await health_of(channel).Check(HealthCheckRequest(service=name))
    return HealthCheckResponse.ServingStatus.Name(answer.status)


def item(id: str, text: str) -> pb.CheckManyRequest:
    return pb.CheckManyRequest(id=id, request=check_request([("user", text)]))


async def collect(answers: AsyncIterator[pb.CheckManyResponse]) -> list[pb.CheckManyResponse]:
    return [answer async for answer in answers]


async def healthz(url: str) -> tuple[int, Any]:
    async with httpx.AsyncClient() as session:
        response = await session.get(f"{url}/healthz")
        return response.status_code, response.json()


async def test_a_server_says_serving_only_once_the_model_is_there() -> None:
    """While the model is loaded the server answers, with NOT_SERVING and UNAVAILABLE; a watcher sees the change."""
    loading, judge = threading.Event(), WordJudge()

    def load() -> WordJudge:
        loading.wait()
        return judge

    settings = Settings(listen="localhost:0", http="localhost:0")
    server = Server(settings, Telemetry.start(stream=io.StringIO()), load)
    await server.listen()
    target, url = f"localhost:{server.grpc_port}", f"http://localhost:{server.http_port}"
    async with grpc.aio.insecure_channel(target) as channel, Client(target, retries=False) as client:
        watch = health_of(channel).Watch(HealthCheckRequest(service=NAMES[1]))
        loaded = asyncio.create_task(server.load())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        assert [await health(channel, name) for name in NAMES] == ["NOT_SERVING"] * 2
        assert await healthz(url) == (503, {"status": "NOT_SERVING"})
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: the model is being loaded$"):
            await client.check(HI)

        loading.set()
        await loaded
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        assert [await health(channel, name) for name in NAMES] == ["SERVING"] * 2
        assert await healthz(url) == (200, {"status": "SERVING"})
        await client.check(HI)

        stopped = asyncio.create_task(server.stop())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        await stopped
        assert judge.closed


async def test_a_stopping_server_finishes_what_it_has(serve: Serve) -> None:
    """During the drain health says NOT_SERVING, new calls are UNAVAILABLE, and those under way get their answers."""
    async with serve() as service:
        single = asyncio.create_task(service.client.check([("user", "wait")]))
        stream = asyncio.create_task(collect(service.client.check_many([item("a", "wait")])))
        await service.judge.started.acquire()
        await service.judge.started.acquire()

        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        assert await health(service.channel) == "NOT_SERVING"
        assert (await healthz(service.url))[0] == 503
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: the service is stopping$"):
            await service.client.check(HI)
        assert not stopped.done()

        service.judge.gate.set()
        assert (await single).verdict.action == pb.ACTION_ALLOW
        assert [answer.id for answer in await stream] == ["a"]
        await stopped


async def test_a_stopping_server_ends_a_stream_that_goes_on(serve: Serve) -> None:
    """What was read is answered; what was not comes back as UNAVAILABLE, and so ends the stream."""
    sent: list[str] = []

    async def requests() -> AsyncIterator[pb.CheckManyRequest]:
        for id in "abc":
            yield item(id, "wait")
            sent.append(id)
        await asyncio.Event().wait()

    async with serve(max_in_flight=1, drain_seconds=600) as service:
        answers = service.client.check_many(requests())
        first = asyncio.ensure_future(anext(answers))
        await service.judge.started.acquire()
        await until(lambda: len(sent) == 3)
        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        service.judge.gate.set()
        assert (await first).WhichOneof("result") == "response"
        error = pb.Error(code=14, message="the service is stopping")
        assert [await anext(answers) for _ in "bc"] == [pb.CheckManyResponse(id=id, error=error) for id in "bc"]
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: the service is stopping$"):
            await anext(answers)
        await stopped


@pytest.mark.parametrize("limits", [{}, {"client_rate": 1e-6, "client_burst": 1}], ids=["no limit", "a rate"])
async def test_a_stream_with_nothing_in_flight_does_not_hold_a_stopping_server(
    serve: Serve, limits: dict[str, float]
) -> None:
    """It ends at once, whether it waits for a request or for the client's rate, and so does one of reflection."""
    async with serve(drain_seconds=600, **limits) as service:
        many = service.stub.CheckMany()
        for id in "ab" if limits else "a":
            await many.write(item(id, "Hi!"))
        assert isinstance(answer := await many.read(), pb.CheckManyResponse)
        assert answer.id == "a"
        calls = [many]
        if not limits:
            reflection = reflection_of(service.channel).ServerReflectionInfo()
            await reflection.write(ServerReflectionRequest(list_services=""))
            await reflection.read()
            calls.append(reflection)
        await service.server.stop()
        for call in calls:
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "the service is stopping"


async def test_a_stopping_server_ends_the_watching_of_its_health(serve: Serve) -> None:
    """A watcher is told of the drain, sees nothing more as long as it lasts, and is then told to look elsewhere."""
    async with serve(drain_seconds=600) as service:
        watch = health_of(service.channel).Watch(HealthCheckRequest())
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        call = asyncio.create_task(service.client.check([("user", "wait")]))
        await service.judge.started.acquire()
        stopped = asyncio.create_task(service.server.stop())
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        assert await health(service.channel) == "NOT_SERVING"
        assert not watch.done()
        service.judge.gate.set()
        await call
        await stopped
        assert await watch.code() == grpc.StatusCode.UNAVAILABLE
        assert await watch.details() == "the service is stopping"


async def test_a_drain_takes_no_longer_than_it_may(serve: Serve) -> None:
    """Calls and streams that do not end are cut off."""
    async with serve(drain_seconds=0.01) as service:
        call = asyncio.create_task(service.client.check([("user", "wait")]))
        await service.judge.started.acquire()
        stream = asyncio.create_task(collect(service.client.check_many([item("a", "wait")])))
        await service.judge.started.acquire()
        await service.server.stop()
        for cut_off in (call, stream):
            with pytest.raises(Unanswered):
                await cut_off
        assert service.judge.running == 0


async def test_reflection_lists_the_services(service: Service) -> None:
    """A client that knows nothing of Guard can find out what there is to call."""
    call = reflection_of(service.channel).ServerReflectionInfo(iter([ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    assert sorted(found.name for found in answer.list_services_response.service) == [
        "envoy.service.ext_proc.v3.ExternalProcessor",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "guard.v1.Moderation",
    ]


async def test_health_knows_no_other_services(service: Service) -> None:
    """A name that is not served is NOT_FOUND, and counted as such."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await health(service.channel, "other")
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    await until(lambda: [event["code"] for event in service.events("call")] == ["NOT_FOUND"])


async def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    """So says gRPC itself."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = service.channel.unary_unary("/guard.v1.Moderation/Unknown")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"")
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["listen", "http"])
async def test_a_port_that_is_taken_is_an_error_of_configuration(serve: Serve, service: Service, name: str) -> None:
    """The message names the setting and the address."""
    port = service.server.grpc_port if name == "listen" else service.server.http_port
    with pytest.raises(ConfigError, match=f"^{name}: localhost:{port} cannot be listened on$"):
        async with serve(**{name: f"localhost:{port}"}):
            pass


async def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    """The error comes through, and nothing listens any more."""

    def load() -> WordJudge:
        raise CheckpointError("model.safetensors: has another hash")

    server = Server(Settings(listen="localhost:0", http="localhost:0"), Telemetry.start(stream=io.StringIO()), load)
    with pytest.raises(CheckpointError):
        async with server:
            pass
    async with httpx.AsyncClient() as session:
        with pytest.raises(httpx.ConnectError):
            await session.get(f"http://localhost:{server.http_port}/healthz")


PROGRAM = """
import asyncio
from guard.service.server import serve
from guard.settings import Settings
from tests.stand_ins import WordJudge
settings = Settings(listen="localhost:0", http="localhost:0", drain_seconds=600)
asyncio.run(serve(settings, lambda settings, telemetry: WordJudge()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_drains_and_the_second_ends(number: signal.Signals) -> None:
    """With a call under way, one signal leaves the process running and the second ends it; else the first will do."""
    for is_busy in (False, True):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stderr=asyncio.subprocess.PIPE)
        port = (await event(process, "listening"))["grpc"]
        await event(process, "serving")
        async with Client(f"localhost:{port}", timeout=None, retries=False) as client:
            call = asyncio.create_task(client.check([("user", "wait" if is_busy else "Hi!")]))
            if not is_busy:
                await call
            else:
                await client.check(HI)  # on the same connection, after the call that waits
            process.send_signal(number)
            await event(process, "draining")
            if not is_busy:
                assert await process.wait() == 0
            else:
                assert process.returncode is None
                process.send_signal(number)
                assert await process.wait() != 0
                with pytest.raises(Unanswered):
                    await call


async def event(process: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    """The next line of the log with that event."""
    assert process.stderr is not None
    async for line in process.stderr:
        found: dict[str, Any] = json.loads(line)
        if found["event"] == name:
            return found
    raise AssertionError(f"the process ended without {name}")
