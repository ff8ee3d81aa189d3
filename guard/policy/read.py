"""A policy file from disk to its checked form, with every problem in it said in the words of its author."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from guard.policy.document import KEY, Document, printable
from guard.policy.schema import NAME, CategorySpec, PolicySpec

_PROBABILITY = "a number from 0 to 1"
# What was expected, by pydantic's type of error, in the words of YAML.
_EXPECTED = {
    "dict_type": "a mapping",
    "float_type": _PROBABILITY,
    "greater_than_equal": _PROBABILITY,
    "less_than_equal": _PROBABILITY,
    "missing": "a value",
    "model_type": "a mapping",
    "string_pattern_mismatch": "a name of lower-case letters, digits and hyphens that starts with a letter",
    "string_too_short": "text",
    "string_type": "text",
    "string_unicode": "valid Unicode",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}


def read_policy(path: Path) -> PolicySpec:
    """Reads and checks one file. Raises PolicyError with every problem in it."""
    document = Document(path)
    if not re.fullmatch(rf"{NAME}\.yaml", path.name):
        document.report((KEY,), f"expected a file name such as my-policy.yaml, found {_found(path.name)}")
    try:
        policy = PolicySpec.model_validate(document.data)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            loc, unknown_key = details["loc"], details["type"] == "extra_forbidden"
            document.report((*loc, KEY) if unknown_key else loc, _problem(details))
    document.raise_problems()
    return policy


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown word; empty where nothing known is close to it."""
    close = get_close_matches(word[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _problem(details: ErrorDetails) -> str:
    kind, loc, found, context = details["type"], details["loc"], details["input"], details.get("ctx", {})
    known: Collection[str] = context.get("known", ())
    if kind == "missing":
        found = None
    elif kind == "extra_forbidden":
        found, known = loc[-1], (PolicySpec if len(loc) == 1 else CategorySpec).model_fields
    elif kind == "literal_error":
        known = re.findall(r"'(.*?)'", context["expected"])
    expected = f"one of {', '.join(known)}" if known else _EXPECTED.get(kind, details["msg"])
    suggestion = did_you_mean(found, known) if isinstance(found, str) else ""
    return f"expected {expected}, found {context.get('found') or _found(found)}{suggestion}"


def _found(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{printable(value)}'"
        case dict():
            return "a mapping" if value else "an empty mapping"
        case tuple():
            return "a list" if value else "an empty list"
        case _:
            return printable(str(value))
