"""YAML as plain data that knows where each value stands; pathological files are refused before they cost anything."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

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
_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = frozenset(_TAG + kind for kind in ("int", "float", "bool", "null"))
_PLAIN = _CONSTRUCTED | {_TAG + kind for kind in ("map", "seq", "str", "timestamp")}


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
        self._constructor = YAML(typ="safe", pure=True).constructor
        self.data = self._value(self._compose(), ())

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

    def _compose(self) -> Node:
        text = self._text()
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = MAX_DEPTH
        yaml.composer.warn_double_anchors = False  # all anchors are refused later on
        try:
            root: Node | None = yaml.compose(text)
        except MaxDepthExceededError as error:
            raise self._refusal(_mark(error.problem_mark), f"expected at most {MAX_DEPTH} levels, found more") from None
        except MarkedYAMLError as error:
            problem = ", ".join(filter(None, (error.context, error.problem)))
            raise self._refusal(_mark(error.problem_mark), f"not YAML: {printable(problem)}") from None
        except ReaderError as error:
            place, code = _end(text[: error.position]), f"U+{error.character:04X}"
            raise self._refusal(place, f"expected text, found the control character {code}") from None
        except (ValueError, OverflowError):  # what chr() says of an escape such as "\UFFFFFFFF"
            raise self._refusal(_START, "not YAML: an escape in a quoted text is outside Unicode") from None
        if root is None:
            raise self._refusal(_START, "expected a mapping, found an empty file")
        return root

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

    def _value(self, node: Node, loc: Loc) -> Any:
        place = _mark(node.start_mark)
        if node.start_mark.index == node.end_mark.index:  # nothing is written, and its mark is that of what follows
            place = self._places.get((*loc, KEY)) or self._places.get(loc[:-1], _START)
        self._places[loc] = place
        if node.anchor is not None:  # not entered, so that no alias can multiply what is read
            self._note(place, loc, f"expected no anchors or aliases, found {printable(node.anchor)}")
        elif node.tag not in _PLAIN:
            self._note(place, loc, f"expected no tags, found {printable(str(node.tag))}")
        elif isinstance(node, MappingNode):
            return self._mapping(node.value, loc)
        elif not isinstance(node, ScalarNode):
            return tuple(self._value(item, (*loc, index)) for index, item in enumerate(node.value))
        elif node.tag in _CONSTRUCTED:
            return self._scalar(node)
        else:
            return node.value
        return None

    def _mapping(self, items: Iterable[tuple[Node, Node]], loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in items:
            place = _mark(key.start_mark)
            if not isinstance(key, ScalarNode):
                self._note(place, loc, "expected a key of text, found a list or a mapping")
                continue
            inner = (*loc, key.value)
            if key.value in values:
                self._note(place, inner, "expected each key once, found it again")
            else:
                self._places[(*inner, KEY)] = place
                values[key.value] = self._value(value, inner)
        return values

    def _scalar(self, node: ScalarNode) -> Any:
        try:
            value = self._constructor.construct_object(node)
        except (ValueError, KeyError):  # more digits than int() takes, or a tag that the text does not fit
            return node.value
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # of which print() may want no part
            return node.value
        return value


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
