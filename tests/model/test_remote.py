"""A checkpoint behind an OpenAI-compatible API: a real server on loopback that computes it with transformers."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

from guard.errors import CheckpointError, ModelFailed
from guard.model.kinds import load_classifier
from guard.model.llama_guard import LlamaGuard
from guard.model.remote import RemoteGuard
from guard.settings import Settings
from guard.types import Conversation, Described, Role, Turn
from tests.model.llama_guards import Shape

SAID = (
    Conversation((Turn(Role.USER, "How do I bake bread?"),), 0),
    Conversation((Turn(Role.USER, "Hello!"), Turn(Role.AGENT, "I will find you and kill you.")), 1),
)
OWN = (Described("rivals", "Praise for rivals", "Praises what a competitor sells."),)


@dataclass
class Backend:
    """What was asked of it; it says tokens by id where it `knows` how, by their text otherwise."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    knows: bool = True
    alternatives: int = 20
    status: int = 200


@contextmanager
def serving(path: Path) -> Iterator[Backend]:
    """Completions of prompts in token ids, with log probabilities, as vLLM has them."""
    model: Any = transformers.LlamaForCausalLM.from_pretrained(path)
    model.eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)

    def choice(index: int, prompt: list[int]) -> dict[str, Any]:
        with torch.no_grad():
            told = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(0).topk(backend.alternatives)
        names = [f"token_id:{id}" if backend.knows else tokenizer.decode([id]) for id in told.indices.tolist()]
        top = dict(zip(names, told.values.tolist(), strict=True)) if backend.alternatives > 1 else {"other": -0.1}
        logprobs = {"tokens": names[:1], "token_logprobs": [0.0], "text_offset": [0], "top_logprobs": [top]}
        return {"index": index, "text": names[0], "finish_reason": "length", "logprobs": logprobs}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(
                {"object": "list", "data": [{"id": "org/lg", "object": "model", "created": 0, "owned_by": ""}]}
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            backend.asked.append(body)
            choices = [choice(index, prompt) for index, prompt in enumerate(body["prompt"])]
            # As they become ready, which need not be in order.
            self._answer(
                {"id": "1", "object": "text_completion", "created": 0, "model": "lg", "choices": choices[::-1]}
            )

        def _answer(self, body: dict[str, Any]) -> None:
            self.send_response(backend.status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        backend = Backend(f"http://127.0.0.1:{server.server_port}/v1")
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield backend
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_scores_are_those_of_the_checkpoint_here(llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """However the server names tokens; with the same prompts and hash, and a request for a batch."""
    here = LlamaGuard(llama_guards[shape], "cpu", "float32")
    with serving(llama_guards[shape]) as backend:
        settings = Settings.load({"model": f"openai+{backend.url}?tokenizer={llama_guards[shape]}&model=org/lg"}, {})
        there = load_classifier(settings)
        assert isinstance(there, RemoteGuard)
        assert (there.info.revision.name, there.info.device, there.info.asks) == ("lg", "remote", here.info.asks)
        windows = [tokens for one in SAID for tokens in there.tokenise(one, "head-tail", OWN)]
        assert windows == [tokens for one in SAID for tokens in here.tokenise(one, "head-tail", OWN)]
        for backend.knows in (True, False):
            for (own,), (other,) in zip(there.score(windows), here.score(windows), strict=True):
                assert own.unsafe == pytest.approx(other.unsafe, abs=1e-5)
                assert own.hazards == pytest.approx(other.hazards, abs=0.02)  # the least likely are not told
        assert len(backend.asked) == 3  # the first was to find out how it begins its answers
        assert [len(asked["prompt"]) for asked in backend.asked] == [2, 4, 4]
        assert there.token_ends("Hello!")[-1] == 6


def fails(backend: Backend) -> None:
    backend.status = 500


def tells_nothing(backend: Backend) -> None:
    backend.alternatives = 1


@pytest.mark.parametrize("goes_wrong", [fails, tells_nothing])
def test_a_server_that_cannot_answer(llama_guards: Mapping[Shape, Path], goes_wrong: Callable[[Backend], None]) -> None:
    """What it was sent is not in the error."""
    with serving(llama_guards["8b"]) as backend:
        there = RemoteGuard(llama_guards["8b"], backend.url)
        goes_wrong(backend)
        with pytest.raises(
            ModelFailed, match=r"the endpoint('s alternatives hold no answer| failed: InternalServerError)"
        ):
            there.score(there.tokenise(SAID[0]))


def test_a_server_that_cannot_be_used(llama_guards: Mapping[Shape, Path]) -> None:
    with serving(llama_guards["8b"]) as backend, pytest.raises(CheckpointError, match="has org/lg, not other"):
        RemoteGuard(llama_guards["8b"], backend.url, "other")
    with pytest.raises(CheckpointError, match=f"{backend.url}: Connection error"):
        RemoteGuard(llama_guards["8b"], backend.url)
    with pytest.raises(CheckpointError, match="only a Llama Guard checkpoint can be served by an endpoint"):
        load_classifier(Settings(endpoint=backend.url))
