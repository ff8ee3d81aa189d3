"""A reply that streams: its events are held until what they say is judged, and go on as they came, or are cut."""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from guard.errors import InputError
from guard.service import convert
from guard.service.gateway.apis import Api, loads, whole
from guard.service.gateway.events import Event, Events, Framing
from guard.service.stream import Characters
from guard.types import Action
from guard.v1 import moderation_pb2 as pb

_AHEAD = 2**18  # bytes that are held before reading stops
_DONE = b"[DONE]"


class Segment(NamedTuple):
    """So many bytes of the backend's are dealt with, and `given` goes on in their place."""

    taken: int
    given: bytes


class Judging(Protocol):
    """Judges a turn while it is written; see guard.service.stream."""

    def answers(
        self, requests: AsyncIterator[pb.CheckStreamRequest]
    ) -> AsyncGenerator[pb.CheckStreamResponse, None]: ...


@dataclass(eq=False, slots=True)
class Choice:
    """One reply of those that stream side by side; counts are characters."""

    judging: Judging
    said: asyncio.Queue[pb.CheckStreamRequest | None] = field(default_factory=asyncio.Queue)
    characters: Characters = field(default_factory=Characters)
    part: str = ""
    length: int = 0
    released: int = 0
    has_ended: bool = False  # the backend says
    is_complete: bool = False  # and all of it passes
    ending: str | None = None  # it is cut, and this stands in place of the rest
    is_told: bool = False  # of the cut
    action: Action = Action.ALLOW
    said_last: pb.CheckStreamResponse | None = None  # with a verdict
    following: asyncio.Task[None] | None = None

    def say(self, text: str, part: str) -> None:
        if part != self.part and self.length:
            text = f"\n{text}"
        self.part = part
        try:
            said = self.characters.add(text.encode("utf-8", "surrogatepass"))
        except InputError:  # half a character without its other half: as a reader is shown it
            self.characters = Characters()
            said = "\ufffd" + whole(text)
        self.length += len(said)
        self.said.put_nowait(pb.CheckStreamRequest(delta=said.encode()))

    def end(self) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.said.put_nowait(pb.CheckStreamRequest(end=pb.StreamEnd()))
            self.said.put_nowait(None)

    async def requests(self) -> AsyncIterator[pb.CheckStreamRequest]:
        while (request := await self.said.get()) is not None:
            yield request


@dataclass(frozen=True, slots=True)
class _Held:
    """An event, and up to where each choice must be released for it to go on; a last one asks for its end, too."""

    event: Event
    says: dict[str, object] | None
    needs: dict[int, int]
    ends: frozenset[int]


class StreamedReply:
    """Every byte is passed on as it came, in order, whole events at a time; nothing that no verdict covers.

    `begin` starts to judge a choice. `refused` is what is said in place of what does not pass, from the response that
    cuts it. `failed` tells what becomes of a choice whose judging raised: None to let it pass, or the words to end it.
    """

    def __init__(
        self,
        api: Api,
        framing: Framing,
        replies: int,
        limit: int,
        begin: Callable[[int], Judging],
        refused: Callable[[pb.CheckStreamResponse], str],
        failed: Callable[[Exception], str | None],
    ) -> None:
        self._api = api
        self._replies = replies
        self._events = Events(framing, limit)
        self._begin = begin
        self._refused = refused
        self._failed = failed
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._choices: dict[int, Choice] = {}
        self._moved = asyncio.Event()
        self._is_read = False
        self.is_unchecked = False

    async def segments(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[Segment, None]:
        """What becomes of the chunks. It ends with them, or when every reply is cut."""
        reading: asyncio.Task[bytes | None] | None = None
        moving: asyncio.Task[bool] | None = None
        try:
            while True:
                self._moved.clear()
                for segment in self._ready():
                    yield segment
                if self._is_over():
                    return
                if reading is None and not self._is_read and self._held_bytes < _AHEAD:
                    reading = asyncio.create_task(_next(chunks))
                moving = moving or asyncio.create_task(self._moved.wait())
                waiting = {task for task in (reading, moving) if task is not None}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if reading is not None and reading.done():
                    self._take(reading.result())
                    reading = None
                if moving.done():
                    moving = None
        finally:
            followers = [choice.following for choice in self._choices.values()]
            tasks = [task for task in (reading, moving, *followers) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def action(self) -> Action:
        """The strictest of the choices' last verdicts."""
        return max((choice.action for choice in self._choices.values()), default=Action.ALLOW)

    @property
    def decisive(self) -> pb.CheckStreamResponse | None:
        """The last verdict on the choice that came off worst."""
        worst = max(self._choices.values(), key=lambda choice: choice.action, default=None)
        return worst.said_last if worst is not None else None

    def _is_over(self) -> bool:
        choices = self._choices.values()
        if self._all_told():
            return True
        return self._is_read and not self._held and all(choice.is_told or choice.is_complete for choice in choices)

    def _all_told(self) -> bool:
        return len(self._choices) >= self._replies and all(choice.is_told for choice in self._choices.values())

    def _take(self, chunk: bytes | None) -> None:
        """Reads what has come; what cannot be read ends every reply, as it cannot be judged."""
        try:
            for event in self._events.add(chunk or b"", final=chunk is None):
                self._hold(event)
        except InputError:
            self._is_read = True
            for index in range(self._replies):  # those that have not begun end, too
                if len(self._choices) < self._replies:
                    self._choice(index)
            for choice in self._choices.values():
                self._cut(choice, "")
            return
        if chunk is None:
            self._is_read = True
            for choice in self._choices.values():
                choice.end()

    def _hold(self, event: Event) -> None:
        says = None if not event.data or event.data == _DONE else loads(event.data, "reply")
        needs: dict[int, int] = {}
        ends = set()
        for index, text, part, is_last in self._api.pieces(says) if says is not None else ():
            choice = self._choice(index)
            if text and not choice.has_ended:
                choice.say(text, part)
            if is_last:
                choice.end()
                ends.add(index)
            needs[index] = choice.length
        self._held.append(_Held(event, says, needs, frozenset(ends)))
        self._held_bytes += len(event.raw)

    def _choice(self, index: int) -> Choice:
        if index not in self._choices:
            if len(self._choices) >= self._replies:
                raise InputError("reply", "has more choices than were asked for")
            self._choices[index] = choice = Choice(self._begin(index))
            choice.following = asyncio.create_task(self._follow(choice))
        return self._choices[index]

    async def _follow(self, choice: Choice) -> None:
        try:
            async for answer in choice.judging.answers(choice.requests()):
                choice.released = max(choice.released, answer.release)
                if answer.HasField("verdict"):
                    choice.action, choice.said_last = convert.to_action(answer.verdict.action), answer
                    self.is_unchecked |= answer.verdict.degraded
                if answer.HasField("cut"):
                    self._cut(choice, self._refused(answer))
                choice.is_complete |= answer.complete and choice.ending is None
                self._moved.set()
        except Exception as error:
            ending = self._failed(error)
            if ending is None:
                self.is_unchecked = True
                choice.released, choice.is_complete = sys.maxsize, True
            else:
                self._cut(choice, ending)
        if choice.has_ended and choice.ending is None:
            choice.is_complete = True
        self._moved.set()

    def _cut(self, choice: Choice, ending: str) -> None:
        if choice.ending is None:
            choice.ending = ending
        choice.action = max(choice.action, Action.REDIRECT)

    def _ready(self) -> Iterator[Segment]:
        """What may go on now; then the ends of replies that are cut and of which nothing is held any more."""
        while self._held and not self._all_told() and (segment := self._judged(self._held[0])) is not None:
            held = self._held.popleft()
            self._held_bytes -= len(held.event.raw)
            if segment.given and held.says is not None and segment.given is held.event.raw:
                self._api.passed(held.says)
            yield segment
        held_choices = {index for held in self._held for index in held.needs}
        for index, choice in self._choices.items():
            if choice.ending is not None and index not in held_choices and not choice.is_told:
                yield Segment(0, self._tell(index, choice))

    def _judged(self, held: _Held) -> Segment | None:
        """What becomes of an event; None where that is not known yet."""
        size, choices = len(held.event.raw), [(index, self._choices[index]) for index in held.needs]
        if any(choice.ending is not None and not self._passes(index, held) for index, choice in choices):
            for _, choice in choices:  # what else stands in the event cannot be told apart from it
                self._cut(choice, "")
            return Segment(size, b"".join(self._tell(index, choice) for index, choice in choices if not choice.is_told))
        return Segment(size, held.event.raw) if all(self._passes(index, held) for index, _ in choices) else None

    def _passes(self, index: int, held: _Held) -> bool:
        choice = self._choices[index]
        return choice.released >= held.needs[index] and (index not in held.ends or choice.is_complete)

    def _tell(self, index: int, choice: Choice) -> bytes:
        choice.is_told = True
        ending = self._api.cut(index, choice.ending or "")
        return ending + self._api.done if self._all_told() else ending


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)
