"""Certificates: who is served, and what becomes of files that are rotated."""

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme

from guard.client import Client, Tls
from guard.errors import ConfigError, Unanswered
from tests.conftest import Serve, Service

HI = [("user", "Hi!")]
OTHER_KEY = trustme.CA().issue_cert("localhost").private_key_pem.bytes()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """Settings of a server with a certificate for localhost."""
    files = {name: tmp_path / f"{name}.pem" for name in ("tls_cert", "tls_key", "tls_client_ca")}
    write_pair(authority, files)
    replace(files["tls_client_ca"], authority.cert_pem.bytes())
    return files


def write_pair(authority: trustme.CA, files: dict[str, Path]) -> None:
    """A new certificate for localhost, and its key."""
    issued = authority.issue_cert("localhost")
    replace(files["tls_cert"], b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    replace(files["tls_key"], issued.private_key_pem.bytes())


def replace(file: Path, content: bytes) -> None:
    """So that the change shows whatever the clock's resolution."""
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


def client_of(service: Service, ca: trustme.CA, issuer: trustme.CA | None = None) -> Client:
    """Trusts `ca`; its own certificate is of the issuer."""
    pair: dict[str, bytes] = {}
    if issuer is not None:
        issued = issuer.issue_cert("client.example", common_name="chat-backend")
        pair = {"cert": issued.cert_chain_pems[0].bytes(), "key": issued.private_key_pem.bytes()}
    return Client(service.target, tls=Tls(ca=ca.cert_pem.bytes(), **pair), retries=False)


async def shown_by(service: Service) -> str:
    """The certificate that the server shows in a new handshake."""
    return await asyncio.to_thread(ssl.get_server_certificate, ("localhost", service.server.grpc_port))


async def test_tls_serves_those_who_trust_the_authority_and_no_plain_text(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path]
) -> None:
    """A client that trusts the server's authority is served; one without TLS is not."""
    del tls["tls_client_ca"]
    async with serve(**tls) as service:
        async with client_of(service, authority) as client:
            await client.check(HI)
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
            await service.client.check(HI)


@pytest.mark.parametrize(
    ("broken", "content", "problem"),
    [
        ("tls_cert", b"", "{tls_cert}: is no certificate in PEM"),
        ("tls_client_ca", b"none", "{tls_client_ca}: is no certificate in PEM"),
        ("tls_key", b"", "{tls_key}: is not the key in PEM, without a password, of {tls_cert}"),
        ("tls_key", OTHER_KEY, "{tls_key}: is not the key in PEM, without a password, of {tls_cert}"),
        ("tls_key", None, "{tls_key}: cannot be read (FileNotFoundError)"),
    ],
    ids=["no certificate", "no authority", "no key", "another key", "gone"],
)
async def test_a_broken_file_keeps_the_old_ones_in_force(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path], broken: str, content: bytes | None, problem: str
) -> None:
    """The log says once which file is broken; a server that starts with it says so, where it can be read at all."""
    told = problem.format(**tls)
    async with serve(**tls) as service:
        before = await shown_by(service)
        if content is None:
            tls[broken].unlink()
        else:
            replace(tls[broken], content)
        for _ in range(2):
            assert await shown_by(service) == before
            async with client_of(service, authority, authority) as client:
                await client.check(HI)
        assert [event["problem"] for event in service.events("certificates_kept")] == [told]
        if content is not None:
            with pytest.raises(ConfigError) as raised:
                async with serve(**tls):
                    pass
            assert str(raised.value) == told

        write_pair(authority, tls)
        replace(tls["tls_client_ca"], authority.cert_pem.bytes())
        assert await shown_by(service) != before
        async with client_of(service, authority, authority) as client:
            await client.check(HI)


async def test_a_new_certificate_is_shown_to_new_connections(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path]
) -> None:
    """Those that are there go on; a new authority of clients is asked for as well, and the old one no longer."""
    successor = trustme.CA()
    async with serve(**tls) as service, client_of(service, authority, authority) as old:
        await old.check(HI)
        before = await shown_by(service)
        write_pair(successor, tls)
        replace(tls["tls_client_ca"], successor.cert_pem.bytes())
        assert await shown_by(service) != before
        assert len(service.events("certificates_reloaded")) == 1
        await old.check(HI)
        async with client_of(service, successor, successor) as new:
            await new.check(HI)
        for ca, issuer in ((authority, successor), (successor, authority)):
            async with client_of(service, ca, issuer) as stranger:
                with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
                    await stranger.check(HI)


async def test_mutual_tls_serves_those_with_a_certificate_of_the_authority(
    serve: Serve, authority: trustme.CA, tls: dict[str, Path]
) -> None:
    """A client without a certificate, or with a stranger's, is not served; the log names the one that is."""
    async with serve(**tls) as service:
        async with client_of(service, authority, authority) as client:
            await client.check(HI)
            assert service.events("call")[-1]["client"] == "chat-backend"
        for issuer in (trustme.CA(), None):
            async with client_of(service, authority, issuer) as client:
                with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
                    await client.check(HI)
