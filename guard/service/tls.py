"""The certificate that the server shows, and the authorities of its clients: files that are rotated while it runs."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from structlog.typing import FilteringBoundLogger

from guard.errors import ConfigError
from guard.service.files import Stamp, stamp


class Certificates:
    """A certificate chain, its key, and for mutual TLS the authorities of clients, each a PEM file.

    Before each handshake, files that changed are read again. What cannot be used is logged, and what was in force stays
    so. Raises ConfigError where the first reading fails.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None, log: FilteringBoundLogger) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._log = log
        self._stamps = self._look()
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._refreshed,  # type: ignore[arg-type]  # None is for no change
            require_client_authentication=client_ca is not None,
        )

    def _refreshed(self) -> grpc.ServerCertificateConfiguration | None:
        """None where nothing is to change. gRPC asks on its threads, never two at a time, and keeps to what it has."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        self._stamps = stamps  # from before the reading, so that a change during it is seen the next time
        try:
            fresh = self._read()
        except ConfigError as error:
            self._log.error("certificates_kept", problem=str(error))
            return None
        self._log.info("certificates_reloaded")
        return fresh

    def _look(self) -> list[Stamp]:
        return [stamp(file) for file in (self._cert, self._key, self._client_ca) if file is not None]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = _bytes(self._key), _bytes(self._cert)
        authorities = None if self._client_ca is None else _bytes(self._client_ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # says what is wrong, where gRPC merely refuses
        for file in (self._cert, self._client_ca):
            if file is not None:
                with _refused(f"{file}: is no certificate in PEM"):
                    context.load_verify_locations(file)
        with _refused(f"{self._key}: is not the key in PEM, without a password, of {self._cert}"):
            context.load_cert_chain(self._cert, self._key, password="")
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__})") from None


@contextmanager
def _refused(problem: str) -> Iterator[None]:
    """What OpenSSL refuses, or finds gone, has this problem."""
    try:
        yield
    except OSError:
        raise ConfigError(problem) from None
