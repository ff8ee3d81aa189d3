"""What people write, as requests: a text, a JSON conversation, a line of JSON Lines."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from google.protobuf.json_format import ParseDict, ParseError

from guard import messages
from guard.errors import InputError
from guard.v1 import moderation_pb2 as pb

# Role names of ours, of the wire, and of the chat APIs whose logs people have.
_ROLES = {
    "user": pb.ROLE_USER,
    "agent": pb.ROLE_AGENT,
    "assistant": pb.ROLE_AGENT,
    "system": pb.ROLE_SYSTEM,
    "developer": pb.ROLE_SYSTEM,
    "tool": pb.ROLE_TOOL,
    "function": pb.ROLE_TOOL,
    **{name: role for name, role in pb.Role.items() if role != pb.ROLE_UNSPECIFIED},
}
_FIELDS = {name for field in pb.CheckRequest.DESCRIPTOR.fields for name in (field.name, field.json_name)}


def request(text: str | None, role: str, policy: str) -> pb.CheckRequest:
    """The one turn that `text` is, or the JSON conversation on standard input where `text` is None or "-".

    `policy` stands above what the conversation names. Raises InputError.
    """
    request = _stdin() if text is None or text == "-" else pb.CheckRequest(turns=[_turn("turns[0]", role, text)])
    request.policy = policy or request.policy
    return request


def _stdin() -> pb.CheckRequest:
    if sys.stdin.isatty():
        raise InputError("text", "is missing; give a text, or a JSON conversation on standard input")
    return conversation(_json("stdin", sys.stdin.buffer.read()))


def conversation(document: object) -> pb.CheckRequest:
    """A CheckRequest from its JSON mapping, whose turns may also stand as chat APIs have them, or as one text.

    {"turns": [{"role", "text"}, …]}, {"messages": [{"role", "content"}, …]} or {"text", "role"}. Raises InputError.
    """
    fields = dict(_object("request", document))
    forms = {"turns", "messages", "text"} & fields.keys()
    if len(forms) > 1:
        raise InputError("request", f"should have one of {', '.join(sorted(forms))}")
    if "text" in forms:
        turns = [_turn("turns[0]", fields.pop("role", "user"), fields.pop("text"))]
    elif "messages" in forms:
        turns = [_turn("messages", turn.role, turn.text) for turn in messages.turns(fields.pop("messages"))]
    else:
        turns = [
            _turn(place, turn.get("role"), turn.get("text"))
            for place, turn in _objects("turns", fields.pop("turns", []))
        ]
    if unknown := fields.keys() - _FIELDS:
        raise InputError("request", f"has no field {_valid(min(unknown))}")
    try:
        parsed = ParseDict(fields, pb.CheckRequest())
    except ParseError as error:
        raise InputError("request", _valid(str(error).partition("\n")[0])) from None
    parsed.turns.extend(turns)
    return parsed


def whole(request: pb.CheckRequest) -> pb.CheckConversationRequest:
    """The same conversation, to judge every turn of it."""
    return pb.CheckConversationRequest(
        turns=request.turns,
        policy=request.policy,
        conversation_id=request.conversation_id,
        metadata=request.metadata,
        score_detail=request.score_detail,
    )


def lines(source: BinaryIO) -> Iterator[tuple[str, pb.CheckRequest | InputError]]:
    """(id, request) of each line of JSON; the id is the line's own or else its number, from 1.

    A line that is no request comes as the InputError that says why, so that the rest goes on.
    """
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        id = str(number)
        try:
            fields = dict(_object("request", _json(f"line {number}", line)))
            id = _valid(str(fields.pop("id", id)))
            yield id, conversation(fields)
        except InputError as error:
            yield id, error


def _json(source: str, data: bytes) -> object:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise InputError(source, f"is not JSON, at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):  # no UTF-8, a number of thousands of digits, or too deep
        raise InputError(source, "is not JSON") from None


def _valid(text: str) -> str:
    """What protobuf takes: lone surrogates, which JSON can hold, come out escaped."""
    return text.encode(errors="backslashreplace").decode()


def _object(field: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InputError(field, "should be a JSON object")
    return value


def _objects(field: str, value: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(path, object) of each object in a list."""
    if not isinstance(value, list):
        raise InputError(field, "should be a list")
    for index, item in enumerate(value):
        path = f"{field}[{index}]"
        yield path, _object(path, item)


def _turn(field: str, role: object, text: object) -> pb.Turn:
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{field}.role", "should be user, agent, system or tool")
    if not isinstance(text, str):
        raise InputError(f"{field}.text", "should be a string")
    try:
        return pb.Turn(role=_ROLES[role], text=text)
    except UnicodeEncodeError:
        raise InputError(f"{field}.text", "is not valid Unicode (it holds a lone surrogate)") from None
