"""What all APIs on the HTTP port have in common: who may call, how often, how much, and what is told of it."""

import asyncio
import io
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry
from tests.conftest import Serve, Service, until
from tests.stand_ins import WordJudge

SECRET = "zanzibar"
CHECK = "/v1/check"
HI = {"messages": [{"role": "user", "content": "Hi!"}]}
DRAINING = {"error": {"message": "the service is stopping", "type": "server_error", "param": None, "code": "draining"}}


def saying(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url) as session:
        yield session


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("backend:sesame\n", encoding="utf-8")
    return file


async def test_a_check_is_the_same_by_grpc_and_by_http(http: httpx.AsyncClient, service: Service) -> None:
    """Turns of guard.v1 and messages of chat APIs are the same request, answered in the message's JSON."""
    bodies: list[dict[str, Any]] = [saying("attack"), {"turns": [{"role": "ROLE_USER", "text": "attack"}]}]
    answers = [(await http.post(CHECK, json=body | {"policy": "default"})).json() for body in bodies]
    by_grpc = (await service.client.check([("user", "attack")])).verdict
    assert answers[0]["verdict"] == answers[1]["verdict"]
    assert answers[0]["verdict"]["action"] == "ACTION_BLOCK"
    assert answers[0]["verdict"]["scores"]["unsafe"] == by_grpc.scores.unsafe
    assert answers[0]["decisionId"] == "decision-1"


async def test_a_conversation_has_a_verdict_for_every_turn(http: httpx.AsyncClient) -> None:
    """From one request."""
    body = {"messages": [{"role": "user", "content": "attack"}, {"role": "assistant", "content": "No."}]}
    verdicts = (await http.post("/v1/conversation", json=body)).json()["verdicts"]
    assert [verdict["action"] for verdict in verdicts] == ["ACTION_BLOCK", "ACTION_ALLOW"]


async def test_policies_and_model_can_be_looked_at(http: httpx.AsyncClient) -> None:
    """As by ListPolicies, GetPolicy and GetModel."""
    listed = (await http.get("/v1/policies")).json()
    assert [policy["name"] for policy in listed["policies"]] == ["default", "lenient"]
    assert listed["defaultPolicy"] == "default"
    assert (await http.get("/v1/policies/lenient")).json()["policy"]["description"] == "Lets all pass."
    assert (await http.get("/v1/policies/lenint")).status_code == 404
    assert (await http.get("/v1/model")).json()["hazards"][0] == {"code": "S7", "title": "privacy"}


@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ("", "request", "is not JSON"),
        ("[" * 100_000, "request", "is not JSON"),
        ("[]", "request", "should be a JSON object"),
        ("{}", "turns", "at least one is needed"),
        ('{"messages": [], "turns": []}', "request", "should have one of messages, turns"),
        ('{"messages": []}', "messages", "at least one is needed"),
        ('{"turns": [{"role": "zanzibar"}]}', "turns[0].role", "is not as guard.v1.CheckRequest has it"),
        ('{"turns": [{"text": 5}]}', "turns.text", "is not as guard.v1.CheckRequest has it"),
        ('{"turns": [{"words": "zanzibar"}]}', "turns[0]", "has no field words"),
        ('{"turn": "zanzibar"}', "request", "has no field turn"),
        ('{"target": "zanzibar"}', "target", "is not as guard.v1.CheckRequest has it"),
        (r'{"turns": [{"text": "\ud800"}]}', "turns[0].text", "is not as guard.v1.CheckRequest has it"),
        ('{"turns": [{"role": "ROLE_USER"}], "target": 7}', "target", "should be from 0 to 0"),
        ('{"messages": [{"role": "user", "content": 7}]}', "messages[0].content", "should be a string"),
    ],
)
async def test_what_is_no_check_is_told_by_its_place(
    http: httpx.AsyncClient, body: str, param: str, problem: str
) -> None:
    """In words that quote no value."""
    answer = await http.post(CHECK, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"{param}: {problem}",
        "type": "invalid_request_error",
        "param": param,
        "code": "input_error",
    }


async def test_an_unknown_route_is_told_as_other_errors_are(http: httpx.AsyncClient) -> None:
    """And one that takes another method."""
    for path, status, message in (("/v1/chek", 404, "Not Found"), (CHECK, 405, "Method Not Allowed")):
        answer = await http.get(path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


async def test_a_token_is_asked_for_everywhere_but_at_probes(serve: Serve, tokens: Path) -> None:
    """The caller has the token's name, and is told how to show one."""
    async with serve(tokens_file=tokens) as service, httpx.AsyncClient(base_url=service.url) as http:
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic sesame"}):
            for answer in (await http.post(CHECK, json=HI, headers=headers), await http.get("/openapi.json")):
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
        assert (await http.post(CHECK, json=HI, headers={"Authorization": "Bearer sesame"})).status_code == 200
        assert (await http.post(CHECK, json=HI, headers={"X-Api-Key": "sesame"})).status_code == 200
        assert service.judge.clients == ["backend", "backend"]
        for path in ("/metrics", "/healthz", "/health"):
            assert (await http.get(path)).status_code == 200


async def test_one_rate_is_for_both_ports(serve: Serve) -> None:
    """Whoever is over it is told when to come back, in seconds."""
    async with serve(client_rate=0.5, client_burst=2) as service, httpx.AsyncClient(base_url=service.url) as http:
        assert (await http.post(CHECK, json=HI)).status_code == 200
        assert (await http.post(CHECK, json=HI)).status_code == 200
        answer = await http.post(CHECK, json=HI)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert len(set(service.judge.clients)) == 1
        assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("text", "status", "headers"),
    [
        ("full", 503, {"retry-after": "2", "retry-after-ms": "1500"}),
        ("late", 504, {}),
        ("bug", 500, {}),
    ],
)
async def test_errors_of_the_engine_are_statuses(
    http: httpx.AsyncClient, text: str, status: int, headers: dict[str, str]
) -> None:
    """A full queue says when to come back; a fault of ours says nothing of itself."""
    answer = await http.post(CHECK, json=saying(f"{SECRET} {text}"))
    assert answer.status_code == status
    assert {name: value for name, value in answer.headers.items() if name.startswith("retry")} == headers
    assert SECRET not in answer.text


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "found while reading"])
async def test_a_body_may_be_so_long(serve: Serve, is_told: bool) -> None:
    """Whether its length is announced or not."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b" " * 1000

    async with serve(max_message_bytes=5000) as service, httpx.AsyncClient(base_url=service.url) as http:
        assert (await http.post(CHECK, content=b" " * 5000)).status_code == 400
        answer = await http.post(CHECK, content=b" " * 5001 if is_told else chunks())
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "request: is larger than 5000 bytes"


async def test_a_conversation_may_have_so_many_turns(serve: Serve) -> None:
    """Whatever API it comes by."""
    turns = {"messages": [{"role": "user", "content": "Hi!"}] * 3}
    async with serve(max_turns=2) as service, httpx.AsyncClient(base_url=service.url) as http:
        for path, body in ((CHECK, turns), ("/request", {"body": turns}), ("/v1/moderations", {"input": ["a"] * 3})):
            answer = await http.post(path, json=body)
            assert answer.status_code == 400
            assert "at most 2 are taken" in answer.json()["error"]["message"]


async def test_while_the_model_is_loaded_the_apis_are_unavailable() -> None:
    """They say when to come back, and that they are is no secret of the probes."""
    loading = threading.Event()

    def load() -> WordJudge:
        loading.wait()
        return WordJudge()

    server = Server(Settings(listen="localhost:0", http="localhost:0"), Telemetry.start(stream=io.StringIO()), load)
    await server.listen()
    loaded = asyncio.create_task(server.load())
    async with httpx.AsyncClient(base_url=f"http://localhost:{server.http_port}") as http:
        for answer in (
            await http.post(CHECK, json=HI),
            await http.post("/v1/moderations", json={"input": "Hi!"}),
            await http.get("/v1/policies"),
        ):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json()["error"]["message"] == "the model is being loaded"
        loading.set()
        await loaded
        assert (await http.post(CHECK, json=HI)).status_code == 200
    await server.stop()


async def test_a_stopping_server_finishes_what_came_by_http(serve: Serve) -> None:
    """What is under way is answered, what is new is refused, and a request that has come in part is not waited for."""
    async with serve(drain_seconds=600) as service, httpx.AsyncClient(base_url=service.url) as http:
        running = asyncio.create_task(http.post(CHECK, json=saying("wait")))
        await service.judge.started.acquire()
        reader, writer = await asyncio.open_connection("localhost", service.server.http_port)
        writer.write(b"POST /v1/check HTTP/1.1\r\nHost: guard\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        await http.get("/healthz")  # after it, on a connection of its own
        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        refused = await http.post(CHECK, json=HI)
        assert (refused.status_code, refused.headers["Retry-After"], refused.json()) == (503, "1", DRAINING)
        assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
        writer.close()
        assert not stopped.done()
        service.judge.gate.set()
        assert (await running).json()["verdict"]["action"] == "ACTION_ALLOW"
        await stopped
        assert [event["code"] for event in service.events("call")] == ["503", "503", "200"]


async def test_a_drain_cuts_off_what_does_not_end(serve: Serve) -> None:
    """The client is told, and nothing goes on behind its back."""
    async with serve(drain_seconds=0.01) as service, httpx.AsyncClient(base_url=service.url) as http:
        running = asyncio.create_task(http.post(CHECK, json=saying("wait")))
        await service.judge.started.acquire()
        await service.server.stop()
        assert (await running).json() == DRAINING
        assert service.judge.running == 0


async def test_one_who_does_not_read_is_not_waited_for(serve: Serve) -> None:
    """A connection whose answers pile up is cut as the server stops."""
    async with serve(drain_seconds=600) as service:
        with socket.create_connection(("localhost", service.server.http_port)) as slow:
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await loop.sock_sendall(slow, b"GET /metrics HTTP/1.1\r\nHost: guard\r\n\r\n" * 100)
            await service.server.stop()


async def test_a_client_that_goes_away_is_worked_for_no_longer(http: httpx.AsyncClient, service: Service) -> None:
    """Its request is dropped, and counted as what it is."""
    running = asyncio.create_task(http.post(CHECK, json=saying("wait")))
    await service.judge.started.acquire()
    running.cancel()
    await until(lambda: service.judge.running == 0)
    await until(lambda: [event["code"] for event in service.events("call")] == ["499"])


async def test_every_request_is_counted_and_none_is_quoted(http: httpx.AsyncClient, service: Service) -> None:
    """By route and status, with the id of its one decision; refusals by their reason; verdicts by policy."""
    await http.post(CHECK, json=saying(f"attack {SECRET}"))
    await http.post("/v1/moderations", json={"input": [SECRET, f"{SECRET} attack"], "model": SECRET})
    for text in ("full", "bug"):
        await http.post(CHECK, json=saying(f"{SECRET} {text}"))
    await http.post("/api/v1/text/contents", json={"contents": [SECRET]}, headers={"detector-id": SECRET})
    await http.get(f"/v1/policies/{SECRET}")
    await http.post("/v1/moderations", content=SECRET)
    exposition = (await http.get("/metrics")).text
    assert SECRET not in exposition
    assert SECRET not in service.log.getvalue()
    counted = {
        (sample.name.removeprefix("guard_"), *(label for _, label in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }
    for key, value in {
        ("calls_total", "200", "POST /v1/check"): 1,
        ("calls_total", "503", "POST /v1/check"): 1,
        ("calls_total", "500", "POST /v1/check"): 1,
        ("calls_total", "200", "POST /v1/moderations"): 1,
        ("calls_total", "400", "POST /v1/moderations"): 1,
        ("calls_total", "404", "POST /api/v1/text/contents"): 1,
        ("calls_total", "404", "GET /v1/policies/{name}"): 1,
        ("call_seconds_count", "POST /v1/check"): 3,
        ("refusals_total", "Overloaded"): 1,
        ("refusals_total", "Internal"): 1,
        ("refusals_total", "NotFound"): 2,
        ("refusals_total", "InputError"): 1,
        ("verdicts_total", "block", "default"): 2,
        ("verdicts_total", "allow", "default"): 1,
    }.items():
        assert counted[key] == value, key
    told = [(event["level"], event["code"], event["decision_id"]) for event in service.events("call")]
    assert told[:4] == [
        ("debug", "200", "decision-1"),
        ("debug", "200", None),
        ("info", "503", None),
        ("error", "500", None),
    ]


async def test_with_a_certificate_http_is_tls_too(serve: Serve, tmp_path: Path) -> None:
    """Clients must then show theirs where there are authorities for it, probes aside; files are read again."""
    authority = trustme.CA()
    files = {name: tmp_path / name for name in ("tls_cert", "tls_key", "tls_client_ca")}

    def write() -> None:
        issued = authority.issue_cert("localhost")
        for name, content in (
            ("tls_cert", b"".join(blob.bytes() for blob in issued.cert_chain_pems)),
            ("tls_key", issued.private_key_pem.bytes()),
            ("tls_client_ca", authority.cert_pem.bytes()),
        ):
            files[name].with_suffix(".new").write_bytes(content)
            files[name].with_suffix(".new").replace(files[name])

    def context(issuer: trustme.CA | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
        if issuer is not None:
            issuer.issue_cert("client.example", common_name="chat-backend").configure_cert(context)
        return context

    write()
    async with serve(**files) as service:
        port = service.server.http_port
        url = f"https://localhost:{port}"
        async with httpx.AsyncClient(verify=context()) as probe:
            assert (await probe.get(f"{url}/healthz")).status_code == 200
            refused = await probe.post(f"{url}{CHECK}", json=HI)
        assert (refused.status_code, refused.json()["error"]["message"]) == (401, "a client certificate is needed")
        async with httpx.AsyncClient(verify=context(authority)) as http:
            assert (await http.post(f"{url}{CHECK}", json=HI)).status_code == 200
        assert service.judge.clients == ["chat-backend"]
        async with httpx.AsyncClient(verify=context(trustme.CA())) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.post(f"{url}{CHECK}", json=HI)
        async with httpx.AsyncClient() as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get(f"http://localhost:{port}/healthz")
        before = await asyncio.to_thread(ssl.get_server_certificate, ("localhost", port))
        write()
        assert await asyncio.to_thread(ssl.get_server_certificate, ("localhost", port)) != before
