"""From inputs to windows of conversations: what is read of logs, from any position on."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from guard.audit import group
from guard.audit.inputs import STDIN, Input, find_inputs
from guard.audit.records import Place, Position, Record, Reject, Window
from guard.audit.rows import Limits, Row, first, rows
from guard.audit.shapes import Said, Shape
from guard.audit.stop import Stop
from guard.errors import ConfigError
from guard.types import Role, Turn

_SAMPLE = 100  # rows by which a shape is found out
_ITEM = 64  # characters that a record counts as, beside its text


class _Read(NamedTuple):
    """A conversation, with the position after it and how much of all inputs is read."""

    item: Record | Reject
    end: Position
    read: float | None


@dataclass(frozen=True, slots=True)
class Logs:
    """Inputs whose rows have that shape; where a conversation is spread over rows, `spool` is where they are sorted."""

    inputs: tuple[Input, ...]
    shape: Shape
    limits: Limits
    spool: Path

    @property
    def is_spread(self) -> bool:
        return self.shape.kind == "rows"

    def gather(self, stop: Stop) -> None:
        """Where conversations are spread over rows, sorts them, which comes before all else.

        Raises ConfigError; and Stopped, while it reads them.
        """
        if self.is_spread:
            group.gather(self._said(stop), self.spool)

    def forget(self) -> None:
        """Takes away what was sorted, once it is read."""
        if self.is_spread:
            group.forget(self.spool)

    def windows(self, start: Position, characters: int) -> Iterator[Window]:
        """From a position on, in windows of about so many characters."""
        waiting: list[Record | Reject] = []
        size, last = 0, None
        for last in self._gathered(start) if self.is_spread else self._read(start):
            waiting.append(last.item)
            size += _ITEM + (0 if isinstance(last.item, Reject) else sum(len(turn.text) for turn in last.item.turns))
            if size >= characters:
                yield Window(tuple(waiting), last.end, last.read)
                waiting, size = [], 0
        if last is not None and waiting:
            yield Window(tuple(waiting), last.end, last.read)

    def _read(self, start: Position) -> Iterator[_Read]:
        for place, row, read in self._rows(start):
            where = Place(self.inputs[place].url, row.number)
            item = Reject(where, row.problem, row.rest) if row.fields is None else self.shape.record(where, row.fields)
            yield _Read(item, Position(place + 1, 0) if row.rest else Position(place, row.after), read)

    def _gathered(self, start: Position) -> Iterator[_Read]:
        for after, total, item in group.gathered(self.spool, start.rows):
            yield _Read(item, Position(0, after), after / total)

    def _said(self, stop: Stop) -> Iterator[Said | Reject]:
        for place, row, _ in self._rows(Position()):
            stop.check()
            where = Place(self.inputs[place].url, row.number)
            yield Reject(where, row.problem, row.rest) if row.fields is None else self.shape.said(where, row.fields)

    def _rows(self, start: Position) -> Iterator[tuple[int, Row, float | None]]:
        sizes = [source.size for source in self.inputs]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        for place in range(start.input, len(self.inputs)):
            before = sum(size or 0 for size in sizes[:place])
            for row in rows(self.inputs[place], start.rows if place == start.input else 0, self.limits):
                read = None if row.read is None or not total else (before + row.read * (sizes[place] or 0)) / total
                yield place, row, read


def sample(inputs: Sequence[Input], limits: Limits) -> Sequence[Mapping[str, Any]]:
    """The first rows that can be read, of the first input that has any."""
    for source in inputs:
        if found := first(source, limits, _SAMPLE):
            return found
    return []


def facts_of(logs: Logs) -> Mapping[str, Any]:
    """What is read, and how, as JSON has it."""
    return {
        "inputs": [asdict(source) for source in logs.inputs],
        "shape": logs.shape.kind,
        "map": dict(logs.shape.columns),
        "roles": dict(logs.shape.roles),
        **asdict(logs.limits),
    }


def read_again(facts: Mapping[str, Any], out: Path) -> Callable[[Collection[Place]], Mapping[Place, Sequence[Turn]]]:
    """Finds what was said at places of the inputs of an audit with those facts, in that folder."""
    shape = Shape(facts["shape"], facts["map"], {word: Role(role) for word, role in facts["roles"].items()})
    inputs = tuple(Input(**source) for source in facts["inputs"])
    logs = Logs(inputs, shape, Limits(facts["encoding"], facts["max_row_bytes"]), out / "spool")

    def found(places: Collection[Place]) -> Mapping[Place, Sequence[Turn]]:
        if STDIN in [source.url for source in inputs]:
            raise ConfigError(f"{out}: its texts came from standard input, and were kept by nobody; audit --with-text")
        for source in inputs:
            (now,) = find_inputs([source.path], source.format)
            if (now.size, now.modified) != (source.size, source.modified):
                raise ConfigError(f"{source.url}: has changed since it was audited; its texts may be others now")
        logs.gather(Stop())
        records = (item for window in logs.windows(Position(), 2**20) for item in window.items)
        said = {item.place: item.turns for item in records if isinstance(item, Record) and item.place in places}
        logs.forget()
        return said

    return found
