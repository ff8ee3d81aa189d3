"""Conversations to audit that are in no file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guard.audit.records import Place, Position, Record, Reject, Window
from guard.types import Role, Turn

Item = Record | Reject


@dataclass(frozen=True)
class Listed:
    """A source of items that are there already; its one input is called `listed`."""

    items: Sequence[Item]

    def windows(self, start: Position, characters: int) -> Iterator[Window]:
        waiting: list[Item] = []
        size = 0
        for row in range(start.rows, len(self.items)):
            waiting.append(self.items[row])
            size += 1 + sum(len(turn.text) for turn in getattr(waiting[-1], "turns", ()))
            if size >= characters or row + 1 == len(self.items):
                yield Window(tuple(waiting), Position(0, row + 1), (row + 1) / len(self.items))
                waiting, size = [], 0


def said(*texts: str, row: int = 1, policy: str = "", **metadata: str) -> Record:
    """What a user and an agent say in turn."""
    turns = tuple(Turn((Role.USER, Role.AGENT)[place % 2], text) for place, text in enumerate(texts))
    return Record(Place("listed", row), f"listed:{row}", turns, policy, metadata)


def many(count: int) -> list[Item]:
    """Conversations of several lengths, some of them the same, and rows that are rejected."""
    return [
        Reject(Place("listed", row), "is not JSON") if row % 7 == 3 else said(*_texts(row), row=row)
        for row in range(1, count + 1)
    ]


def _texts(row: int) -> list[str]:
    return [f"Say number {row % 11 * place}! " * (1 + row % 5) for place in range(1, 2 + row % 4)]
