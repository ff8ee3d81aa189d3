"""A few of a category's examples, to show to a model that is asked for the category in words."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

_OF_EACH = 3  # label
_CHARACTERS = 300
_LABELS = {"1": True, "unsafe": True, "0": False, "safe": False}


def few(name: str, content: bytes) -> tuple[tuple[str, bool], ...]:
    """The first short ones of either label in a file of examples: texts of judged turns, and whether they are of it.

    A row that does not say is passed over; `guard policy fit` is who complains of it.
    """
    found: list[tuple[str, bool]] = []
    with suppress(OSError, EOFError, UnicodeDecodeError, csv.Error):
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8-sig")
        rows = list(_rows(name.removesuffix(".gz"), text))
        for wanted in (True, False):
            found += islice((row for row in rows if row[1] == wanted and len(row[0]) <= _CHARACTERS), _OF_EACH)
    return tuple(found)


def _rows(name: str, text: str) -> Iterator[tuple[str, bool]]:
    if name.endswith(".csv"):
        records: Iterable[Any] = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    else:
        records = (_parse(line) for line in text.splitlines())
    for record in records:
        if not isinstance(record, dict):
            continue
        turns = record.get("messages") or record.get("turns") or [record]
        said = turns[-1].get("content", turns[-1].get("text")) if isinstance(turns[-1], dict) else None
        label = _LABELS.get(str(record.get("label", record.get("unsafe"))))
        if isinstance(said, str) and said.strip() and label is not None:
            yield " ".join(said.split()), label


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
