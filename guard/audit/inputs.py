"""What is to be read: files, globs, folders, object stores and standard input, by the names that people give them."""

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, cast

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from guard.errors import ConfigError
from guard.policy.messages import did_you_mean

Format = Literal["jsonl", "json", "csv", "tsv", "parquet"]

STDIN = "-"
FORMATS: Mapping[str, Format] = MappingProxyType(
    {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "tsv": "tsv", "parquet": "parquet"}
)
"""By ending. A file of JSON holds lines or one array of rows."""

_MAGIC = "*?["
_HEAD = 2**20  # bytes
_LINES = 200  # of standard input, more than what shows a shape


def _standard_input() -> "io.BufferedReader[Any]":
    return _peekable(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))


@lru_cache(maxsize=1)
def _peekable(raw: Any) -> "io.BufferedReader[Any]":
    return io.BufferedReader(_Piped(raw), _HEAD)


class _Piped(io.RawIOBase):
    """Waits at first for as much as shows a shape, since a pipe may bring it in any pieces."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._is_begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = lines = 0
        while piece := self._raw.read(len(buffer) - size):
            buffer[size : size + len(piece)] = piece
            size += len(piece)
            lines += piece.count(b"\n")
            if self._is_begun or size == len(buffer) or lines >= _LINES:
                break
        self._is_begun = True
        return size


def _zstandard(raw: BinaryIO) -> BinaryIO:
    stream = pa.CompressedInputStream(pa.PythonFile(cast("io.IOBase", raw), mode="r"), "zstd")
    return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", stream)))


_COMPRESSIONS: Mapping[str, Callable[[BinaryIO], BinaryIO]] = MappingProxyType(
    {
        "gz": lambda raw: cast("BinaryIO", gzip.GzipFile(fileobj=raw)),
        "bz2": lambda raw: cast("BinaryIO", bz2.BZ2File(raw)),
        "xz": lambda raw: cast("BinaryIO", lzma.open(raw)),  # noqa: SIM115 # closed with what it reads
        "zst": _zstandard,
    }
)


@dataclass(frozen=True, slots=True)
class Input:
    """A file, or standard input.

    `url` is what people call it by, `path` what opens it. `size` is in bytes, and `modified` whatever changes when it
    does; None where nobody knows.
    """

    url: str
    path: str
    format: Format
    compression: str | None = None
    size: int | None = None
    modified: str | None = None

    def head(self) -> bytes:
        """The beginning of standard input, which can still be read from there: lines enough to show what they are."""
        return _standard_input().peek(_HEAD)

    @contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, Callable[[], float | None]]]:
        """Its content, without compression; and how much of it is read, from 0 to 1. Raises OSError."""
        if self.url == STDIN:
            yield cast("BinaryIO", _standard_input()), lambda: None
            return
        with fsspec.open(self.path, "rb") as raw:
            size = self.size
            stream = _COMPRESSIONS[self.compression](raw) if self.compression else raw
            yield stream, lambda: min(1.0, raw.tell() / size) if size else None


def find_inputs(arguments: Iterable[str], format: str | None = None, out: Path | None = None) -> tuple[Input, ...]:
    """In the order of the arguments, and by name within a glob or a folder; a file that is named twice, once.

    `format` is theirs whatever their endings say. What lies in the folder `out`, to which an audit writes, is passed
    over. Raises ConfigError for an argument that names nothing to read.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format: expected {', '.join(FORMATS)}, found '{format}'{did_you_mean(format, FORMATS)}")
    found: dict[str, Input] = {}
    for argument in arguments:
        for one in _found(argument, FORMATS[format] if format else None):
            if out is None or not Path(one.path).resolve().is_relative_to(out.resolve()):
                found.setdefault(one.path, one)
    return tuple(found.values())


def _found(argument: str, format: Format | None) -> Iterator[Input]:
    if argument == STDIN:
        if format == "parquet":
            raise ConfigError("-: Parquet is read from its end, which standard input has not; name a file")
        yield Input(STDIN, STDIN, format or "jsonl")
        return
    try:
        files, path = url_to_fs(argument)
        is_glob = any(sign in path for sign in _MAGIC) and not files.exists(path)
        if is_glob:
            listed = files.glob(path, detail=True)
        elif files.isdir(path):
            listed = files.find(path, detail=True)
        else:
            listed = {path: files.info(path)}
    except FileNotFoundError:
        raise ConfigError(f"{argument}: there is no such file") from None
    except (ImportError, ValueError) as error:  # no driver for that kind of URL, or nobody knows one
        raise ConfigError(f"{argument}: cannot be read: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ConfigError(f"{argument}: cannot be read: {error.strerror or type(error).__name__}") from None
    many = is_glob or files.isdir(path)
    below = len([*takewhile(lambda part: not (is_glob and any(map(part.__contains__, _MAGIC))), Path(path).parts)])
    inputs = [
        one
        for name, about in sorted(listed.items())
        if not (many and any(part.startswith(".") for part in Path(name).parts[below:]))
        and (file := _file(files, name, about))
        and (one := _input(files, argument, name, file, format, chosen=not many))
    ]
    if not inputs and not many:
        raise ConfigError(f"{argument}: is no file; what comes through a pipe is read from standard input, -")
    if not inputs:
        raise ConfigError(f"{argument}: holds nothing to read, which would end in {_endings()}")
    yield from inputs


def _file(files: Any, name: str, about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is known of a file, or of the one that a link leads to; None for all else."""
    if about.get("islink"):  # in a list it is told of the link
        try:
            about = files.info(name)
        except FileNotFoundError:  # which whoever reads it will tell
            return about
    return about if about["type"] == "file" else None


def _input(
    files: Any, argument: str, name: str, about: Mapping[str, Any], format: Format | None, *, chosen: bool
) -> Input | None:
    """None for one that is not of a kind that can be read, unless it was named itself."""
    *_, ending = stem_parts = Path(name).name.lower().split(".")
    compression = ending if len(stem_parts) > 1 and ending in _COMPRESSIONS else None
    known = FORMATS.get(stem_parts[-2 if compression else -1]) if len(stem_parts) > 1 else None
    if not chosen and known is None:
        return None
    if format is None and known is None:
        raise ConfigError(f"{argument}: expected a name that ends in {_endings()}; or say --format")
    is_local = "file" in files.protocol
    modified = about.get("mtime") or about.get("ETag") or about.get("etag") or about.get("LastModified")
    if isinstance(modified, float):
        modified = datetime.fromtimestamp(modified, UTC).isoformat()
    return Input(
        url=_short(name, argument) if is_local else files.unstrip_protocol(name),
        path=name if is_local else files.unstrip_protocol(name),
        format=format or cast("Format", known),
        compression=compression,
        size=about.get("size"),
        modified=None if modified is None else str(modified),
    )


def _short(name: str, argument: str) -> str:
    """As relative as the argument was."""
    path, here = Path(name), Path.cwd()
    return str(path.relative_to(here)) if not Path(argument).is_absolute() and path.is_relative_to(here) else name


def _endings() -> str:
    return (
        f"{', '.join(f'.{ending}' for ending in FORMATS)}, each also with {', '.join(f'.{c}' for c in _COMPRESSIONS)}"
    )
