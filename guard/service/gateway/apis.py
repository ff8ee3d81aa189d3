"""The APIs of generation backends, each as what it asks, what it answers, and how it says no."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from guard.errors import InputError
from guard.service.gateway.events import Framing, ServerSent
from guard.types import Turn

Json = dict[str, Any]

_NO_TEXT = {
    *("role", "id", "type", "call_id", "tool_use_id", "status"),
    *("annotations", "cache_control", "citations", "logprobs", "data", "signature", "encrypted_content"),
}
"""Keys of a reply under which stands nothing that a reader is shown."""
_ARGUMENTS = {"arguments", "input"}
"""Of a tool's call, whose keys are the tool's."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in our nouns: conversations, each of which is answered with `choices` replies.

    `new` are the turns of each that were not answered yet. `model` and `streams` are what the backend is asked for.
    """

    conversations: tuple[tuple[Turn, ...], ...]
    new: tuple[Iterable[int], ...]
    model: str
    streams: bool
    choices: int = 1

    def __post_init__(self) -> None:
        conversations = tuple(
            tuple(Turn(turn.role, whole(turn.text)) for turn in turns) for turns in self.conversations
        )
        object.__setattr__(self, "conversations", conversations)

    def context(self, choice: int) -> tuple[Turn, ...]:
        """What is said before a reply; of a reply too many, the last conversation."""
        return self.conversations[min(choice // self.choices, len(self.conversations) - 1)]

    @property
    def replies(self) -> int:
        return len(self.conversations) * self.choices


class Piece(NamedTuple):
    """What an event adds to a reply; a change of `part`, such as from the text to a tool's call, begins a new line."""

    choice: int
    text: str = ""
    part: str = ""
    ends: bool = False


class Api(ABC):
    """One exchange by one API. It is told of the events that were passed on, so that it can end what they began."""

    framing: Framing = ServerSent()
    content_type = "text/event-stream"
    done = b""
    """What stands at the end of every stream."""

    @abstractmethod
    def ask(self, body: Json) -> Asked:
        """Raises InputError for what cannot be read, and so not be judged."""

    @abstractmethod
    def pieces(self, event: Json) -> Iterator[Piece]:
        """What an event of a stream adds to which replies."""

    @abstractmethod
    def texts(self, reply: Json) -> Mapping[int, str]:
        """The replies that an answer holds."""

    def passed(self, event: Json) -> None:  # noqa: B027 # few need to know
        """An event was passed on."""

    @abstractmethod
    def cut(self, choice: int, text: str) -> bytes:
        """The events that end a reply here, after `text` if there is any."""

    @abstractmethod
    def withhold(self, reply: Json, choice: int, text: str) -> None:
        """Puts `text` in place of a reply that an answer holds."""

    @abstractmethod
    def answer(self, asked: Asked, text: str) -> Json:
        """What the backend could have said, with `text` as every reply."""

    @abstractmethod
    def stream(self, asked: Asked, text: str) -> bytes:
        """The same as a stream."""

    @abstractmethod
    def error(self, status: int, message: str, code: str) -> Json:
        """What the clients of the API raise."""


def strings(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a part of a reply, with where it stands, so that what is new in an API is judged, too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in _ARGUMENTS and isinstance(inner, dict):
                yield f"{path}.{key}", json.dumps(inner, ensure_ascii=False)
            elif key not in _NO_TEXT:
                yield from strings(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            place = inner.get("index", index) if isinstance(inner, dict) else index
            yield from strings(inner, f"{path}[{place}]")


def joined(value: object) -> str:
    """All texts of a part of a reply, a line each."""
    return "\n".join(text for _, text in strings(value) if text)


def whole(text: str) -> str:
    """A text without halves of characters, which JSON can hold, as a reader is shown it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def listed(value: object, place: str) -> list[Json]:
    """A list of objects, which may be left out; raises InputError for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(place, "should be a list of objects")
    return value


def count(body: Json, name: str) -> int:
    """How many of something are asked for, 1 by default."""
    value = body.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or value < 1:
        raise InputError(name, "should be a number from 1 on")
    return value


def dumps(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def loads(data: bytes, place: str, folds: bool = False) -> Json:
    """A JSON object that says everything once: of a key that stands twice, another reader may take the other value.

    With `folds` keys are told apart as the readers do that care least about capitals, such as those of backends in Go.
    Raises InputError.
    """
    try:
        document = json.loads(data, object_pairs_hook=_once_folded if folds else _once)
    except (ValueError, RecursionError):
        raise InputError(place, "is not a JSON document with every key once") from None
    if not isinstance(document, dict):
        raise InputError(place, "should be a JSON object")
    return document


def _once(pairs: Iterable[tuple[str, object]]) -> Json:
    given = list(pairs)
    found = dict(given)
    if len(found) < len(given):
        raise ValueError("a key stands twice")
    return found


def _once_folded(pairs: list[tuple[str, object]]) -> Json:
    return _once((key.casefold(), value) for key, value in pairs)
