"""Who may call, and how often."""

from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from guard.client import Client, Tls, check_request
from guard.errors import ConfigError, Overloaded, Unanswered, Unauthenticated
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


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """Settings of a server with a certificate for localhost."""
    issued = authority.issue_cert("localhost")
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    ca.write_bytes(authority.cert_pem.bytes())
    return {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca}


async def test_tls_serves_those_who_trust_the_authority_and_no_plain_text(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path]
) -> None:
    """A client that trusts the server's authority is served; one without TLS is not."""
    del tls["tls_client_ca"]
    async with serve(**tls) as service:
        async with Client(service.target, tls=Tls(ca=authority.cert_pem.bytes())) as client:
            await client.check(HI)
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
            await service.client.check(HI)


async def test_a_key_that_is_none_is_an_error_of_configuration(serve: Serve, tls: dict[str, Path]) -> None:
    """The message names the settings to look at."""
    with pytest.raises(ConfigError, match=r"^listen: localhost:0 cannot be listened on with tls_cert and tls_key$"):
        async with serve(tls_cert=tls["tls_cert"], tls_key=tls["tls_cert"]):
            pass


async def test_mutual_tls_serves_those_with_a_certificate_of_the_authority(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path]
) -> None:
    """A client without a certificate, or with a stranger's, is not served; the log names the one that is."""
    ca = authority.cert_pem.bytes()
    async with serve(**tls) as service:
        for issuer in (authority, trustme.CA(), None):
            pair: dict[str, bytes] = {}
            if issuer is not None:
                issued = issuer.issue_cert("client.example", common_name="chat-backend")
                pair = {"cert": issued.cert_chain_pems[0].bytes(), "key": issued.private_key_pem.bytes()}
            async with Client(service.target, tls=Tls(ca=ca, **pair), retries=False) as client:
                if issuer is authority:
                    await client.check(HI)
                    assert service.events("call")[-1]["client"] == "chat-backend"
                else:
                    with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
                        await client.check(HI)
