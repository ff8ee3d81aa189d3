"""Turns that are judged while they are written: pieces of text come in, verdicts and what may be shown go out."""

import asyncio
import codecs
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from guard.errors import Idle, InputError, Overloaded
from guard.policy.compile import Debounce
from guard.service import convert
from guard.service.rollout import Rollout
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Action, Conversation, Decision, Lane, Role, Turn, Verdict
from guard.v1 import moderation_pb2 as pb

Settled = Callable[[Decision, Conversation, str, Mapping[str, str]], None]

_TOKEN_CHARACTERS = 4  # of a token, about
_AHEAD = 16_384  # characters that are taken before they are judged
_LAG_CHARACTERS, _LAG_MS = 200, 1000
_SENTENCE_END = re.compile(r"[.!?…:;]['\"”’)\]]*\s|[。！？；]|\n")


class Characters:
    """Bytes of UTF-8, however they are cut, to whole characters; among them halves as UTF-16 cuts, encoded each."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self._utf16 = codecs.getincrementaldecoder("utf-16-le")()

    def add(self, data: bytes, final: bool = False) -> str:
        """The characters that are whole now; raises InputError for what is no character, or is `final` half one."""
        try:
            return self._utf16.decode(self._utf8.decode(data, final).encode("utf-16-le", "surrogatepass"), final)
        except UnicodeDecodeError:
            raise InputError("delta", "is not valid UTF-8") from None


@dataclass(slots=True)
class Writing:
    """A turn that is being written: how far it was judged, and may be shown. Counts are characters."""

    index: int
    before: tuple[Turn, ...]
    role: Role
    text: str = ""
    complete: bool = False
    judged: int = 0
    clean: int = 0  # up to where the last verdict that lets it pass reaches
    hits: int = 0  # verdicts in a row that do not
    first_hit: int = 0
    released: int = 0
    waiting_since: float = 0.0  # of the first character that is not judged
    settled: bool = False  # nothing more is to be said of it
    is_cut: bool = False
    characters: Characters = field(default_factory=Characters)

    def add(self, data: bytes, now: float) -> None:
        if self.judged == len(self.text):
            self.waiting_since = now
        self.text += self.characters.add(data)

    def finish(self) -> None:
        if not self.complete and not self.settled:
            self.text += self.characters.add(b"", final=True)
        self.complete = True

    def conversation(self, end: int) -> Conversation:
        return Conversation((*self.before, Turn(self.role, self.text[:end])), len(self.before))

    def due(self, now: float, settings: Settings) -> float | None:
        """In how many seconds it is to be judged; None where there is nothing to judge yet."""
        unjudged = len(self.text) - self.judged
        if self.settled or (not unjudged and not self.complete):
            return None
        if (
            self.complete
            or unjudged >= settings.stream_tokens * _TOKEN_CHARACTERS
            or _SENTENCE_END.search(self.text, max(0, self.judged - 2))
        ):
            return 0.0
        return max(0.0, self.waiting_since + settings.stream_wait_seconds - now)

    def take(self, verdict: Verdict, end: int, asked: float, debounce: Debounce, is_last: bool) -> bool:
        """Counts a verdict on the first `end` characters, all that there were as it was asked; whether it cuts."""
        self.judged, self.waiting_since = end, asked
        if verdict.action < Action.REDIRECT:
            self.clean, self.hits = end, 0
            return False
        if not self.hits:
            self.first_hit = end
        self.hits += 1
        alone = any(
            violation.rule or violation.margin >= debounce.immediate * (1 - violation.threshold)
            for violation in verdict.violations
            if violation.action >= Action.REDIRECT
        )
        return alone or is_last or self.hits >= debounce.consecutive

    def release(self, opened: pb.StreamOpen, now: float) -> int:
        """Up to where it may be shown now."""
        match opened.mode:
            case pb.STREAM_MODE_MONITOR:
                reached = len(self.text)
            case pb.STREAM_MODE_LAG if not self.hits:
                reached = self.clean
                milliseconds = opened.lag_ms if opened.HasField("lag_ms") else _LAG_MS
                if self.judged == len(self.text) or now - self.waiting_since <= milliseconds / 1000:
                    characters = opened.lag_characters if opened.HasField("lag_characters") else _LAG_CHARACTERS
                    reached = min(len(self.text), reached + characters)
            case _:
                reached = self.clean
        self.released = max(self.released, reached)
        return self.released


class Stream:
    """One stream, from its opening to its end. Nothing outlives it, but what the prefix cache holds for a while."""

    def __init__(
        self,
        opened: pb.StreamOpen,
        rollout: Rollout,
        settings: Settings,
        telemetry: Telemetry,
        client: str,
        settled: Settled,
    ) -> None:
        """`settled` is told the last decision on each turn. Raises InputError for what the opening asks."""
        self._opened = opened
        self._rollout = rollout
        self._settings = settings
        self._metrics = telemetry.metrics
        self._client = client
        self._settled = settled
        self._conversation_id = opened.conversation_id or uuid.uuid4().hex  # so that one side of a roll-out answers
        convert.check_opening(opened)
        rollout.policies.get(opened.policy)
        self._writing = Writing(0, *convert.to_writing((), opened, settings.max_turns))
        self._last: tuple[int, Decision] | None = None  # characters, and what was said of them
        self._not_before = 0.0  # is the engine to be asked again, where it was overloaded
        self._following: pb.StreamNext | None = None
        self._is_over = False

    async def answers(
        self, requests: AsyncIterator[pb.CheckStreamRequest]
    ) -> AsyncGenerator[pb.CheckStreamResponse, None]:
        """The loop: takes what comes, judges when it is time, and tells what may be shown."""
        reading: asyncio.Task[pb.CheckStreamRequest | None] | None = None
        judging: asyncio.Task[pb.CheckStreamResponse | None] | None = None
        heard = time.monotonic()
        try:
            while not self._ends():
                now = time.monotonic()
                due = None if judging else self._due(now)
                if due == 0:
                    judging, due = asyncio.create_task(self._judge()), None
                if reading is None and self._has_room():
                    reading = asyncio.create_task(_next(requests))
                quiet = heard + self._settings.stream_idle_seconds - now if not judging and due is None else None
                done = await _first(reading, judging, within=quiet if due is None else due)
                if not done and quiet is not None:
                    raise Idle
                if reading is not None and reading in done:
                    step, reading, heard = reading.result(), None, time.monotonic()
                    if self._take(step, heard) and (response := self._release(heard)) is not None:
                        yield response
                if judging is not None and judging in done:
                    answer, judging, heard = judging.result(), None, time.monotonic()
                    if answer is not None:
                        yield answer
        finally:
            for task in filter(None, (reading, judging)):
                task.cancel()
            await asyncio.gather(*filter(None, (reading, judging)), return_exceptions=True)

    def _ends(self) -> bool:
        """Whether all is said; begins the turn that follows where the one before it is settled."""
        if self._writing.settled and self._following is not None:
            self._begin(self._following)
        return self._writing.settled and self._is_over

    def _begin(self, following: pb.StreamNext) -> None:
        done = self._writing
        said = done.text[: done.released] if done.is_cut else done.text
        before = (*done.before, Turn(done.role, said))
        self._writing = Writing(done.index + 1, *convert.to_writing(before, following, self._settings.max_turns))
        self._following = self._last = None

    def _has_room(self) -> bool:
        writing = self._writing
        if self._is_over or self._following is not None:
            return False
        return writing.settled or len(writing.text) - writing.judged < _AHEAD

    def _take(self, step: pb.CheckStreamRequest | None, now: float) -> bool:
        """What a message says; None is the end of all. Whether there may be more to show."""
        writing = self._writing
        kind = step.WhichOneof("step") if step is not None else None
        if kind == "open":
            raise InputError("open", "comes once, and first")
        if step is None or kind == "next":
            self._is_over = step is None
            self._following = step.next if step is not None else None
            if writing.text or writing.complete or step is not None:
                writing.finish()
            else:  # nothing came after the opening, or after the turn before
                writing.settled = True
        elif kind == "end":
            writing.finish()
        elif writing.complete and kind == "delta":
            raise InputError("delta", "the turn is complete")
        elif not writing.settled:
            if len(writing.text) + len(step.delta) > self._settings.max_message_bytes:
                raise InputError("delta", "the turn is too long")
            writing.add(step.delta, now)
        return not writing.settled

    def _due(self, now: float) -> float | None:
        """In how many seconds to ask the engine; None where there is nothing to ask."""
        due = self._writing.due(now, self._settings)
        return None if due is None else max(due, self._not_before - now, 0.0)

    def _release(self, now: float) -> pb.CheckStreamResponse | None:
        """What of the text may be shown before it is judged."""
        writing = self._writing
        shown = writing.released
        if writing.release(self._opened, now) == shown:
            return None
        return pb.CheckStreamResponse(turn=writing.index, release=writing.released, judged=writing.judged)

    async def _judge(self) -> pb.CheckStreamResponse | None:
        """A verdict on what there is, and what follows from it; None where the engine has no room for now."""
        writing, opened, started = self._writing, self._opened, time.monotonic()
        end, is_last = len(writing.text), writing.complete
        try:
            decision = await self._ask(end)
        except Overloaded as error:
            self._not_before = started + error.retry_after
            return None
        (verdict,) = decision.verdicts
        self._metrics.stream_verdicts.labels(verdict.action.name.lower()).inc()
        policy = self._rollout.policies.choose(opened.policy, self._conversation_id).policy
        is_cut = writing.take(verdict, end, started, policy.stream, is_last)
        cut = None
        if is_cut and opened.mode != pb.STREAM_MODE_MONITOR:
            shown = writing.released
            cut = pb.StreamCut(offset=await self._beginning(), shown=shown)
            writing.is_cut = True
            self._metrics.stream_cuts.labels(policy.name).inc()
        writing.settled = is_last or cut is not None
        if writing.settled:
            metadata = dict(opened.metadata)
            self._settled(decision, writing.conversation(end), opened.conversation_id, metadata)
        release = writing.released if cut is not None else writing.release(opened, time.monotonic())
        answer = convert.from_decision(decision, opened.score_detail)
        return pb.CheckStreamResponse(
            turn=writing.index,
            release=release,
            judged=end,
            verdict=answer.verdict,
            cut=cut,
            complete=writing.settled,
            provenance=answer.provenance,
            timings=answer.timings,
            decision_id=answer.decision_id,
        )

    async def _ask(self, end: int) -> Decision:
        """What Check would say of the first `end` characters; raises what the engine does."""
        if self._last is not None and self._last[0] == end:
            return self._last[1]
        writing = self._writing
        known = sum(len(turn.text) for turn in writing.before) + writing.judged if self._last else 0
        decision = await self._rollout.judge.judge(
            writing.conversation(end),
            policy=self._opened.policy,
            lane=Lane.INTERACTIVE,
            metadata=self._opened.metadata,
            conversation_id=self._conversation_id,
            client=self._client,
            known=known,
        )
        self._last = end, decision
        return decision

    async def _beginning(self) -> int:
        """Where the verdict turned: after the first token that does it, from the last good one to the first bad."""
        writing = self._writing
        text = writing.text[: writing.first_hit]
        ends = [end for end in await self._rollout.judge.token_ends(text) if writing.clean < end < writing.first_hit]
        low, high = 0, len(ends)  # the answer is one of ends[low:high], or after them all
        while low < high:
            middle = (low + high) // 2
            try:
                (verdict,) = (await self._ask(ends[middle])).verdicts
            except Overloaded:  # a wider answer now is better than a closer one later
                break
            if verdict.action < Action.REDIRECT:
                low = middle + 1
            else:
                high = middle
        return ends[high] if high < len(ends) else writing.first_hit


async def _next(requests: AsyncIterator[pb.CheckStreamRequest]) -> pb.CheckStreamRequest | None:
    return await anext(requests, None)


async def _first(*tasks: asyncio.Task[Any] | None, within: float | None) -> set[asyncio.Task[Any]]:
    """Those that are done, once one is; none of them after so many seconds."""
    waiting = [task for task in tasks if task is not None]
    if not waiting:
        await asyncio.sleep(within or 0)
        return set()
    return (await asyncio.wait(waiting, timeout=within, return_when=asyncio.FIRST_COMPLETED))[0]
