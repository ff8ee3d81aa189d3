"""Turns that stand in rows of their own, gathered into conversations, however they are mixed and over how many files.

All rows are written aside, sorted by duckdb in bounded memory, and read back conversation by conversation.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.records import Place, Record, Reject
from guard.audit.shapes import MAX_TURNS, Said
from guard.errors import ConfigError
from guard.types import Role, Turn

_MEMORY = "256MB"
_MOST = 2**24  # characters of a conversation
_BATCH = 1024  # rows that are written at once
_SORTED = "sorted.parquet"
_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("sequence", pa.int64()),
    ("conversation", pa.string()),
    ("number", pa.float64()),
    ("input", pa.string()),
    ("row", pa.int64()),
    ("reason", pa.string()),
    ("rest", pa.bool_()),
    ("role", pa.string()),
    ("text", pa.string()),
    ("policy", pa.string()),
    ("metadata", pa.string()),
    ("time", pa.timestamp("us", "UTC")),
    ("language", pa.string()),
    ("source", pa.string()),
]
_SCHEMA = pa.schema(_COLUMNS)
# In the order of their first rows; of a conversation by the numbers of its turns, or by time, or else as they came.
_SORT = """
COPY (
  SELECT spool.* FROM read_parquet($spool) spool
  JOIN (SELECT conversation, min(sequence) AS first FROM read_parquet($spool) GROUP BY conversation)
  USING (conversation)
  ORDER BY first, number NULLS LAST, time NULLS LAST, sequence
) TO '{sorted}' (FORMAT parquet, ROW_GROUP_SIZE 2048)
"""


def gather(said: Iterable[Said | Reject], folder: Path) -> None:
    """Sorts turns in that folder, which nobody else may read; where that was done before, nothing is done.

    Raises ConfigError where the folder cannot be written.
    """
    if (folder / _SORTED).exists():
        return
    try:
        forget(folder)
        folder.mkdir(parents=True, mode=0o700)
        with pq.ParquetWriter(folder / "spool.parquet", _SCHEMA) as writer:
            for rows in _batches(said):
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
        with duckdb.connect(config={"memory_limit": _MEMORY, "temp_directory": str(folder)}) as database:
            aside = folder / f".{_SORTED}"
            quoted = str(aside).replace("'", "''")
            database.execute(_SORT.format(sorted=quoted), {"spool": str(folder / "spool.parquet")})
        aside.rename(folder / _SORTED)
        (folder / "spool.parquet").unlink()
    except (OSError, duckdb.Error, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigError(f"{folder}: rows cannot be sorted there: {why}") from None


def gathered(folder: Path, start: int) -> Iterator[tuple[int, int, Record | Reject]]:
    """Rows read after it, rows in all, and each conversation; without the first `start` rows."""
    file = pq.ParquetFile(folder / _SORTED)
    total = file.metadata.num_rows
    numbered = enumerate((row for batch in file.iter_batches(_BATCH) for row in batch.to_pylist()), 1)
    later = ((number, row) for number, row in numbered if number > start)
    for _, group in groupby(later, key=lambda one: one[1]["conversation"]):
        turns: list[dict[str, Any]] = []
        after, size = start, 0
        for number, row in group:
            after = number
            size += len(row["text"] or "")
            if not turns or (len(turns) <= MAX_TURNS and size <= _MOST):
                turns.append(row)
        if size > _MOST:
            yield after, total, Reject(Place(turns[0]["input"], turns[0]["row"]), f"has more than {_MOST:,} characters")
            continue
        yield after, total, _record(turns[0], turns)


def forget(folder: Path) -> None:
    """Takes away the texts that were written aside."""
    shutil.rmtree(folder, ignore_errors=True)


def _batches(said: Iterable[Said | Reject]) -> Iterator[list[dict[str, Any]]]:
    waiting = []
    for sequence, one in enumerate(said):
        waiting.append({"sequence": sequence, **_row(one, sequence)})
        if len(waiting) == _BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _row(said: Said | Reject, sequence: int) -> dict[str, Any]:
    if isinstance(said, Reject):  # a conversation by itself, which no id is like
        place = {"input": said.place.input, "row": said.place.row}
        return {"conversation": f"\0{sequence}", **place, "reason": said.reason, "rest": said.rest}
    record = said.record
    (turn,) = record.turns
    return {
        "conversation": said.conversation,
        "number": said.order,
        "input": record.place.input,
        "row": record.place.row,
        "role": turn.role.value,
        "text": turn.text,
        "policy": record.policy,
        "metadata": json.dumps(dict(record.metadata)),
        "time": record.time,
        "language": record.language,
        "source": record.source,
    }


def _record(first: dict[str, Any], turns: list[dict[str, Any]]) -> Record | Reject:
    """A conversation, of which the first row tells all but the turns."""
    place = Place(first["input"], first["row"])
    if first["reason"] is not None:
        return Reject(place, first["reason"], first["rest"])
    if len(turns) > MAX_TURNS:
        return Reject(place, f"has more than {MAX_TURNS} turns")
    return Record(
        place=place,
        id=first["conversation"],
        turns=tuple(Turn(Role(row["role"]), row["text"]) for row in turns),
        policy=first["policy"],
        metadata=json.loads(first["metadata"]),
        time=first["time"],
        language=first["language"],
        source=first["source"],
    )
