"""Stages that run beside each other: each takes from the one before it on a thread of its own, a little ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TypeVar

_Item = TypeVar("_Item")
_END = object()


def ahead(source: Iterator[_Item], thread: Executor, most: int = 2) -> Iterator[_Item]:
    """The items of `source`, up to `most` of which are taken on that one thread before they are asked for.

    What `source` raises is raised here, after the items before it.
    """
    waiting = deque(thread.submit(next, source, _END) for _ in range(most))
    try:
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, source, _END))
            yield item  # type: ignore[misc]  # whatever is not the end is an item
    finally:
        for future in waiting:
            future.cancel()
