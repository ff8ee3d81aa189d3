"""Ollama's chat."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from guard import messages
from guard.service.gateway.apis import Api, Asked, Json, Piece, dumps, joined, strings
from guard.service.gateway.events import Lines


class Chat(Api):
    """POST /api/chat, which streams lines of JSON unless it is told not to."""

    framing = Lines()
    content_type = "application/x-ndjson"

    def __init__(self) -> None:
        self._model = ""

    def ask(self, body: Json) -> Asked:
        turns = messages.turns(body.get("messages"))
        return Asked(
            (turns,), (messages.new_turns(turns),), str(body.get("model", "")), body.get("stream") is not False
        )

    def pieces(self, event: Json) -> Iterator[Piece]:
        for part, text in strings(event.get("message")):
            yield Piece(0, text, part)
        yield Piece(0, ends=event.get("done") is True)

    def texts(self, reply: Json) -> Mapping[int, str]:
        return {0: joined(reply["message"])}

    def passed(self, event: Json) -> None:
        self._model = event.get("model", self._model)

    def cut(self, choice: int, text: str) -> bytes:
        return self.framing.frame(dumps(self._said(self._model, text)))

    def withhold(self, reply: Json, choice: int, text: str) -> None:
        reply |= {"message": {"role": "assistant", "content": text}, "done_reason": "content_filter"}

    def answer(self, asked: Asked, text: str) -> Json:
        return self._said(asked.model, text)

    def stream(self, asked: Asked, text: str) -> bytes:
        return self.framing.frame(dumps(self.answer(asked, text)))

    def error(self, status: int, message: str, code: str) -> Json:
        return {"error": f"{message} ({code})"}

    @staticmethod
    def _said(model: str, text: str) -> Json:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        message = {"role": "assistant", "content": text}
        return {"model": model, "created_at": now, "message": message, "done": True, "done_reason": "content_filter"}
