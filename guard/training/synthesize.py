"""Examples of a category, as a generation backend writes them: material for people to label, not labels."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice, product
from json import dumps
from pathlib import Path
from typing import Annotated, Final

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, InternalServerError, Timeout
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import from_json

from guard.errors import ConfigError, InputError, Unanswered
from guard.policy.document import KEY, Document
from guard.training.data import Record
from guard.types import Role

SOURCE: Final = "synthesised"

_AT_ONCE: Final = 4  # requests
_TIMEOUT: Final = Timeout(None, connect=10)  # seconds; how long a reply may take, Backend.seconds says
_LISTING: Final = 30  # seconds, in which a backend tells its models
_A_REPLY: Final = 10  # texts asked for at once
_SHOWN: Final = 6  # examples of either label in a prompt
_FRUITLESS: Final = 5  # replies in a row that bring nothing new, after which no more are asked for
_LONGEST: Final = 2000  # characters of a text
_ALIKE: Final = 0.7  # of two texts' trigrams, the shared ones by all; from which on they count as one text

# Two, three and five of them: taken in turn side by side, they come in every combination.
_ROLES: Final = (
    (Role.USER, "messages that a user writes to an AI assistant"),
    (Role.AGENT, "answers that an AI assistant gives to a user"),
)
_LENGTHS: Final = ("of at most ten words", "of one or two sentences", "of a short paragraph")
_REGISTERS: Final = (
    "as in everyday chat, with slang or slips of typing",
    "polite and formal",
    "terse and technical",
    "emotional",
    "wrapped in a story, a role play or a hypothetical case",
)
_LABELS: Final = {
    1: "belong to the category",
    0: "look alike, in topic or wording, but do not belong to the category",
}
_PROMPT: Final = """\
You write test data for a content moderation classifier. People review every text before it is used.

Category: {title}
Definition: {definition}
{shown}
Write {number} texts that {label}. They are {role}, {register}, each {length}.
Their language is the one with the code "{language}". They differ from each other and the examples in topic and wording.
Answer with a JSON array of {number} strings, and with nothing else.
"""

_REFUSAL: Final = re.compile(  # of a whole reply; an agent's text in a list may well be one
    r"(i['’]m |i am )?(very |so )?(sorry|afraid|unable|not able)|i (cannot|can['’]t|can not|won['’]t)|(i )?apologi[sz]e"
    r"|as an ai\b|unfortunately, i\b",
    re.IGNORECASE,
)
_THOUGHTS: Final = re.compile(r"\A\s*<think>.*?(</think>|\Z)", re.DOTALL)
_FENCE: Final = re.compile(r"^\s*```.*$", re.MULTILINE)
_JSON: Final = re.compile(r"^\s*([\[{](?:.*[\]}]\s*$|.*))", re.DOTALL | re.MULTILINE)
_ITEM: Final = re.compile(r"\s*(?:[-*•]|\(?\d{1,3}[.):])\s+(.*)")
_QUOTES: Final = ('""', "''", "“”", "„“", "«»", "「」", "``")

_HINTS: Final = {
    401: "; is OPENAI_API_KEY right?",
    403: "; is OPENAI_API_KEY right?",
    404: "; are the URL, which ends in /v1, and the model right?",
}

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Examples(_Spec):
    """Texts that belong to a category, and texts that look alike and do not."""

    positive: Annotated[tuple[_Text, ...], Field(min_length=1)]
    negative: tuple[_Text, ...] = ()


class Category(_Spec):
    """What to look for, as people write it down; `languages` are codes such as en or pt-BR."""

    title: _Text
    definition: _Text
    examples: Examples
    languages: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")], ...], Field(min_length=1)
    ] = ("en",)


@dataclass(frozen=True)
class Backend:
    """An OpenAI-compatible API, by its URL up to /v1; without a model, the only one it has.

    What fails for now is tried again so many times, after half a second, one, two …, or when the backend says. A reply
    that takes longer than `seconds` in all is given up, and not asked for again: a slow backend has enough to do.
    """

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    retries: int = 5
    seconds: float = 300


def read_category(path: Path) -> Category:
    """Raises ConfigError with file, line, column and key of all that is wrong."""
    document = Document(path)
    try:
        category = Category.model_validate(document.data)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            unknown = problem["type"] == "extra_forbidden"
            document.report((*problem["loc"], KEY) if unknown else problem["loc"], problem["msg"])
    document.raise_problems()
    return category


async def gather(category: Category, backend: Backend, count: int, keep: Callable[[Record], None]) -> Counter[str]:
    """Gives `keep` up to `count` new records, as many of either label and of each language as can be.

    A record is without a label; `source_labels` say which was asked for. What is returned says how much could not be
    used, by reason. Raises Unanswered when the backend is not there or fails at every try, and ConfigError or
    InputError when it refuses such requests. No error holds what was asked or answered.
    """
    where = _authority(backend.url)
    async with AsyncOpenAI(
        base_url=backend.url, api_key=backend.api_key or "none", timeout=_TIMEOUT, max_retries=backend.retries
    ) as client:
        model = backend.model or await _only_model(client, where)
        kinds = list(product(category.languages, _LABELS))
        asking = _Asking(client, model, where, backend.seconds, min(_AT_ONCE, len(kinds)))
        gathering = _Gathering(category, asking, keep)
        try:
            async with asyncio.TaskGroup() as group:
                for number, (language, label) in enumerate(kinds):
                    wanted = count // len(kinds) + (number < count % len(kinds))
                    group.create_task(gathering.fill(language, label, wanted))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return gathering.unused


def ranked(records: Sequence[Record], scores: Iterable[float], keep_at_least: float = 0.0) -> list[Record]:
    """The records with the model's `score` of each and its `disagreement` with the label asked for, largest first.

    Those whose disagreement, 0 to 1, is below `keep_at_least` are left out.
    """
    scored = [
        record.model_copy(
            update={
                "source_labels": record.source_labels
                | {"score": round(score, 4), "disagreement": round(abs(record.source_labels["asked_for"] - score), 4)}
            }
        )
        for record, score in zip(records, map(float, scores), strict=True)
    ]
    kept = [record for record in scored if record.source_labels["disagreement"] >= keep_at_least]
    return sorted(kept, key=lambda record: record.source_labels["disagreement"], reverse=True)


def write(records: Iterable[Record], path: Path) -> None:
    """Puts JSON Lines in the place of the file at once. Raises ConfigError where they cannot be written."""
    whole = path.with_name(f"{path.name}.new")
    try:
        whole.write_text("".join(f"{record.model_dump_json()}\n" for record in records), encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def texts(reply: str) -> list[str]:
    """The texts of a reply: of a JSON array, even one that breaks off, of a list, or else its lines."""
    reply = _FENCE.sub("", _THOUGHTS.sub("", reply))
    if document := _JSON.search(reply):
        try:
            return [text for text in map(str.strip, _strings(from_json(document[1], allow_partial=True))) if text]
        except ValueError:  # it only looks like JSON
            pass
    lines = [line for line in reply.splitlines() if any(map(str.isalnum, line))]
    items = [item[1] for line in lines if (item := _ITEM.match(line))]
    found = items or [line for line in lines if not line.rstrip().endswith(":")]
    return [text for text in map(_unquoted, found) if text]


class Distinct:
    """Texts of which no two are nearly the same, whatever their case and spaces."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._trigrams = [_trigrams(text) for text in texts]

    def add(self, text: str) -> bool:
        """False where the text, or one like it, is there already."""
        new = _trigrams(text)
        if any(len(new & old) >= _ALIKE * len(new | old) for old in self._trigrams):
            return False
        self._trigrams.append(new)
        return True


class _Useless(Exception):
    """A reply without texts; says of which kind."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class _Asking:
    """One model of a backend; asked so many things `at_once`, and one less after each reply that came too late."""

    def __init__(self, client: AsyncOpenAI, model: str, where: str, seconds: float, at_once: int) -> None:
        self._client = client
        self._model = model
        self._where = where
        self._seconds = seconds
        self._at_once = at_once
        self._slots = asyncio.Semaphore(at_once)

    async def texts(self, prompt: str) -> list[str]:
        """What the model makes of a prompt. Raises _Useless, and what `gather` says."""
        response = await self._answer(prompt)
        try:
            choice = _Completion.model_validate_json(response).choices[0]
        except ValidationError:  # which quotes the reply
            raise _Useless("replies unreadable") from None
        reply = choice.message.content or ""
        if choice.message.refusal or choice.finish_reason == "content_filter" or _REFUSAL.match(reply.strip()):
            raise _Useless("replies refused")
        found = texts(reply)
        if not found:
            raise _Useless("replies empty")
        return found

    async def _answer(self, prompt: str) -> bytes:
        await self._slots.acquire()
        late = False
        try:
            async with asyncio.timeout(self._seconds):
                with _told(self._where):
                    response = await self._client.chat.completions.with_raw_response.create(
                        model=self._model, messages=[{"role": "user", "content": prompt}], temperature=1.0
                    )
            return response.content
        except TimeoutError:
            late = True
            raise _Useless("replies too late") from None
        finally:
            if late and self._at_once > 1:
                self._at_once -= 1  # the slot is not given back
            else:
                self._slots.release()


class _Gathering:
    """What was gathered for a category so far, and what was not used."""

    def __init__(self, category: Category, asking: _Asking, keep: Callable[[Record], None]) -> None:
        self.unused = Counter[str]()
        self._category = category
        self._asking = asking
        self._keep = keep
        self._distinct = Distinct(category.examples.positive + category.examples.negative)

    async def fill(self, language: str, label: int, wanted: int) -> None:
        """Asks in ever other ways until as many texts as wanted are kept, or nothing new comes any more."""
        turn = fruitless = 0
        while wanted and fruitless < _FRUITLESS:
            role, kind = _ROLES[turn % len(_ROLES)]
            prompt = _PROMPT.format(
                title=self._category.title,
                definition=self._category.definition,
                shown=_shown(self._category.examples, turn),
                number=min(wanted, _A_REPLY),
                label=_LABELS[label],
                role=kind,
                register=_REGISTERS[turn % len(_REGISTERS)],
                length=_LENGTHS[turn % len(_LENGTHS)],
                language=language,
            )
            new = list(islice(filter(self._is_new, await self._ask(prompt)), wanted))
            for text in new:
                self._keep(self._record(text, language, label, role))
            wanted -= len(new)
            fruitless = 0 if new else fruitless + 1
            turn += 1

    async def _ask(self, prompt: str) -> list[str]:
        try:
            return await self._asking.texts(prompt)
        except _Useless as useless:
            self.unused[str(useless)] += 1
            return []

    def _is_new(self, text: str) -> bool:
        if len(text) > _LONGEST:
            self.unused["too long"] += 1
        elif not self._distinct.add(text):
            self.unused["repeated"] += 1
        else:
            return True
        return False

    def _record(self, text: str, language: str, label: int, role: Role) -> Record:
        digest = blake2b(f"{role}:{text}".encode(), digest_size=8).hexdigest()
        return Record.model_validate(
            {
                "id": f"{SOURCE}-{digest}",
                "source": SOURCE,
                "lang": language,
                "turns": [{"role": role, "content": text}],
                "unsafe": None,
                "source_labels": {"category": self._category.title, "asked_for": label, "reviewed": False},
            }
        )


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What the client raises, which may quote a request or its answer, as errors of ours or as _Useless."""
    try:
        yield
    except APIConnectionError as error:
        reason = type(error.__cause__ or error).__name__
        raise Unanswered(f"{where} cannot be reached: {reason}") from None
    except APIStatusError as error:
        if error.code == "content_filter":
            raise _Useless("replies refused") from None
        status = error.status_code
        kind = Unanswered if status in (408, 409, 429) or status >= 500 else ConfigError
        raise kind(f"{where} answered with status {status}{_HINTS.get(status, '')}") from None


def _authority(url: str) -> str:
    """Host and port of a URL, without the password that may stand before them."""
    try:
        parsed = TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError:  # which quotes the URL
        raise InputError("backend", "should be a URL such as http://localhost:8000/v1") from None
    return f"{parsed.host}:{parsed.port}"


async def _only_model(client: AsyncOpenAI, where: str) -> str:
    with _told(where):
        try:
            response = await client.models.with_raw_response.list(timeout=_LISTING)
            models = _Models.model_validate_json(response.content).data
        except (InternalServerError, ValidationError):  # `transformers serve` fails where there is no cache of models
            raise ConfigError(f"{where} gave no list of models; name the one to ask") from None
    if len(models) != 1:
        raise ConfigError(f"{where} has {len(models)} models; name the one to ask")
    return models[0].id


def _shown(examples: Examples, turn: int) -> str:
    """Some examples of either label, others at each turn."""
    lines = []
    for given, label in zip((examples.positive, examples.negative), _LABELS.values(), strict=True):
        if given:
            start, number = turn * _SHOWN % len(given), min(_SHOWN, len(given))
            lines += [
                f"Texts that {label}:",
                *(dumps(text, ensure_ascii=False) for text in (given * 2)[start:][:number]),
            ]
    return "\n".join(lines) + "\n"


def _strings(value: object) -> Iterator[str]:
    """Strings of an array; of an object, which may stand around it or within it, the longest value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(max((v for v in value.values() if isinstance(v, str | list)), key=len, default=""))


def _unquoted(text: str) -> str:
    text = text.strip().removesuffix(",")
    for opening, closing in _QUOTES:
        if len(text) > 1 and text[0] == opening and text[-1] == closing:
            return text[1:-1].strip()
    return text


def _trigrams(text: str) -> frozenset[str]:
    plain = f" {' '.join(text.casefold().split())} "
    return frozenset(plain[start : start + 3] for start in range(len(plain) - 2))
