"""The forms of bodies, pydantic models and messages of guard.v1: read from JSON, written as it, told of as a schema."""

import re
from typing import TypeVar

from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError

from guard.errors import InputError

Body = BaseModel | Message
Form = type[BaseModel] | type[Message]
_Model = TypeVar("_Model", bound=BaseModel)
_Message = TypeVar("_Message", bound=Message)

# What protobuf says of JSON may quote values; the place and the name of a field are all that is passed on.
_PLACE = re.compile(r" at \"?[A-Za-z]+\.?([\w.\[\]]*?)\"?\.*$", re.MULTILINE)
_FIELD = re.compile(r"Failed to parse (\w+) field")
_UNKNOWN = re.compile(r'has no field named "(\w{1,64})"')


def read_model(model: type[_Model], raw: bytes) -> _Model:
    """Raises InputError with the first problem, in words that quote no value."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        first = problems[0]
        if not first["loc"]:
            raise InputError("request", first["msg"]) from None
        if len({problem["loc"][1:2] for problem in problems if problem["loc"][0] == first["loc"][0]}) > 1:
            raise InputError(str(first["loc"][0]), "has none of the forms that it may have") from None
        raise InputError(_path(first["loc"]), first["msg"].removeprefix("Value error, ")) from None


def read_message(kind: type[_Message], raw: bytes | str) -> _Message:
    """The same of a message's JSON mapping; unknown fields are problems."""
    try:
        return Parse(raw, kind())
    except (ParseError, UnicodeDecodeError) as error:
        text = str(error)
    if unknown := _UNKNOWN.search(text):
        raise InputError(_place(text), f"has no field {unknown[1]}")
    raise InputError(_place(text), f"is not as {kind.DESCRIPTOR.full_name} has it")


def write(body: Body) -> bytes:
    if isinstance(body, Message):
        return MessageToJson(body, always_print_fields_with_no_presence=True, ensure_ascii=False, indent=None).encode()
    return body.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _path(loc: tuple[int | str, ...]) -> str:
    """input[0].text"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _place(text: str) -> str:
    if found := _PLACE.search(text):
        return found[1] or "request"
    fields = _FIELD.findall(text)
    return ".".join(fields) or "request"
