"""The audit: what is read is judged and written down, and how far it is told."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from guard.audit.ahead import ahead
from guard.audit.judge import Judge, Judged, Judging, Source
from guard.audit.output import Output, Totals
from guard.audit.records import Position
from guard.audit.stop import Stop
from guard.errors import InputError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an audit is: `read` of the inputs, from 0 to 1, or None where nobody knows; and what is done."""

    totals: Totals
    read: float | None


def run(source: Source, judging: Judging, output: Output, stop: Stop, max_bad: int | None = None) -> Iterator[Progress]:
    """Goes on from where the output is, to the end, telling after each window how far it is.

    Raises Stopped soon after that is asked for; InputError where more than `max_bad` rows are rejected; and whatever
    reading, judging and writing raise.
    """
    for judged in judging.judged(source, output.position, stop):
        output.add(judged)
        totals = output.totals
        yield Progress(totals, judged.read)
        if max_bad is not None and totals.rejected > max_bad:
            raise InputError("max-bad", f"{totals.rejected} rows are rejected, more than {max_bad}")
        stop.check()
    output.finish()


class Local:
    """Judges in this process: it is read, made ready and scored on a thread each, and told on the caller's."""

    def __init__(self, judge: Judge, model: Executor) -> None:
        """`model` is the one thread that the judge's model was loaded on."""
        self.schema: pa.Schema = judge.schema
        self._judge = judge
        self._model = model

    def judged(self, source: Source, start: Position, stop: Stop) -> Iterator[Judged]:
        judge = self._judge
        with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "prepare") as preparing:
            windows = ahead(source.windows(start, judge.window), reading)
            prepared = ahead(map(judge.prepare, windows), preparing)
            yield from map(judge.tell, ahead(map(partial(judge.score, stop=stop), prepared), self._model))
