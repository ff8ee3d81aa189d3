"""The sheet that people label, its key, and the labels as they come back, from the page or from a spreadsheet."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from guard.audit.records import Place
from guard.audit.review.page import page
from guard.audit.review.sample import Case, Sample
from guard.audit.review.strata import Facts
from guard.errors import ConfigError
from guard.types import HAZARDS, Action, Role, Turn

SHEET, PAGE, KEY = "sheet.csv", "sheet.html", "key.parquet"

_LABELS = {
    **dict.fromkeys(("harmful", "unsafe", "1", "yes", "y", "true"), True),
    **dict.fromkeys(("harmless", "safe", "0", "no", "n", "false"), False),
    **dict.fromkeys(("unsure", "?"), None),
}
_CONTEXT = 6  # turns shown before the judged one
_LONG = 1000  # characters of one of them
_LONGEST = 30_000  # of the judged one; a spreadsheet's cell takes no more
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_SAID = pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))
_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("case", pa.int32()),
    ("input", pa.string()),
    ("row", pa.int64()),
    ("id", pa.string()),
    ("turn", pa.int32()),
    ("role", pa.string()),
    ("language", pa.string()),
    ("policy", pa.string()),
    ("stratum", pa.string()),
    ("size", pa.int64()),
    ("weight", pa.float64()),
    ("action", pa.string()),
    ("violated", pa.list_(pa.string())),
    ("unsafe", pa.float64()),
    ("hazards", pa.map_(pa.string(), pa.float64())),
    ("turns", _SAID),
]


class Label(NamedTuple):
    """What a reviewer says: None where they are unsure; `kinds` are codes of hazards and categories of one's own."""

    harmful: bool | None
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Labels:
    """Those of one reviewer, by the number of a case; what is blank is not there."""

    reviewer: str
    by_case: Mapping[int, Label]


def kinds(facts: Facts) -> tuple[dict[str, str], dict[str, str]]:
    """Code to title, of the harm that policies look for and of all other; a category of one's own is its name."""
    categories = [item for policy in facts["policies"].values() for item in policy["categories"].items()]
    fed = {code for _, category in categories for code in category["hazards"]}
    own = {name: name for name, category in categories if is_own(category)}
    asked = {code: title for code, title in HAZARDS.items() if code in fed} | own
    return asked, {code: title for code, title in HAZARDS.items() if code not in fed}


def is_own(category: Mapping[str, Any]) -> bool:
    return any(code not in HAZARDS for code in category["hazards"])


def write_review(folder: Path, sample: Sample, facts: Facts, *, force: bool = False) -> None:
    """Raises ConfigError where a sheet is there already, which people may have filled in."""
    if not force and any((folder / name).exists() for name in (SHEET, PAGE, KEY)):
        raise ConfigError(
            f"{folder}: there is a sheet, and labels may be in it; write another one --to DIR, or --force"
        )
    cases = [_shown(case) for case in sample.cases]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_key(folder / KEY, sample)
        (folder / SHEET).write_text(_table(sample.id, cases), encoding="utf-8-sig", newline="")
        (folder / PAGE).write_text(page(sample.id, cases, *kinds(facts)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None


def read_key(folder: Path) -> Sample:
    """The sample that a sheet is of. Raises ConfigError."""
    try:
        table = pq.read_table(folder / KEY)
        told = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        cases = tuple(_case(row) for row in table.to_pylist())
        return Sample(told["sheet"], cases, int(told["turns"]), int(told["left_out"]), told["is_whole"] == "True")
    except (OSError, pa.ArrowException, KeyError, ValueError):
        raise ConfigError(f"{folder / KEY}: cannot be read; is that where `guard audit sample` wrote?") from None


def read_labels(path: Path, sample: Sample, facts: Facts) -> Labels:
    """Raises ConfigError with file and line; never with what stands in a cell."""
    asked, others = kinds(facts)
    codes = {code.lower(): code for code in (*asked, *others)}
    numbers = {case.number for case in sample.cases}
    found: dict[int, Label] = {}
    for place, row in _rows(path):
        if row.get("sheet", sample.id).strip() != sample.id:
            raise ConfigError(f"{place}: sheet: expected {sample.id}: the row is of another sample")
        number = row["case"].strip()
        if not number.isdecimal() or int(number) not in numbers:
            raise ConfigError(f"{place}: case: expected a number from 1 to {len(numbers)}")
        if int(number) in found:
            raise ConfigError(f"{place}: case: {int(number)} is labelled above already")
        if label := _label(row, codes, place):
            found[int(number)] = label
    return Labels(str(path), found)


def _label(row: Mapping[str, str], codes: Mapping[str, str], place: str) -> Label | None:
    word = row["label"].strip().lower()
    named = re.split(r"[\s,;+]+", row.get("categories", "").strip().lower())
    if not word:
        return None
    if word not in _LABELS:
        raise ConfigError(f"{place}: label: expected harmless, harmful, unsure or nothing")
    if not all(name in codes for name in named if name):
        raise ConfigError(f"{place}: categories: expected any of {', '.join(codes.values())}, with space between")
    harmful = _LABELS[word]
    return Label(harmful, frozenset(codes[name] for name in named if name) if harmful else frozenset())


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each with file:line; as spreadsheets write them, in their encodings and with comma, semicolon or tab."""
    try:
        text = _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from None
    heading = text.partition("\n")[0]
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=heading.count), restval="")
    names = [name.strip().lower() for name in lines.fieldnames or ()]
    for name in ("case", "label"):
        if name not in names:
            raise ConfigError(f"{path}:1: there is no column {name}")
    lines.fieldnames = names
    number = lines.line_num + 1
    try:
        for row in lines:
            if None in row:
                raise ConfigError(f"{path}:{number}: has more fields than the first line")
            if any(value.strip() for value in row.values()):
                yield f"{path}:{number}", row
            number = lines.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}:{number}: {error}") from None


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:  # which old spreadsheets do not write; what is read here is ASCII in either
        return data.decode("cp1252", "replace")


def _shown(case: Case) -> dict[str, Any]:
    """What a reviewer sees of it: no score, no verdict."""
    if case.turns is None:
        place = {"input": case.place.input, "row": case.place.row, "id": case.id, "turn": case.turn}
        return {"case": case.number, "role": case.role.value, **place}
    *before, judged = case.turns
    context = [{"role": turn.role.value, "text": _shortened(turn.text, _LONG)} for turn in before[-_CONTEXT:]]
    return {
        "case": case.number,
        "role": case.role.value,
        "left_out": len(before) - len(context),
        "context": context,
        "text": _shortened(judged.text, _LONGEST),
    }


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _table(sheet: str, cases: Sequence[Mapping[str, Any]]) -> str:
    shown = [name for name in cases[0] if name != "left_out"]
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["sheet", *shown, "label", "categories", "comment"])
    for case in cases:
        table.writerow([sheet, *(_cell(case[name]) for name in shown), "", "", ""])
    return file.getvalue()


def _cell(value: Any) -> Any:
    """As a spreadsheet takes it for text, also where someone wrote a formula."""
    if isinstance(value, list):
        value = _shortened("\n\n".join(f"{turn['role']}: {turn['text']}" for turn in value), _LONGEST)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _write_key(path: Path, sample: Sample) -> None:
    told: dict[str | bytes, str | bytes] = {
        "sheet": sample.id,
        "turns": str(sample.turns),
        "left_out": str(sample.left_out),
        "is_whole": str(sample.is_whole),
    }
    weights = sample.weights
    rows = [_row(case, weights[case.stratum]) for case in sample.cases]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(_COLUMNS, metadata=told)), path)


def _row(case: Case, weight: float) -> dict[str, Any]:
    return {
        "case": case.number,
        "input": case.place.input,
        "row": case.place.row,
        "id": case.id,
        "turn": case.turn,
        "role": case.role.value,
        "language": case.language,
        "policy": case.policy,
        "stratum": case.stratum,
        "size": case.size,
        "weight": weight,
        "action": case.action.name.lower(),
        "violated": case.violated,
        "unsafe": case.unsafe,
        "hazards": list(case.hazards.items()),
        "turns": case.turns and [{"role": turn.role.value, "text": turn.text} for turn in case.turns],
    }


def _case(row: Mapping[str, Any]) -> Case:
    return Case(
        row["case"],
        Place(row["input"], row["row"]),
        row["id"],
        row["turn"],
        Role(row["role"]),
        row["language"],
        row["policy"],
        row["stratum"],
        row["size"],
        Action[row["action"].upper()],
        tuple(row["violated"]),
        row["unsafe"],
        dict(row["hazards"]),
        row["turns"] and tuple(Turn(Role(turn["role"]), turn["text"]) for turn in row["turns"]),
    )
