"""How far an audit is, as a person on a terminal or a program sees it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from guard.audit.run import Progress

Shown = Literal["auto", "bar", "json", "none"]
Tell = Callable[["Progress"], None]

_EVERY = 1.0  # seconds between two lines of JSON


@contextmanager
def shown(how: Shown) -> Iterator[Tell]:
    """Shows it on stderr: auto is a bar where that is a terminal, else nothing."""
    if how == "auto":
        how = "bar" if sys.stderr.isatty() else "none"
    ways: dict[Shown, Callable[[], Any]] = {"bar": _bar, "json": _json, "none": _nothing}
    with ways[how]() as tell:
        yield tell


class _Pace:
    """How fast it goes, by what this start has done, and how long it will still take."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: Progress | None = None

    def of(self, now: "Progress") -> tuple[float, float | None]:
        """Turns a second; and seconds left, None where nobody knows."""
        first = self._first = self._first or now
        seconds = time.monotonic() - self._started
        rate = (now.totals.turns - first.totals.turns) / seconds if seconds else 0.0
        if now.read is None or first.read is None or now.read <= first.read:
            return rate, None
        return rate, seconds * (1 - now.read) / (now.read - first.read)


@contextmanager
def _bar() -> Iterator[Tell]:
    from rich import progress as bars
    from rich.console import Console

    pace = _Pace()
    columns = bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("{task.description}")
    with bars.Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("reading", total=None)

        def tell(progress: "Progress") -> None:
            total = None if progress.read is None else 1.0
            bar.update(task, total=total, completed=progress.read or 0.0, description=_in_words(progress, pace))

        yield tell


def _in_words(progress: "Progress", pace: _Pace) -> str:
    totals = progress.totals
    rate, left = pace.of(progress)
    share = f"{totals.refused / totals.turns:.2%} not allowed" if totals.turns else "nothing judged"
    parts = [f"{totals.turns:,} turns", f"{rate:,.1f}/s", share]
    parts += [f"{totals.rejected:,} rejected"] if totals.rejected else []
    parts += [f"{_clock(left)} left"] if left is not None else []
    return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def _json() -> Iterator[Tell]:
    """A line a second, and one at the end."""
    pace = _Pace()
    said = 0.0
    last: Progress | None = None

    def write(progress: "Progress") -> None:
        rate, left = pace.of(progress)
        fields = {
            **asdict(progress.totals),
            "read": progress.read,
            "turns_per_second": round(rate, 3),
            "seconds_left": None if left is None else round(left, 1),
        }
        sys.stderr.write(json.dumps(fields) + "\n")
        sys.stderr.flush()

    def tell(progress: "Progress") -> None:
        nonlocal said, last
        last = progress
        if time.monotonic() - said >= _EVERY:
            said, last = time.monotonic(), None
            write(progress)

    try:
        yield tell
    finally:
        if last is not None:
            write(last)


@contextmanager
def _nothing() -> Iterator[Tell]:
    yield lambda progress: None
