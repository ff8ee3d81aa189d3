"""What the rows of logs look like, found out from the first of them or told; and conversations made of them."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from guard import messages
from guard.audit.records import Place, Record, Reject
from guard.errors import ConfigError, InputError
from guard.policy.messages import did_you_mean
from guard.types import Role, Turn

Kind = Literal["conversations", "rows", "pairs", "texts"]

KINDS: Mapping[Kind, str] = MappingProxyType(
    {
        "conversations": "a conversation a row, as a list of turns",
        "rows": "a turn a row, grouped by the conversation's id",
        "pairs": "a prompt and its response a row",
        "texts": "a text a row",
    }
)
_COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "id": ("conversation_id", "conversation", "chat_id", "session_id", "thread_id", "id", "uuid"),
        "turns": ("turns", "messages", "conversations", "conversation", "dialog", "dialogue"),
        "role": ("role", "speaker", "author", "sender", "from"),
        "text": ("text", "content", "message", "body", "comment", "value", "utterance", "prompt"),
        "prompt": ("prompt", "instruction", "question", "query", "input", "user"),
        "response": ("response", "completion", "output", "answer", "reply", "assistant"),
        "context": ("input", "context"),
        "system": ("system", "system_prompt"),
        "turn": ("turn", "turn_id", "turn_index", "index", "position"),
        "time": ("time", "timestamp", "created_at", "created", "date", "datetime"),
        "language": ("language", "lang", "locale"),
        "source": ("source", "app", "channel", "dataset", "model"),
        "policy": ("policy",),
        "metadata": ("metadata",),
    }
)
"""Our fields, and what logs call them; the first that there is counts."""

_FIELDS: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "conversations": (("turns",), ("response",)),
        "rows": (("id", "role", "text"), ("turn",)),
        "pairs": (("prompt", "response"), ("context", "system")),
        "texts": (("text",), ("role",)),
    }
)
"""Those without which rows are not of a kind, and those that it may have; the first kind that fits is meant."""
_ABOUT = ("id", "time", "language", "source", "policy", "metadata")

_ROLES: Mapping[str, Role] = MappingProxyType(
    {
        **dict.fromkeys(("user", "human", "customer", "prompter", "client", "role_user"), Role.USER),
        **dict.fromkeys(
            ("agent", "assistant", "bot", "gpt", "chatgpt", "model", "ai", "bing", "bard", "claude"), Role.AGENT
        ),
        **dict.fromkeys(("function_call", "role_agent"), Role.AGENT),
        **dict.fromkeys(("system", "developer", "role_system"), Role.SYSTEM),
        **dict.fromkeys(("tool", "function", "observation", "function_response", "role_tool"), Role.TOOL),
    }
)
_WORDS = {Role.USER: "user", Role.AGENT: "assistant", Role.SYSTEM: "system", Role.TOOL: "tool"}  # of chat APIs
_SPEAKER, _SAID = ("role", "from", "speaker", "author"), ("content", "text", "value")
_SECONDS = re.compile(r"\d{9,19}(\.\d+)?")  # since 1970: of 9 digits and more, so that a year is none
_DIGITS = re.compile(r"(19|20)\d{12}")  # of a date and a time; as milliseconds they would be after 2570
_YEARS = range(1970, 2200)  # others stand for none, as the year 1 and 9999 do
_AMBIGUOUS = ("author", "sender", "from")  # often people's names, or addresses
_NOTHING = (None, "")
MAX_TURNS = 1000


class Said(NamedTuple):
    """A turn that stands in a row of its own; `order` is its number in the conversation, where the row tells one."""

    conversation: str
    order: float | None
    record: Record


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind, the column of each of our fields, and what words for roles mean beside the usual ones."""

    kind: Kind
    columns: Mapping[str, str]
    roles: Mapping[str, Role] = field(default_factory=dict)

    def described(self) -> str:
        """In a line, as people are told it."""
        columns = ", ".join(f"{name} from `{column}`" for name, column in self.columns.items())
        return f"{KINDS[self.kind]}: {columns}"

    def record(self, place: Place, row: Mapping[str, Any]) -> Record | Reject:
        """The conversation of a row; of a turn by itself it has that one turn."""
        try:
            turns = tuple(self._turns(row))
            if not turns:
                raise InputError(self.columns.get("turns", "row"), "holds no turn")
            if len(turns) > MAX_TURNS:
                raise InputError(self.columns["turns"], f"{len(turns)} turns, at most {MAX_TURNS} are taken")
            return Record(
                place=place,
                id=self._word(row, "id") or f"{place.input}:{place.row}",
                turns=turns,
                policy=self._word(row, "policy"),
                metadata=self._metadata(row),
                time=read_time(self._at(row, "time")),
                language=self._word(row, "language"),
                source=self._word(row, "source"),
            )
        except InputError as error:
            return Reject(place, str(error))

    def said(self, place: Place, row: Mapping[str, Any]) -> Said | Reject:
        """The turn of a row of its own, and where it belongs; without an id it is a conversation by itself."""
        record = self.record(place, row)
        if isinstance(record, Reject):
            return record
        order = self._at(row, "turn")
        if not _is_number(order):
            return Reject(place, f"{self.columns['turn']}: should be a number")
        return Said(record.id, None if order in _NOTHING else float(order), record)

    def _turns(self, row: Mapping[str, Any]) -> Iterable[Turn]:
        match self.kind:
            case "conversations":
                column = self.columns["turns"]
                said = _parsed(column, self._at(row, "turns"))
                if not isinstance(said, list):
                    raise InputError(column, "should be a list")
                told, reply = list(map(self._message, said)), self._reply(row)
                there = bool(reply) and told[-len(reply) :] == reply
                return messages.turns(told if there else [*told, *reply], column) if told else ()
            case "pairs":
                system = self._said(row, "system", Role.SYSTEM)
                asked = self._said(row, "prompt", Role.USER)
                if asked and (context := self._word(row, "context")):
                    asked = (Turn(Role.USER, f"{asked[0].text}\n\n{context}"),)
                answered = () if self._at(row, "response") == "" else self._said(row, "response", Role.AGENT)
                return (*system, *asked, *answered)
            case _:
                word = self._at(row, "role")
                role = Role.USER if word in (None, "") and self.kind == "texts" else self._role(word)
                if role is None:
                    raise InputError(self.columns["role"], f"should be one of {', '.join(_ROLES)}, or say --role")
                return self._said(row, "text", role, is_needed=True)

    def _said(self, row: Mapping[str, Any], name: str, role: Role, *, is_needed: bool = False) -> tuple[Turn, ...]:
        text = self._at(row, name)
        if text is None and not is_needed:
            return ()
        return messages.turns([{"role": _WORDS[role], "content": text}], self.columns[name])

    def _message(self, said: object) -> object:
        """As a chat API has it; whatever is no message is left for its reader to refuse."""
        if not isinstance(said, dict):
            return said
        word = next((said[key] for key in _SPEAKER if said.get(key) is not None), None)
        role = self._role(word)
        text = next((said[key] for key in _SAID if said.get(key) is not None), None)
        rest = {key: said[key] for key in ("tool_calls", "function_call", "refusal") if said.get(key) is not None}
        return {"role": _WORDS[role] if role else word, "content": text, **rest}

    def _reply(self, row: Mapping[str, Any]) -> list[object]:
        """What the model answered, where a log of a chat API has it beside the messages."""
        reply = self._at(row, "response")
        if reply is None or reply in ("", [], {}):
            return []
        match _parsed("response", reply):
            case {"choices": [{"message": dict() as message}, *_]} | {"message": dict() as message}:
                return [self._message(message)]
            case {"choices": [{"text": str() as text}, *_]}:
                return [{"role": "assistant", "content": text}]
            case {"output": [*items]} if all(isinstance(item, dict) for item in items):
                return [self._message(item) for item in map(_item, items) if item]
            case {"role": word} as message if self._role(word):
                return [self._message(message)]
            case [*several] if all(isinstance(one, dict) and self._role(one.get("role")) for one in several):
                return [self._message(message) for message in several]
            case {"content": str() | list() as content} if isinstance(reply, dict):
                return [{"role": "assistant", "content": content}]
        if isinstance(reply, str):  # also one that is JSON, as it was asked for
            return [{"role": "assistant", "content": reply}]
        raise InputError(self.columns["response"], "should be a text, or what a chat API answers")

    def _role(self, word: object) -> Role | None:
        return self.roles.get(str(word)) or _ROLES.get(str(word).lower())

    def _metadata(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Plain values; those that are mapped by themselves beside those of the column."""
        found = _parsed("metadata", self._at(row, "metadata"))
        pairs = dict(found) if isinstance(found, dict | list) and _is_pairs(found) else {}
        named = {
            name.removeprefix("metadata."): at(row, column)
            for name, column in self.columns.items()
            if name.startswith("metadata.")
        }
        plain = str | int | float | Decimal
        return {str(key): _plain(value) for key, value in (pairs | named).items() if isinstance(value, plain)}

    def _word(self, row: Mapping[str, Any], name: str) -> str:
        value = self._at(row, name)
        return "" if value is None or isinstance(value, dict | list) else _plain(value)

    def _at(self, row: Mapping[str, Any], name: str) -> Any:
        column = self.columns.get(name)
        return None if column is None else at(row, column)


def at(row: Mapping[str, Any], column: str) -> Any:
    """A column, or what a dotted path leads to within it; None where there is nothing."""
    if column in row:
        return row[column]
    found: Any = row
    for step in column.split("."):
        if isinstance(found, str):
            found = _parsed(column, found)
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, dict):
            found = found.get(step)
        else:
            return None
    return found


def read_time(value: object) -> datetime | None:
    """ISO 8601, 14 digits of a date and a time, or s, ms, µs or ns since 1970; without a zone it is UTC's.

    None for what is no time, and for years before 1970 and after 2199, which stand for none.
    """
    text = "" if value is None else str(value).strip()
    try:
        if isinstance(value, datetime):
            found = value
        elif _DIGITS.fullmatch(text):
            found = datetime.strptime(text, "%Y%m%d%H%M%S")  # it gets one below
        elif _SECONDS.fullmatch(text):
            seconds = float(text)
            while seconds >= 1e11:  # the year 5138
                seconds /= 1000
            found = datetime.fromtimestamp(seconds, UTC)
        else:
            found = datetime.fromisoformat(text)
        found = found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return found if found.year in _YEARS else None


def detect(
    sample: Sequence[Mapping[str, Any]],
    kind: str | None = None,
    mapping: Iterable[str] = (),
    roles: Iterable[str] = (),
) -> Shape:
    """The shape of rows like these, where people have not told it: `mapping` FIELD=COLUMN, `roles` WORD=ROLE.

    A field that is mapped to no column, FIELD=, is in none.
    Raises ConfigError for what cannot be, and where nothing fits.
    """
    told = _told_columns(mapping)
    words = _told_roles(roles)
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"shape: expected {', '.join(KINDS)}, found '{kind}'{did_you_mean(kind, KINDS)}")
    there = list(dict.fromkeys(name for row in sample for name, value in row.items() if value is not None))
    for name, column in told.items():
        if column and sample and all(at(row, column) is None for row in sample):
            raise ConfigError(f"map: {name}={column}: no such column among {', '.join(there)}")
    one: Kind
    for one in KINDS:
        if kind in (None, one) and (columns := _columns(one, told, sample, there, words)) is not None:
            return _fitting(Shape(one, columns, words), sample)
    wanted = f"{kind} ({KINDS[cast('Kind', kind)]})" if kind else "a shape that is known"
    raise ConfigError(
        f"expected {wanted}, found the columns {', '.join(there) or '(none)'}; say where things are with "
        "--map FIELD=COLUMN, of the fields turns, id, role, text, prompt, response"
    )


def _fitting(shape: Shape, sample: Sequence[Mapping[str, Any]]) -> Shape:
    """Raises ConfigError where not even one of the rows is of that shape."""
    read = shape.said if shape.kind == "rows" else shape.record
    found = [read(Place("", 0), row) for row in sample]
    rejects = [one for one in found if isinstance(one, Reject)]
    if found and len(rejects) == len(found):
        raise ConfigError(
            f"none of the first {len(found)} rows can be read as {KINDS[shape.kind]}: {rejects[0].reason}"
        )
    return shape


def _columns(
    kind: Kind,
    told: Mapping[str, str],
    sample: Sequence[Mapping[str, Any]],
    there: Sequence[str],
    words: Collection[str],
) -> dict[str, str] | None:
    """The column of each field of a kind, none of them twice; None where the rows are not of this kind."""
    needed, further = _FIELDS[kind]
    found: dict[str, str] = {}
    for name in (*needed, *further, *_ABOUT):
        known = [one for one in _COLUMNS[name] if one in there and one not in found.values()]
        if name == "turns":
            known = [one for one in known if _is_list(sample, one)]
        if name == "role":
            known = [one for one in known if one not in _AMBIGUOUS or _are_roles(sample, one, words)]
        if name == "turn":
            known = [one for one in known if all(_is_number(at(row, one)) for row in sample)]
        if column := told.get(name, next(iter(known), None)):
            found[name] = column
    if not found.keys() >= set(needed):
        return None
    return found | {name: column for name, column in told.items() if name.startswith("metadata.")}


def _is_list(sample: Sequence[Mapping[str, Any]], column: str) -> bool:
    return any(isinstance(_parsed(column, at(row, column)), list) for row in sample)


def _are_roles(sample: Sequence[Mapping[str, Any]], column: str, words: Collection[str]) -> bool:
    """Whether most of what stands there are words for roles."""
    found = [str(word) for row in sample if (word := at(row, column)) not in _NOTHING]
    return 2 * sum(word in words or word.lower() in _ROLES for word in found) > len(found)


def _is_number(value: object) -> bool:
    try:
        return value in _NOTHING or float(value) is not None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _told_columns(mapping: Iterable[str]) -> dict[str, str]:
    told = {}
    for one in mapping:
        name, sign, column = one.partition("=")
        if not sign:
            raise ConfigError(f"map: expected FIELD=COLUMN, found '{one}'")
        if name not in _COLUMNS and not name.startswith("metadata."):
            raise ConfigError(f"map: there is no field '{name}'{did_you_mean(name, _COLUMNS)}")
        told[name] = column
    return told


def _told_roles(roles: Iterable[str]) -> dict[str, Role]:
    told = {}
    for one in roles:
        word, sign, role = one.rpartition("=")
        if not sign or role not in tuple(Role):
            raise ConfigError(f"role: expected WORD=ROLE, of the roles {', '.join(Role)}, found '{one}'")
        told[word] = Role(role)
    return told


def _parsed(field: str, value: object) -> object:
    """Of JSON in a cell of a table what it says; any other text as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _item(item: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the responses API puts out, as a message; what the model thought is none."""
    match item:
        case {"type": "reasoning"}:
            return None
        case {"type": "function_call"}:
            return {"role": "assistant", "tool_calls": [{"function": item}]}
    return item


def _is_pairs(found: object) -> bool:
    """A mapping, or one as Parquet has it: pairs."""
    return isinstance(found, dict) or all(isinstance(pair, tuple) and len(pair) == 2 for pair in found)  # type: ignore[attr-defined]


def _plain(value: object) -> str:
    return str(value).encode(errors="replace").decode()
