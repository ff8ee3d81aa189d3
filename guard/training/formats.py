"""Labelled rows as people have them: Guard's own records, chat APIs' messages with a label, and tables of texts.

    .jsonl   guard.training.data.Record                            one a line; a record without a label is left out
    .jsonl   {"messages": [{"role", "content"}, …], "label": 0}    optional: lang, categories, weight
    .csv     text,label                              optional: role, lang, categories with space between, weight

Each may be gzipped, `.gz`. The last message is the judged one. A label is 0 or safe, 1 or unsafe; `categories` are
codes of the taxonomy. A text is a user's, and its language `und`, where it is not said. The source of the last two is
the file's name. A `weight` says how many rows like it one of a sample stands for; `guard policy fit` and `guard
calibrate` count it so, 1 where it is not said.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TextIO, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from guard import messages
from guard.errors import ConfigError, InputError
from guard.training.data import Example, Record
from guard.types import HAZARDS, Conversation, Role, Turn

_Given = TypeVar("_Given")
_Read = TypeVar("_Read")

_LABELS = {"0": False, "safe": False, "1": True, "unsafe": True}
_ROLES = {"assistant": "agent", "developer": "system", "function": "tool"}


def read_examples(path: Path) -> list[Example]:
    """The labelled rows of a file, in its order; which of the two forms JSON Lines have, the first line tells.

    Raises ConfigError with file, line and key, and never with anyone's text.
    """
    zipped = path.suffix == ".gz"
    readers = {".jsonl": _json_lines, ".csv": _table}
    read = readers.get(Path(path.stem).suffix if zipped else path.suffix)
    if read is None:
        raise ConfigError(f"{path}: should end in {' or '.join(readers)}, with or without .gz")
    try:
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            return list(read(file, path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from error


def _label(value: object) -> bool:
    if str(value) not in _LABELS:
        raise ValueError("should be 0, 1, safe or unsafe")
    return _LABELS[str(value)]


def _hazard(code: str) -> str:
    if code not in HAZARDS:
        raise ValueError(f"is none of {', '.join(HAZARDS)}")
    return code


_AnyRole = Annotated[Role, BeforeValidator(lambda role: _ROLES.get(str(role), role))]
_Categories = frozenset[Annotated[str, AfterValidator(_hazard)]]


class _Labelled(BaseModel):
    label: Annotated[bool, BeforeValidator(_label)]
    lang: str = "und"
    categories: _Categories = frozenset()
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class _Chat(_Labelled):
    messages: Annotated[tuple[Turn, ...], PlainValidator(messages.turns)]

    def turns(self) -> tuple[Turn, ...]:
        return self.messages


class _Row(_Labelled):
    text: str
    role: _AnyRole = Role.USER
    categories: Annotated[_Categories, BeforeValidator(lambda codes: (codes or "").split())] = frozenset()

    def turns(self) -> tuple[Turn, ...]:
        return (Turn(self.role, self.text),)


def _example(row: _Chat | _Row, path: Path, number: int) -> Example:
    source, turns = path.name.partition(".")[0], row.turns()
    return Example(
        id=f"{source}-{number}",
        source=source,
        lang=row.lang,
        conversation=Conversation(turns, len(turns) - 1),
        unsafe=row.label,
        hazards=None if row.label and not row.categories else row.categories,
        weight=row.weight,
    )


def _json_lines(file: TextIO, path: Path) -> Iterator[Example]:
    chat: bool | None = None
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if chat is None:
            chat = _is_chat(line)
        if chat:
            yield _example(_checked(_Chat.model_validate_json, line, path, number), path, number)
        else:
            record = _checked(Record.model_validate_json, line, path, number)
            if record.unsafe is not None:
                yield record.example()


def _is_chat(line: str) -> bool:
    try:
        record = from_json(line)
    except ValueError:  # which is told when the line is read
        return False
    return isinstance(record, dict) and "messages" in record


def _table(file: TextIO, path: Path) -> Iterator[Example]:
    rows = csv.DictReader(file, strict=True)
    number = 2
    try:
        for row in rows:
            if None in row:
                raise ConfigError(f"{path}:{number}: has more fields than the first line")
            yield _example(_checked(_Row.model_validate, row, path, number), path, number)
            number = rows.line_num + 1  # a text may have lines
    except csv.Error as error:
        raise ConfigError(f"{path}:{number}: {error}") from error


def _checked(validate: Callable[[_Given], _Read], given: _Given, path: Path, number: int) -> _Read:
    try:
        return validate(given)
    except InputError as error:
        raise ConfigError(f"{path}:{number}: {error}") from None
    except ValidationError as error:  # which quotes what it was given
        problems = (
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for e in error.errors()
        )
        raise ConfigError(f"{path}:{number}: {'; '.join(problems)}") from None
