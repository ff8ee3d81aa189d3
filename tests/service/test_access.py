"""Who may call, and how often."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from guard.client import Client, check_request
from guard.errors import ConfigError, Overloaded, Unauthenticated
from guard.service.access import RateLimit
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Serve, health_of, reflection_of

HI = [("user", "Hi!")]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# who may call\n\nalice:secret-a\nbob : secret-b\nbob:secret-c\n")
    return file


@pytest.mark.parametrize("token", ["secret-a", "secret-b", "secret-c"])
async def test_a_known_token_lets_its_owner_in(serve: Serve, tokens: Path, token: str) -> None:
    """Each token of the file is good, and the log names its owner."""
    async with serve(tokens_file=tokens) as service, Client(service.target, token=token) as client:
        await client.check(HI)
        assert service.events("call")[-1]["client"] == ("alice" if token == "secret-a" else "bob")
        assert "secret" not in service.log.getvalue()


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Bearer secret"),), (("authorization", "Basic secret-a"),)]
)
async def test_without_a_known_token_only_health_answers(
    serve: Serve, tokens: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    """No token, an unknown one and one in another scheme are UNAUTHENTICATED, for streams and reflection too."""
    async with serve(tokens_file=tokens) as service:
        await health_of(service.channel).Check(HealthCheckRequest(), metadata=metadata)
        reflection = reflection_of(service.channel).ServerReflectionInfo
        for call in (
            service.stub.Check(check_request(HI), metadata=metadata),
            service.stub.CheckMany(iter([pb.CheckManyRequest()]), metadata=metadata).read(),
            reflection(iter([ServerReflectionRequest(list_services="")]), metadata=metadata).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert service.judge.lanes == []


async def test_tokens_are_read_again_when_the_file_changes(serve: Serve, tokens: Path) -> None:
    """A new file takes the place of the old one, unless it is broken or gone."""
    async with serve(tokens_file=tokens) as service, Client(service.target, token="new") as client:
        for text in ("nonsense\n", "", "alice:new\nbob:new\n"):
            replace(tokens, text)
            with pytest.raises(Unauthenticated):
                await client.check(HI)
        remove(tokens)
        async with Client(service.target, token="secret-a") as alice:
            await alice.check(HI)
        replace(tokens, "carol:new\n")
        await client.check(HI)
        assert [event["problem"] for event in service.events("tokens_kept")] == [
            f"{tokens}:1: should be name:token",
            f"{tokens}: holds no token",
            f"{tokens}:2: the token of bob is that of another name too",
            f"{tokens}: cannot be read (FileNotFoundError)",
        ]


def replace(file: Path, text: str) -> None:
    """As a careful editor does it, so that the change shows whatever the clock's resolution."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def remove(file: Path) -> None:
    file.unlink()


async def test_a_broken_file_keeps_the_service_from_starting(serve: Serve, tokens: Path) -> None:
    """There is nothing to keep to at start."""
    replace(tokens, "alice\n")
    with pytest.raises(ConfigError, match=r"tokens:1: should be name:token$"):
        async with serve(tokens_file=tokens):
            pass


async def test_each_client_has_a_rate_of_its_own(serve: Serve, tokens: Path) -> None:
    """Beyond its burst a client is refused and told when to come back; another one is not, and probes never are."""
    async with (
        serve(tokens_file=tokens, client_rate=0.01, client_burst=2) as service,
        Client(service.target, token="secret-a", retries=False) as alice,
        Client(service.target, token="secret-b", retries=False) as bob,
    ):
        await alice.check(HI)
        await alice.check(HI)
        with pytest.raises(Overloaded, match="too many requests from this client") as raised:
            await alice.check(HI)
        assert 90 < raised.value.retry_after <= 100
        await bob.check(HI)
        for _ in range(5):
            await health_of(service.channel).Check(HealthCheckRequest())


async def test_a_stream_beyond_its_rate_waits(serve: Serve) -> None:
    """Every request of a stream counts; those beyond the rate are read later, and all are answered."""
    async with serve(client_rate=100, client_burst=1) as service:
        requests = [pb.CheckManyRequest(id=str(number), request=check_request(HI)) for number in range(5)]
        answers = [answer async for answer in service.client.check_many(requests)]
        assert {answer.WhichOneof("result") for answer in answers} == {"response"}
        assert len(answers) == 5


def test_a_rate_is_kept_in_the_long_run() -> None:
    """After a burst there is one request for each interval that passes, and the waits told are exact."""
    now = 0.0
    limit = RateLimit(rate=2, burst=3, clock=lambda: now)
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert [limit.take("a") for _ in range(2)] == [0, 0.5]
    now = 100.0
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
