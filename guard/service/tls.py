"""The certificate that the server shows, and the authorities of its clients: files that are rotated while it runs."""

import ssl
import threading
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
        self._reading = threading.Lock()  # handshakes of gRPC are on its threads
        self._stamps = self._look()
        self._grpc, self._http = self._read()
        self._shown = self._grpc  # by gRPC, as far as it was told
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._grpc,
            self._refreshed,  # type: ignore[arg-type]  # None is for no change
            require_client_authentication=client_ca is not None,
        )
        self.context = self._http
        """For the HTTP port, which asks clients for a certificate and takes those that have none."""

    def _refreshed(self) -> grpc.ServerCertificateConfiguration | None:
        """None where nothing is to change. gRPC asks never twice at a time, and keeps to what it has."""
        self._refresh()
        if self._shown is self._grpc:
            return None
        self._shown = self._grpc
        return self._grpc

    def _refresh(self) -> None:
        with self._reading:
            stamps = self._look()
            if stamps == self._stamps:
                return
            self._stamps = stamps  # from before the reading, so that a change during it is seen the next time
            try:
                self._grpc, self._http = self._read()
            except ConfigError as error:
                self._log.error("certificates_kept", problem=str(error))
            else:
                self._log.info("certificates_reloaded")

    def _greet(self, handshake: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        """At the beginning of a handshake of HTTP, the newest files are put in."""
        self._refresh()
        handshake.context = self._http

    def _look(self) -> list[Stamp]:
        return [stamp(file) for file in (self._cert, self._key, self._client_ca) if file is not None]

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, ssl.SSLContext]:
        """For gRPC and for HTTP."""
        pair = _bytes(self._key), _bytes(self._cert)
        authorities = None if self._client_ca is None else _bytes(self._client_ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # says what is wrong, where gRPC merely refuses
        with _refused(f"{self._cert}: is no certificate in PEM"):
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self._cert)
        if self._client_ca is not None:
            with _refused(f"{self._client_ca}: is no certificate in PEM"):
                context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        with _refused(f"{self._key}: is not the key in PEM, without a password, of {self._cert}"):
            context.load_cert_chain(self._cert, self._key, password="")
        context.sni_callback = self._greet
        return grpc.ssl_server_certificate_configuration([pair], authorities), context


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
