"""The audit: what is read is judged and written down, and how far it is told."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from guard.audit.ahead import ahead
from guard.audit.judge import Judge, Judged, Judging
from guard.audit.output import Output, Totals
from guard.audit.records import Position, Window
from guard.errors import InputError


class Source(Protocol):
    """Whatever gives windows of conversations from a position on, each of about so many characters."""

    def windows(self, start: Position, characters: int) -> Iterator[Window]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an audit is: `read` of the inputs, from 0 to 1, or None where nobody knows; and what is done."""

    totals: Totals
    read: float | None


def run(source: Source, judging: Judging, output: Output, characters: int, max_bad: int | None) -> Iterator[Progress]:
    """Goes on from where the output is, to the end, telling after each window how far it is.

    Raises InputError where more than `max_bad` rows are rejected; and whatever reading, judging and writing raise.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reading:
        windows = ahead(source.windows(output.position, characters), reading)
        for judged in judging.judged(windows):
            output.add(judged)
            totals = output.totals
            yield Progress(totals, judged.read)
            if max_bad is not None and totals.rejected > max_bad:
                raise InputError("max-bad", f"{totals.rejected} rows are rejected, more than {max_bad}")
    output.finish()


class Local:
    """Judges in this process: on one thread what the model reads is made ready, on another it reads."""

    def __init__(self, judge: Judge, model: ThreadPoolExecutor) -> None:
        """`model` is the thread that the judge's model was loaded on."""
        self.schema: pa.Schema = judge.schema
        self._judge = judge
        self._model = model

    def judged(self, windows: Iterator[Window]) -> Iterator[Judged]:
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as preparing:
            prepared = ahead(map(self._judge.prepare, windows), preparing)
            yield from map(self._judge.tell, ahead(map(self._judge.score, prepared), self._model))
