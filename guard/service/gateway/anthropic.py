"""Anthropic's messages."""

from collections.abc import Iterator, Mapping

from guard.errors import InputError
from guard.messages import new_turns
from guard.service.gateway.apis import Api, Asked, Json, Piece, dumps, joined, listed, strings
from guard.types import Role, Turn

_ROLES = {"user": Role.USER, "assistant": Role.AGENT, "system": Role.SYSTEM}
_USAGE = {"input_tokens": 0, "output_tokens": 0}


class Messages(Api):
    """POST /v1/messages, with blocks of text, thinking, a tool's call and its result."""

    def __init__(self) -> None:
        self._has_begun = False
        self._block = -1  # the last one that began
        self._is_open = self._is_text = False

    def ask(self, body: Json) -> Asked:
        turns = [Turn(Role.SYSTEM, text)] if (text := _text(body.get("system"), "system")) else []
        for index, message in enumerate(listed(body.get("messages"), "messages")):
            turns += _turns(f"messages[{index}]", message)
        if not turns:
            raise InputError("messages", "at least one is needed")
        found = tuple(turns)
        return Asked((found,), (new_turns(found),), str(body.get("model", "")), body.get("stream") is True)

    def pieces(self, event: Json) -> Iterator[Piece]:
        match event.get("type"):
            case "message_start":
                yield Piece(0, joined(event.get("message", {}).get("content")), "start")
            case "content_block_start" | "content_block_delta" as kind:
                part = "content_block" if kind == "content_block_start" else "delta"
                for _, text in strings(event.get(part)):
                    yield Piece(0, text, str(event.get("index")))
            case "message_delta" | "message_stop":
                yield Piece(0, ends=True)

    def texts(self, reply: Json) -> Mapping[int, str]:
        return {0: joined(reply["content"])}

    def passed(self, event: Json) -> None:
        match event.get("type"):
            case "message_start":
                self._has_begun = True
            case "content_block_start":
                self._block, self._is_open = event.get("index", self._block + 1), True
                self._is_text = event.get("content_block", {}).get("type") == "text"
            case "content_block_stop":
                self._is_open = False

    def cut(self, choice: int, text: str) -> bytes:
        events: list[Json] = (
            [] if self._has_begun else [{"type": "message_start", "message": self._message("", [], None)}]
        )
        if self._is_open and text and not self._is_text:
            events.append(self._stop())
        if text and not self._is_open:
            self._block += 1
            self._is_open = True
            block = {"type": "text", "text": ""}
            events.append({"type": "content_block_start", "index": self._block, "content_block": block})
        if text:
            delta = {"type": "text_delta", "text": text}
            events.append({"type": "content_block_delta", "index": self._block, "delta": delta})
        if self._is_open:
            events.append(self._stop())
        stop: Json = {"stop_reason": "refusal", "stop_sequence": None}
        events.append({"type": "message_delta", "delta": stop, "usage": {"output_tokens": 0}})
        events.append({"type": "message_stop"})
        return b"".join(self.framing.frame(dumps(event), str(event["type"])) for event in events)

    def withhold(self, reply: Json, choice: int, text: str) -> None:
        reply |= {"content": _said(text), "stop_reason": "refusal", "stop_sequence": None}

    def answer(self, asked: Asked, text: str) -> Json:
        return self._message(asked.model, _said(text), "refusal")

    def stream(self, asked: Asked, text: str) -> bytes:
        begun = {"type": "message_start", "message": self._message(asked.model, [], None)}
        self._has_begun = True
        return self.framing.frame(dumps(begun), "message_start") + self.cut(0, text)

    def error(self, status: int, message: str, code: str) -> Json:
        kind = "invalid_request_error" if status < 500 else "overloaded_error" if status == 503 else "api_error"
        return {"type": "error", "error": {"type": kind, "message": f"{message} ({code})"}}

    def _stop(self) -> Json:
        self._is_open = False
        return {"type": "content_block_stop", "index": self._block}

    @staticmethod
    def _message(model: str, content: list[Json], reason: str | None) -> Json:
        head = {"id": "guard", "type": "message", "role": "assistant", "model": model, "content": content}
        return head | {"stop_reason": reason, "stop_sequence": None, "usage": _USAGE}


def _turns(place: str, message: Json) -> Iterator[Turn]:
    """A message may hold answers of tools beside what its author says; each is a turn, in order."""
    role = message.get("role")
    if role not in _ROLES:
        raise InputError(f"{place}.role", "should be user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        yield Turn(_ROLES[role], content)
        return
    said: list[str] = []
    for block in listed(content, f"{place}.content"):
        if block.get("type") == "tool_result":
            if said:
                yield Turn(_ROLES[role], "\n".join(said))
                said = []
            yield Turn(Role.TOOL, _text(block.get("content"), f"{place}.content"))
        elif text := _seen(block):
            said.append(text)
    if said:
        yield Turn(_ROLES[role], "\n".join(said))


def _seen(block: Json) -> str:
    """What a block says; of a document its text, where it is one."""
    source = block.get("source")
    document = source.get("data" if source.get("type") == "text" else "content") if isinstance(source, dict) else None
    said = [joined({key: value for key, value in block.items() if key != "source"}), joined(document)]
    return "\n".join(text for text in said if text)


def _text(content: object, place: str) -> str:
    return content if isinstance(content, str) else joined(listed(content, place))


def _said(text: str) -> list[Json]:
    return [{"type": "text", "text": text}] if text else []
