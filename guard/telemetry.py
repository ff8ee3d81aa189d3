"""What a running Guard tells of itself: JSON logs, Prometheus metrics and, as an extra, traces; never anyone's text."""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from guard.errors import ConfigError
from guard.types import Decision

if TYPE_CHECKING:  # the extra `otel`
    from opentelemetry.trace import Span

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_POWERS_OF_TWO = tuple(2.0**n for n in range(15))


class Metrics:
    """Everything that is counted; `registry` holds it for the exposition."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"guard_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"guard_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"guard_{name}", text, labels, buckets=buckets, registry=registry)

        self.calls = counter("calls", "Calls that ended, by method or HTTP route and status code.", "method", "code")
        self.call_seconds = histogram("call_seconds", "From the start of a call to its end.", "method")
        self.refusals = counter("refusals", "Requests without a verdict, by kind of error.", "reason")
        self.verdicts = counter("verdicts", "Verdicts, by policy and action.", "policy", "action")
        self.violations = counter(
            "violations", "Violations, by policy, category and action.", "policy", "category", "action"
        )
        self.degraded = counter(
            "degraded_verdicts", "Verdicts given by on_error as the model could not answer.", "policy"
        )
        self.tokenise_seconds = histogram("tokenise_seconds", "Tokenising one request.")
        self.queue_seconds = histogram("queue_seconds", "Waiting of one request for its batch.")
        self.model_seconds = histogram("model_seconds", "The pass of the model that served a request.")
        self.queued_requests = gauge("queued_requests", "Requests that wait for a batch.")
        self.queued_tokens = gauge("queued_tokens", "Tokens that wait for a batch.")
        self.batch_requests = histogram("batch_requests", "Requests of one pass.", buckets=_POWERS_OF_TWO)
        self.batch_tokens = histogram("batch_tokens", "Tokens of one pass.", buckets=_POWERS_OF_TWO)
        self.streams = gauge("streams", "Streams that are open.")
        self.stream_verdicts = counter(
            "stream_verdicts", "Verdicts on unfinished turns, by what they would do.", "action"
        )
        self.stream_cuts = counter("stream_cuts", "Turns that were cut while they were written, by policy.", "policy")
        self.exchanges = counter(
            "exchanges",
            "HTTP exchanges that a proxy asked about, by API, and what was said of request and reply: an action, none, "
            "unchecked, or stream where a reply did not come to its end.",
            *("api", "request", "reply"),
        )
        self.prefix_cache_tokens = counter(
            "prefix_cache_tokens", "Tokens of requests: held from before, or read by the model.", "from"
        )
        self.prefix_cache_bytes = gauge("prefix_cache_bytes", "Keys and values that are held of earlier requests.")
        self.model_failures = counter("model_failures", "Passes of the model that failed.")
        self.policy_info = gauge(
            "policy_info", "1 for each revision, live or candidate.", "policy", "revision", "stage"
        )
        self.policies_differ = gauge("policies_differ", "1 where the policies in force are not those of the directory.")
        self.policy_reloads = counter(
            "policy_reloads",
            "Readings of the policies directory, by outcome: changed, unchanged or refused.",
            "outcome",
        )
        self.candidate_verdicts = counter(
            "candidate_verdicts",
            "Verdicts by a candidate and the live revision, by who answered: live or candidate.",
            *("policy", "revision", "answered"),
        )
        self.candidate_flips = counter(
            "candidate_flips",
            "In what a candidate and the live revision differ: of verdict, a category or a rule, the action of each.",
            *("policy", "revision", "about", "live", "candidate"),
        )
        self.decision_log_written = counter("decision_log_written", "Verdicts that the decision log holds.")
        self.decision_log_dropped = counter(
            "decision_log_dropped",
            "Verdicts that the decision log should hold and does not, by reason: full, failed or stopped.",
            "reason",
        )
        self.capture_written = counter("capture_written", "Conversations that the sealed capture holds.")
        self.capture_dropped = counter(
            "capture_dropped",
            "Conversations that the sealed capture should hold and does not, by reason: full, failed or stopped.",
            "reason",
        )

    def decided(self, decision: Decision) -> None:
        """Counts one decision: its verdicts, their violations, and where its time went."""
        policy = decision.policy.name
        for verdict in decision.verdicts:
            self.verdicts.labels(policy, verdict.action.name.lower()).inc()
            if verdict.degraded:
                self.degraded.labels(policy).inc()
            for violation in verdict.violations:
                self.violations.labels(
                    policy, violation.category or violation.rule, violation.action.name.lower()
                ).inc()
        self.tokenise_seconds.observe(decision.timings.tokenise)
        self.queue_seconds.observe(decision.timings.queue)
        self.model_seconds.observe(decision.timings.model)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Made once at start and handed down; `tracing` is None where no traces are wanted."""

    log: FilteringBoundLogger
    metrics: Metrics
    tracing: "Tracing | None" = None

    @classmethod
    def start(cls, log_level: str = "info", otlp_endpoint: str | None = None, stream: TextIO | None = None) -> Self:
        """Logs go to `stream`, by default stderr. Raises ConfigError where traces are wanted without the extra."""
        tracing = Tracing(otlp_endpoint) if otlp_endpoint else None
        return cls(_open_log(log_level, stream or sys.stderr), Metrics(), tracing)


def adopt_stdlib_logging(log: FilteringBoundLogger) -> None:
    """Sends what libraries log, from warnings up, the way of our own log, for the rest of the process."""
    logging.basicConfig(handlers=[_Adopted(log)], level=logging.WARNING, force=True)


class _Adopted(logging.Handler):
    """Passes on the first line of a message before its arguments are put in: they could hold anything."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        event = str(record.msg).partition("\n")[0]
        self._log.log(record.levelno, event, logger=record.name, exc_info=record.exc_info)


def _open_log(level: str, stream: TextIO) -> FilteringBoundLogger:
    lazy = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _reduce_exception,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
    )
    log: FilteringBoundLogger = lazy.bind()  # or it would be put together anew for each event
    return log


def _reduce_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Types and places only: what an exception says of itself may quote the text that it stumbled over."""
    found = event.pop("exc_info", None)
    error = found[1] if isinstance(found, tuple) else sys.exc_info()[1] if found is True else found
    if isinstance(error, BaseException):
        event["exception"] = [
            {
                "type": f"{type(link).__module__}.{type(link).__qualname__}",
                "stack": [
                    f"{frame.filename}:{frame.lineno} {frame.name}"
                    for frame in traceback.extract_tb(link.__traceback__)
                ],
            }
            for link in _chain(error)
        ]
    return event


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Tracing:
    """Spans of calls, sent to an OpenTelemetry collector at `endpoint`. Raises ConfigError without the extra `otel`."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError("otlp_endpoint: tracing needs the extra, pip install 'guard-moderation[otel]'") from None
        exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"))
        self._provider = TracerProvider(resource=Resource.create({"service.name": "guard"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("guard")
        self._extract = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER

    def span(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
    ) -> "AbstractContextManager[Span]":
        """A span of one call, within the trace that a `traceparent` header names."""
        return self._tracer.start_as_current_span(
            name,
            context=self._extract(headers),
            kind=self._kind,
            attributes=dict(attributes),
            record_exception=False,  # what an exception says may quote a text
            set_status_on_exception=False,
        )

    def close(self) -> None:
        """Sends what is not sent yet; blocks."""
        self._provider.shutdown()
