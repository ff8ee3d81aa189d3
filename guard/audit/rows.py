"""The rows of an input, one by one, whatever is wrong with some of them; and from any row on."""

import codecs
import csv
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import IO, Any, BinaryIO, NamedTuple, cast

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.inputs import STDIN, Format, Input

_BUFFER = 2**16  # bytes
_BATCH = 64  # rows of Parquet that are taken at once
_WIDE = ("utf-16", "utf-32")  # of which a line cannot be told by its bytes
_DELIMITERS = ",;\t|"
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    csv.Error,
    pa.ArrowException,
    ijson.JSONError,
    lzma.LZMAError,
    zlib.error,
)


class Row(NamedTuple):
    """A row with its fields, or what is wrong with it; where `rest` is, with all from it on.

    `number` is the line on which it begins, or of JSON arrays and Parquet its place, from 1. `after` is how many lines
    or rows are read after it. `read` is how much of the input is, from 0 to 1.
    """

    number: int
    after: int
    fields: Mapping[str, Any] | None
    problem: str = ""
    rest: bool = False
    read: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How text is encoded, and the bytes from which on a row is rejected."""

    encoding: str = "utf-8"
    max_row_bytes: int = 16 * 2**20


class _Found(NamedTuple):
    """A row by its number, what is read after it, and its fields or the problem.

    `read` is how much of the input is, where the reader knows better than its bytes tell.
    """

    number: int
    after: int
    content: Mapping[str, Any] | str
    read: float | None = None


def rows(source: Input, start: int, limits: Limits) -> Iterator[Row]:
    """The rows after the first `start` lines or rows, as `after` told them.

    What is wrong with a row is told in its place, and nothing is raised: where the input itself cannot be read any
    further, the last row says so.
    """
    after = start
    try:
        with source.opened() as (stream, read):
            pieces: io.BufferedReader[Any] = io.BufferedReader(_Pieces(stream), _BUFFER)
            for number, after, content, known in _READERS[source.format](pieces, start, limits):
                share = read() if known is None else known
                if isinstance(content, str):
                    yield Row(number, after, None, content, read=share)
                else:
                    yield Row(number, after, content, read=share)
    except _UNREADABLE as error:
        yield Row(after + 1, after, None, f"from here on it cannot be read: {_why(error)}", rest=True, read=1.0)


class _Pieces(io.RawIOBase):
    """Gives what has come, as it comes: of a file that is damaged all that is before the damage."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        piece = self._read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def first(source: Input, limits: Limits, count: int) -> list[Mapping[str, Any]]:
    """Some of the first rows, of those that can be read; all of which can be read once more."""
    found: Iterator[Mapping[str, Any] | None]
    if source.url == STDIN:
        found = _fields(source.head(), source.format, limits)
    else:
        found = (row.fields for row in rows(source, 0, limits))
    return [row for row in islice(found, count) if row is not None]


def _fields(head: bytes, format: Format, limits: Limits) -> Iterator[Mapping[str, Any] | None]:
    with suppress(*_UNREADABLE):  # it is cut anywhere
        for _, _, row, _ in _READERS[format](io.BufferedReader(_Pieces(io.BytesIO(head))), 0, limits):
            yield None if isinstance(row, str) else row


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeError):
        return f"is not {getattr(error, 'encoding', 'Unicode')}"
    if isinstance(error, ijson.JSONError):  # which quotes what it read
        return "is not JSON"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _json_lines(stream: io.BufferedReader, start: int, limits: Limits) -> Iterator[_Found]:
    for number, line in _lines(stream, limits):
        if number > start and not (isinstance(line, str) and not line.strip()):
            yield _Found(number, number, line.problem if isinstance(line, _Bad) else _object(line))


def _json(stream: io.BufferedReader, start: int, limits: Limits) -> Iterator[_Found]:
    """Lines, or one array of rows, whichever it begins as."""
    encoding = _encoding(stream, limits)
    if not stream.peek(64)[:64].decode(encoding, "ignore").lstrip().startswith("["):
        yield from _json_lines(stream, start, replace(limits, encoding=encoding))
        return
    text = stream if encoding == "utf-8" else _Utf8(stream, encoding)
    for number, row in enumerate(ijson.items(text, "item"), 1):
        if number > start:
            yield _Found(number, number, row if isinstance(row, dict) else "should be a JSON object")


class _Utf8:
    """Text of another encoding, for the reader of JSON arrays."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder(encoding)().decode

    def read(self, size: int = -1) -> bytes:
        """Nothing is the end, which half a character is not."""
        while piece := self._stream.read(size):
            if text := self._decode(piece):
                return text.encode(errors="surrogatepass")
        self._decode(b"", True)
        return b""


def _object(line: str) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not JSON, at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError):  # a number of thousands of digits, or too deep
        return "is not JSON"
    return row if isinstance(row, dict) else "should be a JSON object"


def _comma_separated(stream: io.BufferedReader, start: int, limits: Limits) -> Iterator[_Found]:
    """The first line names the columns, and tells by what they are separated."""
    csv.field_size_limit(limits.max_row_bytes)
    feed = _Feed(_lines(stream, limits))
    header = next(feed, None)
    if header is None or feed.problem:
        if feed.problem and start == 0:
            yield _Found(1, 1, feed.problem)
        return
    delimiter = max(_DELIMITERS, key=header.count)
    columns = next(csv.reader([header], delimiter=delimiter))
    while feed.number < start and next(feed, None) is not None:
        pass
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        number = feed.number + 1
        feed.problem = ""
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield _Found(number, feed.number, f"is not CSV: {error}")
            continue
        if fields is None:
            return
        if feed.problem:
            yield _Found(number, feed.number, feed.problem)
        elif len(fields) != len(columns):
            if fields:  # else it is a blank line
                yield _Found(number, feed.number, f"has {len(fields)} fields, and the first line {len(columns)}")
        else:
            yield _Found(number, feed.number, dict(zip(columns, fields, strict=True)))


class _Feed:
    """Lines for the reader of CSV, which takes several for a row; `problem` is what is wrong with any of them."""

    def __init__(self, lines: Iterator[tuple[int, "str | _Bad"]]) -> None:
        self._lines = lines
        self.number = 0
        self.problem = ""

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, _Bad):
            self.problem = line.problem
            return "\n"
        return line


def _parquet(stream: io.BufferedReader, start: int, limits: Limits) -> Iterator[_Found]:
    """A row group may be all there is, so that bytes would tell nothing."""
    file = pq.ParquetFile(cast("IO[Any]", stream))
    total = file.metadata.num_rows
    number = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if number + size <= start:
            number += size
            continue
        for batch in file.iter_batches(_BATCH, row_groups=[group]):
            for row in _values(batch):
                number += 1
                if number > start:
                    content = row if isinstance(row, str) else _not_too_long(row, batch.nbytes, limits)
                    yield _Found(number, number, content, number / total)


def _values(batch: pa.RecordBatch) -> Sequence[Mapping[str, Any] | str]:
    """The rows of a batch, or what is wrong with single ones: a time in no year that Python knows, bytes for text."""
    schema = pa.schema([field.with_type(_readable(field.type)) for field in batch.schema])
    try:
        return batch.cast(schema, safe=False).to_pylist()
    except _UNREADABLE as error:
        if batch.num_rows == 1:
            return [f"cannot be read: {type(error).__name__}"]
        return [row for place in range(batch.num_rows) for row in _values(batch.slice(place, 1))]


def _readable(kind: Any) -> Any:
    """That type; of times in nanoseconds, which Python has not, the one in microseconds."""
    return pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) and kind.unit == "ns" else kind


def _not_too_long(row: Mapping[str, Any], most: int, limits: Limits) -> Mapping[str, Any] | str:
    """Whether a row is so long can only be if its batch is."""
    if most > limits.max_row_bytes and (size := len(json.dumps(row, default=str))) > limits.max_row_bytes:
        return _too_long(size, limits)
    return row


class _Bad(NamedTuple):
    problem: str


def _encoding(stream: io.BufferedReader, limits: Limits) -> str:
    """What the byte order mark tells, which is passed over where it is no part of the encoding; or else the limits."""
    begins = stream.peek(4)
    if begins.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return "utf-8"
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return codecs.lookup(limits.encoding).name


def _lines(stream: io.BufferedReader, limits: Limits) -> Iterator[tuple[int, str | _Bad]]:
    """Number and text of each line; one that is too long is not held. Raises UnicodeError for text of wide units."""
    encoding = _encoding(stream, limits)
    if encoding.startswith(_WIDE):
        wide = io.TextIOWrapper(stream, encoding, newline="\n")
        try:
            yield from _cut(wide.readline, "\n", limits, lambda line: line)
        finally:
            wide.detach()  # which would be closed with it
    else:
        yield from _cut(stream.readline, b"\n", limits, lambda line: _decoded(line, encoding))


def _cut(
    readline: Callable[[int], Any], newline: Any, limits: Limits, decoded: Callable[[Any], str | _Bad]
) -> Iterator[tuple[int, str | _Bad]]:
    number = 0
    while line := readline(limits.max_row_bytes + 1):
        number += 1
        if len(line) > limits.max_row_bytes:
            size = len(line)
            while not line.endswith(newline) and (line := readline(limits.max_row_bytes)):
                size += len(line)
            yield number, _Bad(_too_long(size, limits))
        else:
            yield number, decoded(line)


def _decoded(line: bytes, encoding: str) -> str | _Bad:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        return _Bad(f"is not {encoding}, at byte {error.start + 1}")


def _too_long(size: int, limits: Limits) -> str:
    return f"is {size:,} bytes long, more than {limits.max_row_bytes:,}"


_READERS: Mapping[str, Callable[[io.BufferedReader, int, Limits], Iterator[_Found]]] = MappingProxyType(
    {"jsonl": _json_lines, "json": _json, "csv": _comma_separated, "tsv": _comma_separated, "parquet": _parquet}
)
