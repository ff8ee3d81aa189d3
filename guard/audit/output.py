"""What an audit writes, so that whenever it is stopped it goes on from there: nothing is lost, nothing told twice.

    audit.json      what was in force; a run with other arguments does not go on from here
    manifest.jsonl  a line for each part that is whole, with the position in the inputs after it
    parts/          rows by guard.audit.schema, in the order of the inputs; only those in the manifest count
    rejects.jsonl   {"input", "row", "reason"} of what was not judged, as long as the manifest says

A part is written aside, brought to the disk and renamed; then come its rejects, and last its line in the manifest.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.judge import Judged
from guard.audit.records import Position, Reject
from guard.errors import ConfigError

FACTS = "audit.json"
MANIFEST = "manifest.jsonl"
PARTS = "parts"
REJECTS = "rejects.jsonl"
FORMAT = 1

_LOCK = ".lock"
_PART_TURNS = 100_000
_PART_SECONDS = 30.0  # at most so much work is done again after kill -9
_GROUP_BYTES = 32 * 2**20  # of rows that wait to be written together
_SHOWN = 10  # differences
_FREE = {"version", "engine"}  # facts that may differ from one start to the next


@dataclass(frozen=True, slots=True)
class Totals:
    """What is written: counts, and the seconds it took. `incomplete` are inputs of which the rest cannot be read."""

    conversations: int = 0
    turns: int = 0
    refused: int = 0
    rejected: int = 0
    incomplete: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        mine, theirs = asdict(self), asdict(other)
        return Totals(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(slots=True)
class _Part:
    """What is judged and not yet in the manifest; `end` is the position after it."""

    begun: float = field(default_factory=time.monotonic)
    tables: list[pa.Table] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    counted: Totals = Totals()
    end: Position | None = None
    writer: pq.ParquetWriter | None = None

    @property
    def totals(self) -> Totals:
        return replace(self.counted, seconds=round(time.monotonic() - self.begun, 3))


class Output:
    """The folder of an audit; made by `open_output`. Raises ConfigError where something cannot be written."""

    def __init__(
        self, folder: Path, schema: pa.Schema, position: Position, written: Sequence[Totals], part_seconds: float
    ) -> None:
        self.folder = folder
        self.position = position
        self.written = sum(written, Totals())
        self._schema = schema
        self._parts = len(written)
        self._part_seconds = part_seconds
        self._part = _Part()
        self._aside = folder / PARTS / ".part"
        self._is_broken = False

    @property
    def totals(self) -> Totals:
        """Of all that was judged, also what is still to be written."""
        return self.written + self._part.totals

    def add(self, judged: Judged) -> None:
        """Takes the next window; from time to time that ends a part."""
        part = self._part
        part.tables.append(judged.rows)
        part.rejects += judged.rejects
        part.counted += Totals(
            judged.conversations,
            judged.rows.num_rows,
            judged.refused,
            len(judged.rejects),
            sum(reject.rest for reject in judged.rejects),
            judged.tokens,
        )
        part.end = judged.end
        if part.counted.turns >= _PART_TURNS or part.totals.seconds >= self._part_seconds:
            self.commit()
        elif sum(table.nbytes for table in part.tables) >= _GROUP_BYTES:
            with self._told():
                self._write(part)

    def commit(self) -> None:
        """Makes a part of what was added since the last one."""
        part = self._part
        if part.end is None or self._is_broken:
            return
        with self._told():
            self._write(part)
            file = self._close(part.writer) if part.writer else None
            rejects = "".join(_line({**asdict(each.place), "reason": each.reason}) for each in part.rejects)
            size = _append(self.folder / REJECTS, rejects)
            totals = part.totals
            said = {"part": file, **asdict(totals), "rejects_bytes": size, "end": asdict(part.end)}
            _append(self.folder / MANIFEST, _line(said))
        self.position = part.end
        self.written += totals
        self._parts += 1
        self._part = _Part()

    def finish(self) -> None:
        """Says in the manifest that all is read."""
        self.commit()
        if not is_complete(self.folder):
            with self._told():
                _append(self.folder / MANIFEST, _line({"complete": True}))

    def _write(self, part: _Part) -> None:
        """The rows that wait, as a group."""
        tables = [table for table in part.tables if table.num_rows]
        part.tables = []
        if tables:
            part.writer = part.writer or pq.ParquetWriter(self._aside, self._schema, compression="zstd")
            part.writer.write_table(pa.concat_tables(tables).unify_dictionaries())

    def _close(self, writer: pq.ParquetWriter) -> str:
        name = f"{PARTS}/part-{self._parts:06}.parquet"
        writer.close()
        _synced(self._aside)
        self._aside.rename(self.folder / name)
        _synced(self.folder / PARTS)
        return name

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            self._is_broken = True
            self._aside.unlink(missing_ok=True)
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
            raise ConfigError(
                f"{self.folder}: cannot be written: {why}; what the manifest names is whole, and the same command goes "
                "on from there"
            ) from None


@contextmanager
def open_output(
    folder: Path, facts: Mapping[str, Any], schema: pa.Schema, part_seconds: float = _PART_SECONDS
) -> Iterator[Output]:
    """The output in that folder: a new one, or one that goes on from what is there, for this process alone.

    What was not committed is taken away. On the way out what was judged is committed, whatever was raised. Raises
    ConfigError for a folder that holds something else, or an audit with other facts, naming the differences.
    """
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None
    with lock:
        _take(lock, folder)
        manifest = _resumed(folder, facts)
        done = [Totals(**{name: part[name] for name in asdict(Totals())}) for part in manifest]
        position = Position(**manifest[-1]["end"]) if manifest else Position()
        output = Output(folder, schema, position, done, part_seconds)
        try:
            yield output
        finally:
            output.commit()


def is_complete(folder: Path) -> bool:
    """Whether all inputs of an audit are read."""
    return any("complete" in line for line in _lines(folder / MANIFEST))


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The finished parts, in order. One whose rows were all rejected names no file."""
    return [line for line in _lines(folder / MANIFEST) if "part" in line]


def read_facts(folder: Path) -> dict[str, Any]:
    """What was in force. Raises ConfigError where no audit is in that folder."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: there is no audit, since there is no {FACTS}") from None
    except (OSError, ValueError):
        raise ConfigError(f"{folder / FACTS}: cannot be read") from None
    if facts.get("format") != FORMAT:
        raise ConfigError(f"{folder / FACTS}: expected format {FORMAT}, found {facts.get('format')!r}")
    return facts


def part_files(folder: Path) -> list[Path]:
    """The files of the finished parts, in order."""
    return [folder / part["part"] for part in read_manifest(folder) if part["part"]]


def _take(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"{folder}: another audit is at work there") from None


def _resumed(folder: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts that are there, with all else taken away. Raises ConfigError."""
    if (folder / FACTS).exists():
        _check_same(folder, read_facts(folder), json.loads(json.dumps(facts)))
    elif others := sorted(path.name for path in folder.iterdir() if path.name not in (PARTS, _LOCK, f".{FACTS}")):
        raise ConfigError(f"{folder}: expected an empty folder or an audit, found {others[0]}")
    try:
        if not (folder / FACTS).exists():
            aside = folder / f".{FACTS}"
            aside.write_text(json.dumps({"format": FORMAT, **facts}, indent=2) + "\n", encoding="utf-8")
            _synced(aside)
            aside.rename(folder / FACTS)
            _synced(folder)
        manifest = read_manifest(folder)
        whole = sum(len(_line(line)) for line in _lines(folder / MANIFEST))
        for name, size in ((MANIFEST, whole), (REJECTS, manifest[-1]["rejects_bytes"] if manifest else 0)):
            if (folder / name).exists():
                os.truncate(folder / name, size)
        parts = set(part_files(folder))
        for path in (folder / PARTS).iterdir():
            if path not in parts:
                path.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None
    if gone := [path for path in parts if not path.is_file()]:
        raise ConfigError(f"{min(gone)}: is not there any more, though {MANIFEST} names it")
    return manifest


def _check_same(folder: Path, there: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ConfigError with each fact that differs."""
    different = [
        f"{name}: was {old}, now {new}"
        for key in sorted((there.keys() | given.keys()) - _FREE - {"format"})
        for name, old, new in _differences(key, there.get(key), given.get(key))
    ]
    if different:
        more = [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        listed = "\n".join(f"  {one}" for one in (*different[:_SHOWN], *more))
        raise ConfigError(f"{folder}: holds an audit with other arguments; take another folder\n{listed}")


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    old, new = _in_short(old), _in_short(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list):
        for place, (was, now) in enumerate(zip_longest(old, new)):
            yield from _differences(f"{name}[{place}]", was, now)
    elif old != new:
        yield name, json.dumps(old), json.dumps(new)


def _in_short(fact: Any) -> Any:
    """Of a policy or a model its revision, which stands for all else that is told of it."""
    if isinstance(fact, dict) and "revision" in fact:
        return {key: fact[key] for key in ("name", "revision", "dtype") if key in fact}
    return fact


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole: the last one may have been cut off."""
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        raise ConfigError(f"{path}: cannot be read") from None


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields) + "\n"


def _append(path: Path, text: str) -> int:
    """Writes at the end, wholly or not at all; the size after it."""
    with path.open("ab") as file:
        before = file.seek(0, os.SEEK_END)
        try:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise
        return file.tell()


def _synced(path: Path) -> None:
    """Brings a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
