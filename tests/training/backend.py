"""A generation backend on loopback: chat completions as OpenAI's API has them, by rules of the test."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request: the how manieth it is, from 0, and what it says."""

    number: int
    body: dict[str, Any]
    authorization: str | None

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def texts(self) -> int:
        """How many it asks for."""
        return int(re.findall(r"Write (\d+) texts", self.prompt)[0])

    @property
    def label(self) -> int:
        return int("texts that belong" in self.prompt)

    @property
    def language(self) -> str:
        return str(re.findall(r'the code "(.*?)"', self.prompt)[0])


@dataclass(frozen=True)
class Answer:
    """A reply by its text, or any other by its status and body; those to be tried again are so at once."""

    content: str | None = None
    status: int = 200
    body: bytes | None = None
    refusal: str | None = None
    finish: str = "stop"
    after: float = 0  # seconds

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


@dataclass
class Backend:
    url: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[Asked], Answer], models: Sequence[str] | None = ("writer",)) -> Iterator[Backend]:
    """Without `models` it fails to list them."""
    closing = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            data = [{"id": model} for model in models or ()]
            self._send(500 if models is None else 200, json.dumps({"object": "list", "data": data}).encode())

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(len(backend.asked), body, self.headers["Authorization"])
            backend.asked.append(asked)
            given = answer(asked)
            closing.wait(given.after)
            self._send(given.status, given.encoded())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After-Ms", "1")
            with suppress(ConnectionError):  # who asked may have gone
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        backend = Backend(f"http://127.0.0.1:{server.server_port}/v1")
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield backend
        finally:
            closing.set()
            server.shutdown()
            thread.join()


CATEGORY = """\
title: Gambling tips
definition: Advice on how to win at games of chance.
examples:
  positive: [how do I beat the roulette wheel, which horse should I put my rent on]
  negative: [how do casinos make their money]
"""


def distinct(asked: Asked) -> list[str]:
    """As many texts as are asked for, none like another of this or of any other request."""
    return [blake2b(f"{asked.number} {place}".encode()).hexdigest() for place in range(asked.texts)]
