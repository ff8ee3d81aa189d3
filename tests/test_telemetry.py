"""What is logged, counted and traced, and what is not."""

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from guard.client import check_request
from guard.errors import InputError, Overloaded, Unanswered
from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry, adopt_stdlib_logging
from guard.v1 import moderation_pb2 as pb
from guard.v1.moderation_pb2_grpc import ModerationStub
from tests.conftest import Service
from tests.stand_ins import WordJudge

SECRET = "zanzibar"


async def exposition(service: Service) -> str:
    async with httpx.AsyncClient() as session:
        response = await session.get(f"{service.url}/metrics")
        assert response.status_code == 200
        return response.text


async def speak_of_secrets(service: Service) -> None:
    """A call of every kind and for every outcome, each with a word that must not leave."""
    client = service.client
    await client.check([("user", f"attack {SECRET}")], conversation_id=SECRET, metadata={SECRET: SECRET})
    await client.check_conversation([("user", "broken"), ("agent", f"{SECRET} broken")])
    for text, kind in [(f"{SECRET} full", Overloaded), (f"{SECRET} bug", Unanswered)]:
        with pytest.raises(kind):
            await client.check([("user", text)])
    with pytest.raises(InputError):
        await client.check([("user", SECRET)], target=7)
    requests = [
        pb.CheckManyRequest(id=f"{SECRET}{number}", request=check_request([("user", f"{SECRET} {text}")]))
        for number, text in enumerate(["Hi!", "attack", "bug"])
    ]
    assert len([answer async for answer in client.check_many(requests)]) == 3


async def test_neither_logs_nor_metrics_hold_a_text(service: Service) -> None:
    """At the most talkative level, and whatever goes wrong, nothing of a conversation gets out."""
    await speak_of_secrets(service)
    assert SECRET not in await exposition(service)
    assert SECRET not in service.log.getvalue()
    assert len(service.events("call")) == 6


async def test_what_the_service_did_is_counted(service: Service) -> None:
    """Calls by code, verdicts by action, violations by category, and refusals by reason, items of streams included."""
    await speak_of_secrets(service)
    counted = {
        (sample.name.removeprefix("guard_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(await exposition(service))
        for sample in family.samples
        if sample.name.endswith(("_total", "seconds_count"))
    }
    service_name = "guard.v1.Moderation"
    expected = {
        ("calls_total", "OK", f"{service_name}/Check"): 1,
        ("calls_total", "RESOURCE_EXHAUSTED", f"{service_name}/Check"): 1,
        ("calls_total", "INTERNAL", f"{service_name}/Check"): 1,
        ("calls_total", "INVALID_ARGUMENT", f"{service_name}/Check"): 1,
        ("calls_total", "OK", f"{service_name}/CheckMany"): 1,
        ("call_seconds_count", f"{service_name}/Check"): 4,
        ("verdicts_total", "block", "default"): 4,
        ("verdicts_total", "allow", "default"): 1,
        ("degraded_verdicts_total", "default"): 2,
        ("violations_total", "block", "unsafe", "default"): 2,
        ("refusals_total", "Overloaded"): 1,
        ("refusals_total", "Internal"): 2,
        ("refusals_total", "InputError"): 1,
        ("model_seconds_count",): 4,
    }
    assert {name: value for name, value in counted.items() if name in expected} == expected


async def test_a_call_that_went_well_is_logged_for_those_who_debug(service: Service) -> None:
    """Its line has who asked what, how it went, and the key to the decision."""
    answer = await service.client.check([("user", "Hi!")])
    (line,) = service.events("call")
    assert (line["level"], line["method"], line["code"]) == ("debug", "guard.v1.Moderation/Check", "OK")
    assert line["client"] in ("ipv4:127.0.0.1", "ipv6:[::1]")
    assert line["decision_id"] == answer.decision_id
    assert line["ms"] > 0


def test_an_exception_is_logged_by_type_and_place() -> None:
    """What it says of itself stays unsaid, down to its causes."""
    stream = io.StringIO()
    telemetry = Telemetry.start(stream=stream)
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error
    except RuntimeError:
        telemetry.log.exception("failed", batch=3)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["batch"]) == ("failed", "error", 3)
    assert [link["type"] for link in line["exception"]] == ["builtins.RuntimeError", "builtins.ValueError"]
    assert all("test_telemetry.py" in link["stack"][0] for link in line["exception"])
    assert SECRET not in stream.getvalue()


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, which is afterwards as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # or adopting would close those of the test runner
    yield root
    root.handlers, root.level = handlers, level


def test_what_libraries_log_goes_the_same_way(root_logger: logging.Logger) -> None:
    """Warnings and worse come as lines of JSON, without the arguments, which may hold anything."""
    stream = io.StringIO()
    adopt_stdlib_logging(Telemetry.start(stream=stream).log)
    logging.getLogger("library").info("not worth a line")
    logging.getLogger("library").warning("took %s\nlong", SECRET)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["logger"]) == ("took %s", "warning", "library")


class Collector(TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def Export(
        self, request: ExportTraceServiceRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    """A collector and where it listens."""
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call] # generated without types
    port = server.add_insecure_port("localhost:0")
    await server.start()
    yield collector, f"http://localhost:{port}"
    await server.stop(None)


async def test_a_call_is_a_span_of_its_callers_trace(collector: tuple[Collector, str]) -> None:
    """The span has the trace of the call's traceparent header, method and code, and no text."""
    spans, endpoint = collector
    telemetry = Telemetry.start(otlp_endpoint=endpoint, stream=io.StringIO())
    settings = Settings(listen="localhost:0", http="localhost:0")
    headers = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"),)
    async with (
        Server(settings, telemetry, WordJudge) as server,
        grpc.aio.insecure_channel(f"localhost:{server.grpc_port}") as channel,
    ):
        check = ModerationStub(channel).Check
        await check(check_request([("user", SECRET)]), metadata=headers)
        with pytest.raises(grpc.aio.AioRpcError):
            await check(check_request([("user", f"{SECRET} bug")]), metadata=headers)
    assert telemetry.tracing is not None
    await asyncio.to_thread(telemetry.tracing.close)
    assert [span.name for span in spans.spans] == ["guard.v1.Moderation/Check"] * 2
    assert {span.trace_id.hex() for span in spans.spans} == {"a" * 32}
    assert {span.parent_span_id.hex() for span in spans.spans} == {"b" * 16}
    codes = [{entry.key: entry.value.int_value for entry in span.attributes} for span in spans.spans]
    assert [code["rpc.grpc.status_code"] for code in codes] == [0, 13]
    assert SECRET not in str(spans.spans)
