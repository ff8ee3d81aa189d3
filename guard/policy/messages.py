"""How a message names what was found, and what was perhaps meant."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from guard.policy.document import printable


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown word; empty where nothing known is close to it."""
    close = get_close_matches(word[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(known: Collection[str], value: Any) -> str:
    """The message about a value that is none of those known."""
    suggestion = did_you_mean(value, known) if isinstance(value, str) else ""
    expected = f"one of {', '.join(known)}" if known else "nothing"
    return f"expected {expected}, found {found(value)}{suggestion}"


def found(value: Any) -> str:
    """A value as a message shows it."""
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
