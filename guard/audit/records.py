"""The nouns of an audit: a conversation as the input has it, a row that could not be read, and a window of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from guard.types import Turn


@dataclass(frozen=True, slots=True)
class Place:
    """A row of an input, from 1; 0 is the input as a whole. A row of JSON Lines and CSV is told by its first line."""

    input: str
    row: int


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation, every turn of which is to be judged.

    `id` is the input's own, or INPUT:ROW. `policy` is empty where the row names none. `time` has a time zone; language
    and source are as the input writes them, and empty where it does not tell.
    """

    place: Place
    id: str
    turns: tuple[Turn, ...]
    policy: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    time: datetime | None = None
    language: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row, or from it on the `rest` of an input, that is not judged, and why; nobody's text is in the reason."""

    place: Place
    reason: str
    rest: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """How far the inputs are read: those before `input`, a place in their list, wholly, and of it so many rows."""

    input: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """What is read, judged and written down together, in the order of the inputs.

    `end` is the position after it. `read` is about how much of the inputs is read by then, from 0 to 1; None where
    nobody knows.
    """

    items: tuple[Record | Reject, ...]
    end: Position
    read: float | None = None
