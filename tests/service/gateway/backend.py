"""A generation backend that says what it is told to, by each API, cut into pieces anywhere; and Envoy before it."""

import asyncio
import contextlib
import itertools
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from guard.service.sidecar import Sidecar, bootstrap, running

Json = dict[str, Any]
Sent = tuple[bytes, bytes]  # an event and what ends it


@dataclass
class Backend:
    """`texts` are its replies, choice by choice. `cut` puts its events into pieces; `pause` is between them."""

    texts: list[str] = field(default_factory=lambda: ["Knead, rest, and bake it 🧈 well."])
    cut: Callable[[bytes], list[bytes]] = lambda raw: [raw[at : at + 1000] for at in range(0, len(raw), 1000)]
    pause: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[Json] = field(default_factory=list)
    got: list[dict[str, str]] = field(default_factory=list)
    sent: bytes = b""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    finished: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def app(self) -> Starlette:
        routes = [Route(path, self._answering(api), methods=["POST"]) for path, api in APIS.items()]
        routes.append(Route("/v1/models", self._models))
        routes.append(Route("/v1/other", self._models, methods=["POST"]))
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        self.got.append(dict(request.headers))
        return JSONResponse({"data": []})

    def _answering(self, api: "Dialect") -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            self.got.append(dict(request.headers))
            body = json.loads(await request.body())
            self.asked.append(body)
            if not body.get("stream", api.streams):
                self.sent = json.dumps(api.whole(self.texts)).encode()
                return Response(self.sent, media_type="application/json", headers=self.headers)
            self.sent = b"".join(api.events(self.texts))
            return StreamingResponse(self._pieces(), media_type=api.media_type, headers=self.headers)

        return answer

    async def _pieces(self) -> AsyncIterator[bytes]:
        for piece in self.cut(self.sent):
            await self.gate.wait()
            yield piece
            await asyncio.sleep(self.pause)
        self.finished += 1


def anywhere(seed: int) -> Callable[[bytes], list[bytes]]:
    """Cuts at bytes by chance."""

    def cut(raw: bytes) -> list[bytes]:
        chance = random.Random(seed)
        places = sorted({0, len(raw), *chance.choices(range(len(raw)), k=chance.randint(1, 40))})
        return [raw[start:end] for start, end in itertools.pairwise(places)]

    return cut


def words(text: str) -> list[str]:
    return [f"{word} " for word in text.split(" ")]


class Dialect:
    """An API from the side of the backend."""

    media_type = "text/event-stream"
    streams = False

    def whole(self, texts: list[str]) -> Json:
        raise NotImplementedError

    def events(self, texts: list[str]) -> Iterator[bytes]:
        raise NotImplementedError


def sse(document: Json, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(document).encode() + b"\n\n"


class Chat(Dialect):
    def whole(self, texts: list[str]) -> Json:
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ]
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}

    def events(self, texts: list[str]) -> Iterator[bytes]:
        head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

        def chunk(index: int, delta: Json, finish: str | None = None) -> bytes:
            return sse(head | {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})

        for index in range(len(texts)):
            yield chunk(index, {"role": "assistant", "content": ""})
        yield b": keep alive\n\n"
        for index, text in enumerate(texts):
            for word in words(text):
                yield chunk(index, {"content": word})
            yield chunk(index, {}, "stop")
        yield sse(head | {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
        yield b"data: [DONE]\n\n"


class Completions(Dialect):
    def whole(self, texts: list[str]) -> Json:
        choices = [{"index": index, "text": text, "finish_reason": "stop"} for index, text in enumerate(texts)]
        return {"id": "c1", "object": "text_completion", "created": 1, "model": "m", "choices": choices}

    def events(self, texts: list[str]) -> Iterator[bytes]:
        head = {"id": "c1", "object": "text_completion", "created": 1, "model": "m"}
        for index, text in enumerate(texts):
            for word in words(text):
                yield sse(head | {"choices": [{"index": index, "text": word, "finish_reason": None}]})
            yield sse(head | {"choices": [{"index": index, "text": "", "finish_reason": "stop"}]})
        yield b"data: [DONE]\n\n"


class Responses(Dialect):
    def whole(self, texts: list[str]) -> Json:
        content = [{"type": "output_text", "text": texts[0], "annotations": []}]
        message = {"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": content}
        return self._response("completed", [message])

    def events(self, texts: list[str]) -> Iterator[bytes]:
        place = {"item_id": "m1", "output_index": 0, "content_index": 0}
        item = {"type": "message", "id": "m1", "role": "assistant", "status": "in_progress", "content": []}
        steps: list[tuple[str, Json]] = [
            ("created", {"response": self._response("in_progress", [])}),
            ("output_item.added", {"output_index": 0, "item": item}),
            ("content_part.added", {**place, "part": {"type": "output_text", "text": "", "annotations": []}}),
            *(("output_text.delta", {**place, "delta": word, "logprobs": []}) for word in words(texts[0])),
            ("output_text.done", {**place, "text": texts[0], "logprobs": []}),
            ("completed", {"response": self.whole(texts)}),
        ]
        for number, (kind, step) in enumerate(steps):
            yield sse({"type": f"response.{kind}", "sequence_number": number} | step, f"response.{kind}")

    @staticmethod
    def _response(status: str, output: list[Json]) -> Json:
        head = {"id": "r1", "object": "response", "created_at": 1, "model": "m", "status": status, "output": output}
        return head | {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}


class Messages(Dialect):
    def whole(self, texts: list[str]) -> Json:
        return self._message([{"type": "text", "text": texts[0]}], "end_turn")

    def events(self, texts: list[str]) -> Iterator[bytes]:
        steps: list[Json] = [
            {"type": "message_start", "message": self._message([], None)},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
                for word in words(texts[0])
            ),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
            {"type": "message_stop"},
        ]
        for step in steps:
            yield sse(step, step["type"])

    @staticmethod
    def _message(content: list[Json], reason: str | None) -> Json:
        head = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": content}
        usage = {"input_tokens": 1, "output_tokens": 1}
        return head | {"stop_reason": reason, "stop_sequence": None, "usage": usage}


class Ollama(Dialect):
    media_type = "application/x-ndjson"
    streams = True

    def whole(self, texts: list[str]) -> Json:
        return self._line(texts[0], True)

    def events(self, texts: list[str]) -> Iterator[bytes]:
        for word in words(texts[0]):
            yield json.dumps(self._line(word, False)).encode() + b"\n"
        yield json.dumps(self._line("", True)).encode() + b"\n"

    @staticmethod
    def _line(text: str, done: bool) -> Json:
        message = {"role": "assistant", "content": text}
        line = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": done}
        return line | ({"done_reason": "stop"} if done else {})


APIS: dict[str, Dialect] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
    "/api/chat": Ollama(),
}


class _Quiet(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]  # they are pytest's
        return contextlib.nullcontext()


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[int]:
    """The app on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = _Quiet(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@dataclass
class Front:
    """Envoy before a backend: what clients of the backend are told its address is."""

    url: str
    http: httpx.AsyncClient
    chat: openai.AsyncOpenAI

    async def post(self, path: str, body: Json | bytes, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.http.post(self.url + path, content=content, headers=named)


@asynccontextmanager
async def before(
    backend: Backend, guard: str, *, is_open: bool = False, max_bytes: int = 2**20, **options: Any
) -> AsyncIterator[Front]:
    """Envoy before the backend, asking the Guard at that address."""
    async with serving(backend.app()) as port:
        upstream = f"http://127.0.0.1:{port}{options.pop('path', '')}"
        here = {"bind": "127.0.0.1:0", "admin": "127.0.0.1:0", "access_log": ""} | options
        sidecar = Sidecar(upstream=upstream, **here)
        config = bootstrap(sidecar, guard, is_open, max_bytes)
        async with running(config, structlog.get_logger(), 1.0) as envoy:
            url = f"http://127.0.0.1:{envoy.port}"
            async with (
                httpx.AsyncClient(timeout=60) as http,
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as chat,
            ):
                yield Front(url, http, chat)
