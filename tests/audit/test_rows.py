"""The rows of inputs of every form, whatever is wrong with some of them, and from any of them on."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.audit.inputs import Input, find_inputs
from guard.audit.rows import Limits, Row, first, rows
from guard.errors import ConfigError

LIMITS = Limits(max_row_bytes=10_000)
ROWS = [{"id": str(number), "text": f"Grüße,\n{number}!"} for number in range(30)]


def one(path: Path) -> Input:
    (found,) = find_inputs([str(path)])
    return found


def read(path: Path, start: int = 0, limits: Limits = LIMITS) -> list[Row]:
    return list(rows(one(path), start, limits))


def problems(path: Path, limits: Limits = LIMITS) -> list[tuple[int, str]]:
    return [(row.number, row.problem) for row in read(path, limits=limits) if row.fields is None]


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comma_separated(delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out, row_group_size=7)
    return out.getvalue()


def zstandard(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


FORMS: dict[str, bytes] = {
    "jsonl": lines(ROWS),
    "ndjson": lines(ROWS),
    "json": json.dumps(ROWS).encode(),
    "csv": comma_separated(),
    "tsv": comma_separated("\t"),
    "parquet": parquet(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "wide.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "wide.csv": comma_separated(";").decode().encode("utf-16"),
    "lines.json": lines(ROWS),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


@pytest.mark.parametrize(
    ("form", "compression"),
    [(form, each) for form in FORMS for each in COMPRESSIONS if form != "parquet" or not each],
)
def test_rows_are_the_same_in_every_form(form: str, compression: str, tmp_path: Path) -> None:
    """And from any row on: what is left then is what was left, with the same numbers."""
    path = tmp_path / f"rows.{form}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMS[form]))
    found = read(path)
    assert [row.fields for row in found] == ROWS
    for place in (0, 1, 12, 29):
        later = read(path, found[place].after)
        assert [row[:3] for row in later] == [row[:3] for row in found[place + 1 :]]
    assert found[-1].read is not None
    assert 0 < found[-1].read <= 1


def test_how_much_of_a_table_is_read_is_told_by_its_rows(tmp_path: Path) -> None:
    """Whose bytes may all be read for the first of them."""
    path = tmp_path / "rows.parquet"
    path.write_bytes(FORMS["parquet"])
    assert [row.read for row in read(path)] == [place / len(ROWS) for place in range(1, len(ROWS) + 1)]


def test_rows_are_told_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    """Blank lines are lines, and no rows; a text in quotes may have several."""
    (tmp_path / "a.csv").write_text('id,text\n1,"a\nb"\n\n2,c\n')
    assert [(row.number, row.after) for row in read(tmp_path / "a.csv")] == [(2, 3), (5, 5)]
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n')
    assert [(row.number, row.after) for row in read(tmp_path / "a.jsonl")] == [(1, 1), (3, 3)]


def test_bad_lines_are_told_and_the_others_read(tmp_path: Path) -> None:
    """With the line and the reason, in which there is nothing of the row."""
    path = tmp_path / "a.jsonl"
    good = b'{"text": "secret"}\n'
    bad = [
        b'{"text": "secret"\n',
        b'["secret"]\n',
        b"secret \xe9\n",
        b"[" * 5000 + b"\n",
        b'{"t": "' + b"s" * 20_000 + b'"}\n',
    ]
    path.write_bytes(good.join([b"", *bad, b""]))
    assert problems(path) == [
        (2, "is not JSON, at column 1: Expecting ',' delimiter"),
        (4, "should be a JSON object"),
        (6, "is not utf-8, at byte 8"),
        (8, "is not JSON"),
        (10, "is 20,010 bytes long, more than 10,000"),
    ]
    assert sum(row.fields is not None for row in read(path)) == 6


def test_bad_rows_of_csv_are_told_and_the_others_read(tmp_path: Path) -> None:
    """Too few or too many fields, another encoding, a quote that does not close."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,a\n2\n3,a,b\n4,caf\xe9\n5,b\n6,"' + b"x" * 20_000 + b'"\n7,c\n8,"open\n')
    found = read(path)
    assert [row.fields["id"] for row in found if row.fields] == ["1", "5", "7"]
    assert problems(path) == [
        (3, "has 1 fields, and the first line 2"),
        (4, "has 3 fields, and the first line 2"),
        (5, "is not utf-8, at byte 6"),
        (7, "is 20,005 bytes long, more than 10,000"),
        (9, "is not CSV: unexpected end of data"),
    ]
    assert {"id": "4", "text": "café"} in [row.fields for row in read(path, limits=Limits("cp1252"))]


def test_an_array_may_have_another_encoding(tmp_path: Path) -> None:
    """Which is told; else it cannot be read, and nobody's text is in the reason."""
    path = tmp_path / "a.json"
    path.write_bytes('[{"text": "secret café"}]'.encode("latin-1"))
    assert [row.fields for row in read(path, limits=Limits("latin-1"))] == [{"text": "secret café"}]
    assert problems(path) == [(1, "from here on it cannot be read: is not JSON")]


def test_numbers_in_an_array_may_be_large(tmp_path: Path) -> None:
    """As the ids of some logs are."""
    path = tmp_path / "a.json"
    path.write_text('[{"id": 18446744073709551615, "time": 1790856000.5}]')
    assert [{name: str(value) for name, value in (row.fields or {}).items()} for row in read(path)] == [
        {"id": "18446744073709551615", "time": "1790856000.5"}
    ]


def test_a_cell_of_parquet_that_cannot_be_read_costs_its_row(tmp_path: Path) -> None:
    """Such as a year that Python does not know; times in nanoseconds lose those alone."""
    seconds = pa.array([1_790_856_000, 10**14, 1_790_856_001], pa.timestamp("s"))
    fine = pa.array([1_790_856_000_000_000_001] * 3, pa.timestamp("ns", "UTC"))
    pq.write_table(pa.table({"seconds": seconds, "fine": fine}), tmp_path / "a.parquet")
    first, bad, last = read(tmp_path / "a.parquet")
    assert first.fields == {"seconds": datetime(2026, 10, 1, 12), "fine": datetime(2026, 10, 1, 12, tzinfo=UTC)}
    assert (bad.number, bad.problem) == (2, "cannot be read: OverflowError")
    assert last.fields


def test_a_table_whose_lines_end_in_carriage_returns_is_told(tmp_path: Path) -> None:
    """As those of old spreadsheets do."""
    (tmp_path / "a.csv").write_bytes(b"id,text\r1,a\r2,b\r")
    ((number, problem),) = problems(tmp_path / "a.csv")
    assert (number, problem.partition(": ")[0]) == (1, "from here on it cannot be read")


@pytest.mark.parametrize(
    ("name", "data", "good"),
    [
        ("cut.jsonl.gz", gzip.compress(lines(ROWS * 100))[:-600], 1),
        ("damaged.jsonl.bz2", bz2.compress(lines(ROWS))[:60] + b"\0" * 60, 0),
        ("cut.jsonl.xz", lzma.compress(lines(ROWS))[:-50], 1),
        ("cut.jsonl.zst", zstandard(lines(ROWS))[:-20], 0),
        ("no.jsonl.gz", lines(ROWS), 0),
        ("cut.parquet", parquet()[:-100], 0),
        ("empty.parquet", b"", 0),
        ("cut.json", json.dumps(ROWS).encode()[:-100], 1),
        ("wide.jsonl", lines(ROWS).decode().encode("utf-16")[:-1], 1),
    ],
)
def test_the_rest_of_an_input_that_cannot_be_read_is_told_once(
    name: str, data: bytes, good: int, tmp_path: Path
) -> None:
    """After the rows before it, which count."""
    path = tmp_path / name
    path.write_bytes(data)
    *before, last = read(path)
    assert last.rest
    assert last.problem.startswith("from here on it cannot be read: ")
    assert all(row.fields is not None for row in before)
    assert bool(before) == bool(good)


def test_a_file_that_is_gone_or_forbidden_is_told(tmp_path: Path) -> None:
    """As the rest of an input, from its first row on."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS))
    found = one(path)
    path.unlink()
    assert list(rows(found, 0, LIMITS)) == [
        Row(1, 0, None, "from here on it cannot be read: No such file or directory", rest=True, read=1.0)
    ]


@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(0, 20))
def test_whatever_bytes_there_are_reading_can_go_on_from_anywhere(pieces: list[bytes], cut: int) -> None:
    """Of JSON Lines and of CSV: the rows from the middle on are those that the whole has there."""
    data = b"\n".join(pieces)
    for form in ("jsonl", "csv"):
        with fsspec.filesystem("memory").open(f"/any.{form}", "wb") as file:
            file.write(data)
        (found,) = find_inputs([f"memory://any.{form}"])
        whole = list(rows(found, 0, LIMITS))
        places = [row.after for row in whole if not row.rest]
        if places:
            start = places[cut % len(places)]
            assert [row[:4] for row in rows(found, start, LIMITS)] == [row[:4] for row in whole if row.number > start]


def test_inputs_are_files_globs_folders_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the arguments, by name within one; each once, and nothing that is no log."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "logs/2.csv.gz", "logs/1.parquet", "logs/deep/3.json", "logs/notes.txt", "logs/.4.jsonl"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_bytes(b"")
    with fsspec.filesystem("memory").open("/bucket/5.jsonl", "wb") as file:
        file.write(b"{}\n")
    found = find_inputs(["b.jsonl", "logs", "logs/*.gz", str(tmp_path / "b.jsonl"), "memory://bucket/*.jsonl", "-"])
    assert [(each.url, each.format, each.compression) for each in found] == [
        ("b.jsonl", "jsonl", None),
        ("logs/1.parquet", "parquet", None),
        ("logs/2.csv.gz", "csv", "gz"),
        ("logs/deep/3.json", "json", None),
        ("memory:///bucket/5.jsonl", "jsonl", None),
        ("-", "jsonl", None),
    ]
    assert [row.fields for row in rows(found[4], 0, LIMITS)] == [{}]
    assert [each.url for each in find_inputs(["."], out=Path("logs"))] == ["b.jsonl"]


def test_links_are_followed_and_hidden_folders_passed_over(tmp_path: Path) -> None:
    """A link is as large and as old as what it leads to; and what an audit writes is no input, by whatever path."""
    for name in ("logs/a.jsonl", "logs/.checkpoints/a.jsonl", "elsewhere/b.jsonl", "logs/out/parts/part.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "logs" / "b.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    (tmp_path / "logs" / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path / "logs")
    for argument in ("linked", "linked/**/*.*"):
        found = find_inputs([str(tmp_path / argument)], out=tmp_path / "logs" / "out")
        assert [Path(each.path).name for each in found] == ["a.jsonl", "b.jsonl", "gone.jsonl"]
        assert found[1].size == len("elsewhere/b.jsonl")
        assert [row.problem.partition(": ")[2] for row in rows(found[2], 0, LIMITS)] == ["No such file or directory"]


class _Dripping(io.RawIOBase):
    """A pipe that brings little at once."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._data.readinto(memoryview(buffer)[:7])


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_standard_input_shows_what_it_is_however_it_comes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is then read from its beginning."""
    many = FORMS[form] if form == "json" else FORMS[form] * 20
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(_Dripping(many))))
    (found,) = find_inputs(["-"], form)
    assert len(first(found, LIMITS, 25)) == 25
    assert next(iter(rows(found, 0, LIMITS))).fields == ROWS[0]


@pytest.mark.parametrize(
    ("argument", "format", "message"),
    [
        ("nothing.jsonl", None, "nothing.jsonl: there is no such file"),
        ("*.nothing", None, r"\*\.nothing: holds nothing to read, which would end in \.jsonl, "),
        ("notes.txt", None, "notes.txt: expected a name that ends in .jsonl, .* or say --format"),
        ("notes.txt", "jsonlines", "format: expected jsonl, .*, found 'jsonlines'; did you mean jsonl"),
        ("nowhere://bucket/a.jsonl", None, "nowhere://bucket/a.jsonl: cannot be read: Protocol not known"),
        ("-", "parquet", "-: Parquet is read from its end, which standard input has not"),
        ("/dev/null", "jsonl", "/dev/null: is no file; what comes through a pipe is read from standard input, -"),
    ],
)
def test_an_argument_that_names_nothing_is_an_error(
    argument: str, format: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is judged; rather than that an audit of nothing finds nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        find_inputs([argument], format)


def test_a_format_can_be_told(tmp_path: Path) -> None:
    """Where the ending tells nothing, or something else; what it is compressed by still tells."""
    (tmp_path / "messages.log.gz").write_bytes(gzip.compress(lines(ROWS)))
    (found,) = find_inputs([str(tmp_path / "messages.log.gz")], "jsonl")
    assert [row.fields for row in rows(found, 0, LIMITS)] == ROWS


def test_a_row_of_many_megabytes_is_not_held(tmp_path: Path) -> None:
    """It is told by its size, and what comes after it is read."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "short"}\n')
    assert [(row.number, row.problem) for row in read(path)] == [
        (1, "is 50,000,013 bytes long, more than 10,000"),
        (2, ""),
    ]
