"""What the tests of the service and of its clients share: a real server, on loopback, in front of a stand-in engine."""

import asyncio
import io
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from guard.client import Client
from guard.policy.store import PolicyStore
from guard.service.judge import Judge
from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.v1.moderation_pb2_grpc import ModerationStub
from tests.stand_ins import WordJudge

if TYPE_CHECKING:
    from pathlib import Path

    from guard.model.kinds import Classifier
    from guard.v1.moderation_pb2_grpc import ModerationAsyncStub
    from tests.model.llama_guards import Shape


# A shell has what it starts in the background ignore Ctrl-C, which whatever that starts inherits. Not so the commands
# that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Running:
    """A server that is up, with what is needed to talk to it."""

    server: Server
    log: io.StringIO
    client: Client
    channel: grpc.aio.Channel

    @property
    def stub(self) -> "ModerationAsyncStub":
        stub: ModerationAsyncStub = ModerationStub(self.channel)
        return stub

    @property
    def target(self) -> str:
        return f"localhost:{self.server.grpc_port}"

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server.http_port}"

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log for events of that name."""
        lines = (json.loads(line) for line in self.log.getvalue().splitlines())
        return [line for line in lines if line["event"] == name]


@dataclass
class Service(Running):
    """One in front of the stand-in engine, to look behind it."""

    judge: WordJudge


Serve = Callable[..., AbstractAsyncContextManager[Service]]


def health_of(channel: grpc.aio.Channel) -> Any:
    """The stub of the health service; its types know nothing of grpc.aio."""
    return HealthStub(channel)


def reflection_of(channel: grpc.aio.Channel) -> Any:
    """The stub of the reflection service; its types know nothing of grpc.aio."""
    return ServerReflectionStub(cast("grpc.Channel", channel))


async def until(condition: Callable[[], bool]) -> None:
    """Lets others run until the condition holds; a test that waits in vain ends by its timeout."""
    while not condition():  # noqa: ASYNC110 # what is waited for has no event
        await asyncio.sleep(0.001)


@asynccontextmanager
async def run_server(
    load: Callable[[Settings, Telemetry], Judge], clock: Callable[[], float] = time.time, **options: Any
) -> AsyncIterator[Running]:
    settings = Settings.load({"listen": "localhost:0", "http": "localhost:0", "drain_seconds": 5} | options, {})
    log = io.StringIO()
    telemetry = Telemetry.start("debug", stream=log)
    async with Server(settings, telemetry, lambda: load(settings, telemetry), clock) as server:
        target = f"localhost:{server.grpc_port}"
        async with Client(target, timeout=120, retries=False) as client, grpc.aio.insecure_channel(target) as channel:
            yield Running(server, log, client, channel)


@asynccontextmanager
async def _serve(**options: Any) -> AsyncIterator[Service]:
    judge = WordJudge()

    def load(settings: Settings, _: Telemetry) -> Judge:
        if "policies" in options:
            judge.policies = PolicyStore.load(settings.policies, settings.default_policy)
        return judge

    async with run_server(load, **options) as running:
        yield Service(**vars(running), judge=judge)


@pytest.fixture
def serve() -> Serve:
    """Makes a service with settings of one's own."""
    return _serve


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    """A service with the settings that it has by default."""
    async with _serve() as service:
        yield service


@pytest.fixture(scope="session")
def classifier() -> "Classifier":
    """The embedded model, loaded once, in the type whose scores are exact."""
    from guard.model.turn_classifier import TurnClassifier  # takes torch with it, which few tests need

    settings = Settings(device="cpu", dtype="float32")
    return TurnClassifier(settings.model, settings.device, settings.dtype, settings.threads)


@pytest.fixture(scope="session")
def llama_guards(tmp_path_factory: pytest.TempPathFactory) -> "Mapping[Shape, Path]":
    """Directories of small Llama Guard checkpoints, each made when it is first asked for."""
    from tests.model.llama_guards import make

    class Made(dict["Shape", "Path"]):
        def __missing__(self, shape: "Shape") -> "Path":
            lead = "\n\n" if shape == "1b" else ""
            self[shape] = make(tmp_path_factory.mktemp("checkpoints") / f"llama-guard-{shape}", shape, lead=lead)
            return self[shape]

    return Made()


@asynccontextmanager
async def serve_classifier(classifier: "Classifier", **options: Any) -> AsyncIterator[Running]:
    """A server with the real engine in front of that model, and the shipped policies.

    A model that can keeps what it has read. Its batches are small, so that there is little to warm up, and its queue
    is as good as endless.
    """

    def load(settings: Settings, telemetry: Telemetry) -> Judge:
        from guard.engine.moderator import Moderator
        from guard.engine.prefix_cache import Paged, PrefixCache

        policies = PolicyStore.load(settings.policies, settings.default_policy)
        cache = PrefixCache(classifier, 2**26, telemetry.metrics) if isinstance(classifier, Paged) else None
        return Moderator(
            classifier, policies, telemetry, max_batch_tokens=16, max_queue_seconds=3600, prefix_cache=cache
        )

    async with run_server(load, **options) as running:
        yield running


@pytest.fixture
async def embedded(classifier: "Classifier") -> AsyncIterator[Running]:
    """A server with the embedded model."""
    async with serve_classifier(classifier) as running:
        yield running
