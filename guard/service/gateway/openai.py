"""OpenAI's APIs, as many other backends have them: chat completions, responses, and completions of a prompt."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from guard import messages
from guard.errors import InputError
from guard.service.gateway.apis import Api, Asked, Json, Piece, count, dumps, joined, listed, strings
from guard.types import Role, Turn

_FILTERED = "content_filter"
_NO_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


class OpenAI(Api):
    """What the three have in common."""

    def error(self, status: int, message: str, code: str) -> Json:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class _Completions(OpenAI):
    """Choices side by side, each with a finish_reason."""

    done = b"data: [DONE]\n\n"
    kind: str

    def __init__(self) -> None:
        self._begun: Json = {}

    def passed(self, event: Json) -> None:
        self._begun = self._begun or {key: event[key] for key in ("id", "object", "created", "model") if key in event}

    def cut(self, choice: int, text: str) -> bytes:
        begun = self._begun or self._head("")
        said = self._delta(choice, text, None) if text else None
        chunks = [found for found in (said, self._delta(choice, "", _FILTERED)) if found]
        return b"".join(self.framing.frame(dumps(begun | {"choices": [chunk]})) for chunk in chunks)

    def stream(self, asked: Asked, text: str) -> bytes:
        self._begun = self._head(asked.model)
        return b"".join(self.cut(choice, text) for choice in range(asked.replies)) + self.done

    def _head(self, model: str) -> Json:
        return {"id": "guard", "object": self.kind, "created": int(time.time()), "model": model}

    @abstractmethod
    def _delta(self, choice: int, text: str, finish: str | None) -> Json: ...


class Chat(_Completions):
    """POST /v1/chat/completions"""

    kind = "chat.completion.chunk"

    def ask(self, body: Json) -> Asked:
        turns = messages.turns(body.get("messages"))
        return Asked((turns,), (messages.new_turns(turns),), _model(body), body.get("stream") is True, count(body, "n"))

    def pieces(self, event: Json) -> Iterator[Piece]:
        for choice in listed(event.get("choices"), "choices"):
            index = choice.get("index", 0)
            for part, text in strings(choice.get("delta")):
                yield Piece(index, text, part)
            yield Piece(index, ends=choice.get("finish_reason") is not None)

    def texts(self, reply: Json) -> Mapping[int, str]:
        return {choice.get("index", 0): joined(choice.get("message")) for choice in listed(reply["choices"], "choices")}

    def withhold(self, reply: Json, choice: int, text: str) -> None:
        for found in reply["choices"]:
            if found.get("index", 0) == choice:
                found |= {"message": {"role": "assistant", "content": text}, "finish_reason": _FILTERED}
                found.pop("logprobs", None)

    def answer(self, asked: Asked, text: str) -> Json:
        message = {"role": "assistant", "content": text}
        choices = [
            {"index": index, "message": message, "finish_reason": _FILTERED, "logprobs": None}
            for index in range(asked.replies)
        ]
        return self._head(asked.model) | {
            "object": "chat.completion",
            "choices": choices,
            "usage": _NO_USAGE,
        }

    def _delta(self, choice: int, text: str, finish: str | None) -> Json:
        delta = {"role": "assistant", "content": text} if text else {}
        return {"index": choice, "delta": delta, "finish_reason": finish, "logprobs": None}


class Completions(_Completions):
    """POST /v1/completions"""

    kind = "text_completion"

    def ask(self, body: Json) -> Asked:
        prompt = body.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError("prompt", "should be a text, or a list of texts; tokens cannot be judged")
        suffix = body.get("suffix")
        turns = tuple((Turn(Role.USER, text + (suffix if isinstance(suffix, str) else "")),) for text in prompts)
        return Asked(turns, ((0,),) * len(turns), _model(body), body.get("stream") is True, count(body, "n"))

    def pieces(self, event: Json) -> Iterator[Piece]:
        for choice in listed(event.get("choices"), "choices"):
            yield Piece(choice.get("index", 0), choice.get("text") or "", ends=choice.get("finish_reason") is not None)

    def texts(self, reply: Json) -> Mapping[int, str]:
        return {choice.get("index", 0): choice.get("text") or "" for choice in listed(reply["choices"], "choices")}

    def withhold(self, reply: Json, choice: int, text: str) -> None:
        for found in reply["choices"]:
            if found.get("index", 0) == choice:
                found |= {"text": text, "finish_reason": _FILTERED, "logprobs": None}

    def answer(self, asked: Asked, text: str) -> Json:
        choices = [self._delta(index, text, _FILTERED) for index in range(asked.replies)]
        return self._head(asked.model) | {"choices": choices, "usage": _NO_USAGE}

    def _delta(self, choice: int, text: str, finish: str | None) -> Json:
        return {"index": choice, "text": text, "finish_reason": finish, "logprobs": None}


class Responses(OpenAI):
    """POST /v1/responses"""

    def __init__(self) -> None:
        self._response: Json = {}
        self._part: Json = {}  # the text that is open, by item and place
        self._number = 0
        self._has_said = False

    def ask(self, body: Json) -> Asked:
        before = body.get("instructions")
        turns = [Turn(Role.SYSTEM, before)] if isinstance(before, str) else []
        given = body.get("input")
        if isinstance(given, str):
            turns.append(Turn(Role.USER, given))
        else:
            turns += [turn for item in listed(given, "input") for turn in _item(item)]
        if not turns:
            raise InputError("input", "is missing")
        found = tuple(turns)
        return Asked((found,), (messages.new_turns(found),), _model(body), body.get("stream") is True)

    def pieces(self, event: Json) -> Iterator[Piece]:
        kind = str(event.get("type", ""))
        match kind.rpartition(".")[2]:
            case "delta":
                self._has_said = True
                place = (event.get("output_index"), event.get("content_index"), event.get("summary_index"))
                yield Piece(0, event["delta"] if isinstance(event.get("delta"), str) else "", f"{kind}{place}")
            case "added" if kind == "response.output_item.added":
                yield Piece(0, joined(event.get("item")), f"item{event.get('output_index')}")
            case "completed" | "incomplete" | "failed" if kind.count(".") == 1:
                yield Piece(0, "" if self._has_said else joined(_output(event.get("response"))), ends=True)

    def texts(self, reply: Json) -> Mapping[int, str]:
        return {0: joined(_output(reply))}

    def passed(self, event: Json) -> None:
        self._number = event.get("sequence_number", self._number)
        if event.get("type") == "response.created":
            self._response = event.get("response") or {}
        elif event.get("type") == "response.output_text.delta":
            self._part = {key: event.get(key) for key in ("item_id", "output_index", "content_index")}

    def cut(self, choice: int, text: str) -> bytes:
        return self._say(text) + self._event("incomplete", {"response": self._ended(self._response, text)})

    def withhold(self, reply: Json, choice: int, text: str) -> None:
        reply |= self._ended(reply, text)

    def answer(self, asked: Asked, text: str) -> Json:
        head = {"id": "guard", "object": "response", "created_at": int(time.time()), "model": asked.model}
        rest = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "usage": None}
        return self._ended(head | rest, text)

    def stream(self, asked: Asked, text: str) -> bytes:
        self._response = self.answer(asked, "")
        begun = self._response | {"status": "in_progress", "incomplete_details": None}
        return self._event("created", {"response": begun}) + self.cut(0, text)

    def _say(self, text: str) -> bytes:
        if not text:
            return b""
        place = self._part or {"item_id": "guard", "output_index": 0, "content_index": 0}
        return self._event("output_text.delta", {**place, "delta": text, "logprobs": []})

    def _event(self, kind: str, content: Json) -> bytes:
        self._number += 1
        name = f"response.{kind}"
        return self.framing.frame(dumps({"type": name, "sequence_number": self._number} | content), name)

    @staticmethod
    def _ended(response: Json, text: str) -> Json:
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
        message = {"type": "message", "id": "guard", "role": "assistant", "status": "incomplete", "content": content}
        details = {"incomplete_details": {"reason": _FILTERED}, "error": None}
        return response | {"status": "incomplete", "output": [message] if text else []} | details


def _output(response: Any) -> object:
    return response.get("output") if isinstance(response, dict) else None


def _item(item: Json) -> Iterator[Turn]:
    """An item of a response's input, in the terms of chat messages."""
    match item.get("type", "message"):
        case "message":
            yield from messages.turns([item], "input")
        case "function_call" | "custom_tool_call" | "mcp_call":
            yield Turn(Role.AGENT, joined(item))
        case kind if str(kind).endswith("_output"):
            yield Turn(Role.TOOL, joined(item.get("output")))
        case "item_reference":
            raise InputError("input", "refers to what the backend keeps, which cannot be judged")
        case _:
            yield Turn(Role.AGENT, joined(item))


def _model(body: Json) -> str:
    return str(body.get("model", ""))
