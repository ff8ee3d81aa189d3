"""The messages of a chat API, as OpenAI's clients and the gateways before them send them, to turns."""

import json
from collections.abc import Iterator, Mapping, Sequence

from guard.errors import InputError
from guard.types import Role, Turn

_ROLES = {
    "user": Role.USER,
    "assistant": Role.AGENT,
    "agent": Role.AGENT,
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # type of a part to its key
_MEDIA = {"image_url", "input_image", "input_audio", "video_url", "file", "input_file"}


def turns(messages: object, field: str = "messages") -> tuple[Turn, ...]:
    """A turn of each message: its text, and the calls of tools that it asks for, a line each.

    Parts that are pictures, sounds or files have no text, and are passed over. Raises InputError for no messages, and
    for what a chat API would not take; `field` is where they stand in the request.
    """
    found = tuple(_turn(place, message) for place, message in _objects(field, messages))
    if not found:
        raise InputError(field, "at least one is needed")
    return found


def new_turns(turns: Sequence[Turn]) -> range:
    """Indices of the turns that no answer has followed yet: those after the last agent turn.

    What the agent's next answer is to begin with, which ends some conversations, is new too.
    """
    end = len(turns)
    while end and turns[end - 1].role is Role.AGENT:
        end -= 1
    while end and turns[end - 1].role is not Role.AGENT:
        end -= 1
    return range(end, len(turns))


def tool_calls(calls: object, field: str = "tool_calls") -> str:
    """`name arguments` of each call of a tool, a line each. Raises InputError."""
    return "\n".join(_call(place, call) for place, call in _objects(field, calls))


def _turn(field: str, message: Mapping[str, object]) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{field}.role", f"should be one of {', '.join(_ROLES)}")
    lines = [_content(f"{field}.content", message.get("content"))]
    if isinstance(refusal := message.get("refusal"), str):
        lines.append(_text(f"{field}.refusal", refusal))
    if (calls := message.get("tool_calls")) is not None:
        lines.append(tool_calls(calls, f"{field}.tool_calls"))
    if (call := message.get("function_call")) is not None:  # as it was before tools
        lines.append(_named(f"{field}.function_call", call, "arguments"))
    return Turn(_ROLES[role], "\n".join(line for line in lines if line))


def _content(field: str, content: object) -> str:
    """A string, a list of parts, or null where a message only calls tools."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return _text(field, content)
    return "\n".join(_part(place, part) for place, part in _objects(field, content) if part.get("type") not in _MEDIA)


def _part(field: str, part: Mapping[str, object]) -> str:
    kind = part.get("type", "text")
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise InputError(f"{field}.type", f"should be one of {', '.join(sorted(_TEXTS.keys() | _MEDIA))}")
    return _text(f"{field}.{_TEXTS[kind]}", part.get(_TEXTS[kind]))


def _call(field: str, call: Mapping[str, object]) -> str:
    if "custom" in call:
        return _named(f"{field}.custom", call["custom"], "input")
    return _named(f"{field}.function", call.get("function"), "arguments")


def _named(field: str, call: object, key: str) -> str:
    found = _object(field, call)
    given = found.get(key, "")
    if isinstance(given, dict):  # parsed, as some backends have it
        given = json.dumps(given, ensure_ascii=False)
    return f"{_text(f'{field}.name', found.get('name'))} {_text(f'{field}.{key}', given)}".rstrip()


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(field, "should be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(field, "is not valid Unicode (it holds a lone surrogate)") from None
    return value


def _object(field: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InputError(field, "should be an object")
    return value


def _objects(field: str, value: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(path, object) of each object in a list."""
    if not isinstance(value, list):
        raise InputError(field, "should be a list")
    for index, item in enumerate(value):
        place = f"{field}[{index}]"
        yield place, _object(place, item)
