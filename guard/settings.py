"""Everything an operator can set: one frozen object, made once at start and handed down."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from guard.errors import ConfigError

_PACKAGE = Path(__file__).parent
_PREFIX = "GUARD_"
_CONFIG = "GUARD_CONFIG"
_NOT_OURS = {_CONFIG, "GUARD_SERVER", "GUARD_TOKEN", "GUARD_ADMIN_TOKEN"}  # names the file; read by other commands
# What Kubernetes puts into the environment of every pod beside a Service called guard, or guard-something.
_SERVICE_LINK = re.compile(r"GUARD_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("should be HOST:PORT")
    return value


def _shipped_policies() -> Path:
    """Within the package where it was installed, beside it in a checkout."""
    installed = _PACKAGE / "policies"
    return installed if installed.is_dir() else _PACKAGE.parent / "policies"


_Given = Iterator[tuple[str, str, object]]  # where it came from, name of the setting, value
Address = Annotated[str, AfterValidator(_address)]


class Settings(BaseModel):
    """What `guard serve` runs with. Paths are relative to the working directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    listen: Address = "0.0.0.0:50051"
    """Where gRPC is served."""
    http: Address = "0.0.0.0:9090"
    """Where HTTP is served: /metrics and /healthz, and the moderation APIs as JSON."""
    policies: DirectoryPath = _shipped_policies()
    """Directory of policies, which are read again on change; by default those that come with Guard."""
    policies_key: FilePath | None = None
    """Public key, PEM, that the policies must be signed by, see `guard policy sign`; needs the extra `crypto`."""
    policies_poll_seconds: PositiveFloat = 5.0
    """How often to look for changes of policies that nobody tells of, as on network file systems."""
    model: DirectoryPath = _PACKAGE / "model" / "default"
    """Directory of a model; by default the embedded one."""
    endpoint: Annotated[str, Field(pattern="^https?://")] | None = None
    """Server of an OpenAI-compatible API, http://HOST:PORT/v1, that computes a Llama Guard checkpoint in place of this
    process, which then takes only the tokenizer from `model`; openai+http://HOST:PORT/v1?tokenizer=DIR is both."""
    endpoint_model: str | None = None
    """The model's name there; by default the only one it has."""
    ask: Literal["together", "each"] = "together"
    """How a Llama Guard checkpoint is asked for categories: together, in one pass, where they share the probability
    that a turn is unsafe; or each by itself, in a pass for each, as a probability of its own."""
    default_policy: str = "default"
    """The policy of requests that name none."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes the first CUDA device there is."""
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    """Type of the weights in memory; auto takes the fastest for the device."""
    threads: NonNegativeInt = 0
    """Processor threads of the model; 0 takes all."""
    max_batch_tokens: PositiveInt | None = None
    """Tokens of one pass of the model; by default 512 on a CPU (an audit: 1,024) and 4,096 on CUDA."""
    max_queue_seconds: PositiveFloat = 2.0
    """How long the queue may be, at the speed measured; beyond it online calls are refused and bulk work waits."""

    prefix_cache_mb: NonNegativeInt = 256
    """MiB for what the model has read, so that a conversation that goes on costs its new tokens; 0 keeps nothing."""
    prefix_cache_shared: bool = False
    """Whether clients share it; how long an answer takes then tells what others have asked."""

    max_message_bytes: PositiveInt = 4 * 2**20
    """Size of one message on the wire."""
    max_turns: PositiveInt = 1000
    """Turns of one conversation."""
    stream_tokens: PositiveInt = 32
    """Tokens, about, after which an unfinished turn is judged anew, where no sentence ends before."""
    stream_wait_seconds: PositiveFloat = 0.25
    """How long a piece of an unfinished turn waits for more before it is judged."""
    stream_idle_seconds: PositiveFloat = 60.0
    """How long nothing may come on a stream before it is ended."""
    max_in_flight: PositiveInt = 256
    """Requests of one CheckMany stream that are read and not yet answered."""

    tls_cert: FilePath | None = None
    """Certificate chain of the server, PEM, for both ports; plain text is served without it. These files are read again
    on change."""
    tls_key: FilePath | None = None
    """Private key of the certificate, PEM."""
    tls_client_ca: FilePath | None = None
    """Authorities, PEM, one of which must have signed a client's certificate."""
    tokens_file: FilePath | None = None
    """API tokens, a `name:token` a line; anyone may call without it."""
    admin_tokens_file: FilePath | None = None
    """The same for the service by which policies are rolled out; it is not there without it."""
    client_rate: NonNegativeFloat = 0.0
    """Requests a second that each client may make in the long run; 0 sets no limit."""
    client_burst: PositiveInt = 100
    """Requests that a client may make at once after a pause."""

    decision_log: Path | None = None
    """File that gets a JSON line for every verdict, without its text; - is standard output."""
    decision_log_salt: FilePath | None = None
    """File whose content salts the hashes in the decision log; without it those of each start are salted anew."""
    decision_log_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the decisions that the decision log gets."""
    decision_log_bytes: PositiveInt = 100 * 2**20
    """Size from which on a file of the decision log is rotated."""
    decision_log_files: PositiveInt = 10
    """Rotated files of the decision log that are kept, FILE.1 being the newest."""

    capture: Path | None = None
    """File that gets the judged conversations themselves, sealed to `capture_key`; rotated as the decision log is."""
    capture_key: FilePath | None = None
    """X25519 public key, PEM, whose owner alone can read them, by `guard unseal`; needs the extra `crypto`."""
    capture_from: Literal["allow", "flag", "redirect", "block"] = "block"
    """The mildest action whose conversations are captured."""
    capture_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of those conversations that are captured."""

    drain_seconds: PositiveFloat = 20.0
    """How long a stopping server waits for calls to end."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The mildest events to log; debug logs a line for every call."""
    otlp_endpoint: str | None = None
    """Collector of OpenTelemetry traces, http://HOST:PORT; needs the extra `otel`."""

    @model_validator(mode="before")
    @classmethod
    def _model_is_remote(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A URL in place of a model says where it is, where its tokenizer is, and what it is called there."""
        model = str(given.get("model", ""))
        if not model.startswith("openai+"):
            return given
        url = urlsplit(model.removeprefix("openai+"))
        named = dict(parse_qsl(url.query))
        if url.scheme not in ("http", "https") or not named.get("tokenizer") or named.keys() - {"tokenizer", "model"}:
            raise ValueError("model: should be openai+http://HOST:PORT/v1?tokenizer=DIR, with &model=NAME or without")
        remote = {"endpoint": url._replace(query="").geturl(), "endpoint_model": named.get("model")}
        return given | {"model": named["tokenizer"]} | remote

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _capture_is_sealed(self) -> Self:
        if (self.capture is None) != (self.capture_key is None):
            raise ValueError("capture and capture_key go together")
        return self

    @classmethod
    def load(cls, flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None) -> Self:
        """Flags before GUARD_* variables before a TOML file (`file`, or what GUARD_CONFIG names) before the defaults.

        A flag that is None was not given. Raises ConfigError with one problem a line, each naming where the value came
        from; names nobody knows are problems.
        """
        if file is None and environ.get(_CONFIG):
            file = Path(environ[_CONFIG])
        given = [*_from_file(file), *_from_environment(environ), *_from_flags(flags)]
        sources = {name: source for source, name, _ in given}
        problems = [f"{source}: {_unknown(name)}" for source, name, _ in given if name not in cls.model_fields]
        values = {name: value for _, name, value in given if name in cls.model_fields}
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problems += [_describe(problem, sources) for problem in error.errors(include_url=False)]
        if problems:
            raise ConfigError("\n".join(problems))
        return settings


def _from_flags(flags: Mapping[str, object]) -> _Given:
    for name, value in flags.items():
        if value is not None:
            yield f"--{name.replace('_', '-')}", name, value


def _from_environment(environ: Mapping[str, str]) -> _Given:
    for variable, value in environ.items():
        if variable.startswith(_PREFIX) and variable not in _NOT_OURS and not _SERVICE_LINK.fullmatch(variable):
            yield variable, variable.removeprefix(_PREFIX).lower(), value


def _from_file(file: Path | None) -> _Given:
    if file is None:
        return
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from None
    for name, value in table.items():
        yield f"{file}: {name}", name, value


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"unknown setting, did you mean {close[0]}?" if close else "unknown setting"


def _describe(problem: ErrorDetails, sources: Mapping[str, str]) -> str:
    text = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # between settings; the text names them
        return text
    return f"{sources[str(problem['loc'][0])]}: {text}, found {problem['input']!r}"
