"""YAML as plain data that knows where each value stands; pathological files are refused before they cost anything."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.error import MarkedYAMLError
from yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    ScalarEvent,
)
from yaml.reader import ReaderError

from guard.errors import PolicyError

MAX_BYTES = 100_000
MAX_DEPTH = 16
MAX_PROBLEMS = 100
_MAX_BITS = 64  # of a whole number

KEY = "[key]"
"""At the end of a path: not the value there, but its key. The word is pydantic's."""

Loc = tuple[str | int, ...]
Read = Callable[[Path, int], bytes]
"""The first bytes of a file, so many at most, or all of them where the number is negative. Raises OSError."""
Place = tuple[int, int]  # line and column, from 1
_Found = dict[tuple[Place, str], str]  # by place and path

_START = (1, 1)
# What a word without quotes stands for in YAML 1.2, the core schema.
_WORDS: dict[str, Any] = {"": None, "~": None} | {
    form(word): value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (str.lower, str.upper, str.capitalize)
}
_WHOLE = re.compile("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_BASES = {"0o": 8, "0x": 16}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_file(path: Path, limit: int) -> bytes:
    """From the disk."""
    with path.open("rb") as file:
        return file.read(limit)


class Document:
    """One file: `data` is made of dicts, tuples, str, int, float, bool and None.

    Problems, its own and those reported by its reader, are gathered in `problems`, suspicions in `warnings`. A file
    that is no YAML at all, is empty, larger than MAX_BYTES or deeper than MAX_DEPTH raises PolicyError at once.
    """

    def __init__(self, path: Path, read: Read = read_file) -> None:
        self._path = path
        self._read = read
        self._places: dict[Loc, Place] = {}
        self._problems: _Found = {}
        self._warnings: _Found = {}
        self.data = self._read_all()

    def report(self, loc: Loc, problem: str) -> None:
        """Notes a problem at `loc`; what is not there is placed at the key that it is missed under."""
        self._note(self._place(loc), loc, problem)

    def warn(self, loc: Loc, warning: str) -> None:
        """Notes what is suspicious at `loc`, but no reason to refuse the file."""
        self._warnings.setdefault((self._place(loc), _dotted(loc)), warning)

    @property
    def problems(self) -> list[str]:
        """A line for each of the first MAX_PROBLEMS, in the order of the file."""
        return self._lines(self._problems)

    def raise_problems(self) -> None:
        """Raises PolicyError if there are any."""
        if lines := self.problems:
            raise PolicyError("\n".join(lines))

    @property
    def warnings(self) -> list[str]:
        return self._lines(self._warnings)

    def names(self, section: str) -> set[str]:
        """The keys of a mapping that stands at the top, whatever is under them."""
        found = self.data.get(section) if isinstance(self.data, dict) else None
        return set(found) if isinstance(found, dict) else set()

    def _place(self, loc: Loc) -> Place:
        return self._places.get(loc) or self._places.get((*loc[:-1], KEY), _START)

    def _note(self, place: Place, loc: Loc, problem: str) -> None:
        self._problems.setdefault((place, _dotted(loc)), problem)

    def _lines(self, found: _Found) -> list[str]:
        lines = [self._line(*where, problem) for where, problem in sorted(found.items())]
        if more := lines[MAX_PROBLEMS:]:
            lines[MAX_PROBLEMS:] = [f"{self._path}: and {len(more)} more"]
        return lines

    def _line(self, place: Place, where: str, problem: str) -> str:
        return ": ".join(filter(None, (f"{self._path}:{place[0]}:{place[1]}", where, problem)))

    def _refusal(self, place: Place, problem: str) -> PolicyError:
        return PolicyError(self._line(place, "", problem))

    def _read_all(self) -> Any:
        text = self._text()
        # libyaml's, at a twentieth of what a parser in Python takes; its composer would follow any depth and alias.
        self._events = yaml.parse(text, Loader=yaml.CSafeLoader)
        try:
            next(self._events)  # the start of the stream
            if not isinstance(next(self._events), DocumentStartEvent):
                raise self._refusal(_START, "expected a mapping, found an empty file")
            data = self._value(next(self._events), ())
            next(self._events)  # the end of the document
            more = next(self._events)
        except MarkedYAMLError as error:
            problem = ", ".join(filter(None, (error.context, error.problem)))
            raise self._refusal(_mark(error.problem_mark), f"not YAML: {printable(problem)}") from None
        except ReaderError as error:
            before = text.encode()[: error.position].decode()
            code = f"U+{error.character:04X}"
            raise self._refusal(_end(before), f"expected text, found the control character {code}") from None
        if isinstance(more, DocumentStartEvent):
            raise self._refusal(_mark(more.start_mark), "expected a single document, found another")
        return data

    def _text(self) -> str:
        try:
            content = self._read(self._path, MAX_BYTES + 1)
        except OSError as error:
            raise self._refusal(_START, f"cannot be read: {error.strerror}") from None
        if len(content) > MAX_BYTES:
            raise self._refusal(_START, f"expected at most {MAX_BYTES} bytes, found more")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            place, byte = _end(content[: error.start].decode(errors="replace")), content[error.start]
            raise self._refusal(place, f"expected UTF-8, found the byte 0x{byte:02x}") from None

    def _value(self, event: Any, loc: Loc) -> Any:
        """What begins with an event; the events up to its end are read."""
        place = _mark(event.start_mark)
        if len(loc) >= MAX_DEPTH:
            raise self._refusal(place, f"expected at most {MAX_DEPTH} levels, found more")
        is_scalar = isinstance(event, ScalarEvent)
        if is_scalar and event.start_mark.index == event.end_mark.index:  # nothing is there: the mark is the next one's
            place = self._places.get((*loc, KEY)) or self._places.get(loc[:-1], _START)
        self._places[loc] = place
        if event.anchor is not None:
            self._note(place, loc, f"expected no anchors or aliases, found {printable(event.anchor)}")
        elif event.tag is not None:
            self._note(place, loc, f"expected no tags, found {printable(event.tag)}")
        elif is_scalar:
            return _plain(event.value) if event.implicit[0] else event.value
        elif isinstance(event, MappingStartEvent):
            return self._mapping(loc)
        else:
            return tuple(self._value(item, (*loc, index)) for index, item in enumerate(self._items()))
        self._skip(event)
        return None

    def _mapping(self, loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key in self._items():
            place = _mark(key.start_mark)
            if not isinstance(key, ScalarEvent):
                self._note(place, loc, "expected a key of text, found a list or a mapping")
                self._skip(key)
                self._skip(next(self._events))
                continue
            inner = (*loc, key.value)
            if key.value in values:
                self._note(place, inner, "expected each key once, found it again")
                self._skip(next(self._events))
            else:
                self._places[(*inner, KEY)] = place
                values[key.value] = self._value(next(self._events), inner)
        return values

    def _items(self) -> Iterator[Event]:
        """The first event of each of the items up to the end of a collection; whoever takes it reads the rest."""
        for event in self._events:
            if isinstance(event, CollectionEndEvent):
                return
            yield event

    def _skip(self, event: Event) -> None:
        """Reads what begins with an event, however deep it is."""
        depth = int(isinstance(event, CollectionStartEvent))
        while depth:
            event = next(self._events)
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)


def _plain(text: str) -> Any:
    """What a text without quotes means; a number of more digits than anybody needs stays a text."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        try:
            number = int(text, _BASES.get(text[:2], 10))
        except ValueError:  # more digits than int() takes
            return text
        return number if number.bit_length() <= _MAX_BITS else text
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NO_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def printable(text: str) -> str:
    """Foreign text as a message can hold it: short and on one line."""
    text = text if len(text) <= 80 else text[:80] + "…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _dotted(loc: Loc) -> str:
    """E.g. categories.hate.hazards[1]."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in loc if part != KEY)
    return "".join(parts).removeprefix(".")


def _mark(mark: Any) -> Place:
    return (mark.line + 1, mark.column + 1) if mark is not None else _START


def _end(text: str) -> Place:
    return text.count("\n") + 1, len(text) - text.rfind("\n")
