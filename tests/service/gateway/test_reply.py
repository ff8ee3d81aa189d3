"""Replies that stream side by side, judged by a stand-in: what passes is what came, and nothing that is not judged."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ModelFailed
from guard.service.gateway import openai
from guard.service.gateway.envoy import Duplex, InTurn
from guard.service.gateway.events import ServerSent
from guard.service.gateway.reply import StreamedReply
from guard.service.stream import Characters
from guard.v1 import moderation_pb2 as pb
from tests.service.gateway.backend import anywhere

BAD = "attack"


@dataclass
class Reader:
    """Says of every few characters that they pass, until it reads the word, or breaks; `seen` is all that it got."""

    step: int = 1
    breaks_at: int | None = None
    seen: str = ""

    async def answers(
        self, requests: AsyncIterator[pb.CheckStreamRequest]
    ) -> AsyncGenerator[pb.CheckStreamResponse, None]:
        characters = Characters()
        async for request in requests:
            is_last = request.WhichOneof("step") == "end"
            self.seen += characters.add(request.delta)
            await asyncio.sleep(0)
            if self.breaks_at is not None and len(self.seen) >= self.breaks_at:
                raise ModelFailed
            if BAD in self.seen:
                yield pb.CheckStreamResponse(
                    verdict=pb.Verdict(action=pb.ACTION_BLOCK), cut=pb.StreamCut(shown=0), complete=True
                )
                return
            held = 0 if is_last else max(self.step, len(BAD))
            verdict = pb.Verdict(action=pb.ACTION_ALLOW)
            yield pb.CheckStreamResponse(release=max(0, len(self.seen) - held), verdict=verdict, complete=is_last)


def stream(texts: list[list[str]], usage: bool = True) -> bytes:
    """Chunks of each choice, in turns."""

    def chunk(index: int, delta: object, finish: str | None = None) -> bytes:
        return (
            b"data: %s\n\n"
            % json.dumps({"id": "x", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}).encode()
        )

    longest = max(map(len, texts))
    events = [chunk(index, {"role": "assistant", "content": ""}) for index in range(len(texts))]
    for place in range(longest + 1):
        for index, parts in enumerate(texts):
            if place < len(parts):
                events.append(chunk(index, {"content": parts[place]}))
            elif place == len(parts):
                events.append(chunk(index, {}, "stop"))
    return b"".join(events) + (b'data: {"choices": []}\n\n' if usage else b"") + b"data: [DONE]\n\n"


async def passed(raw: bytes, seed: int, readers: list[Reader], fails_open: bool = False, duplex: bool = True) -> bytes:
    """What goes on of a stream that is cut anywhere."""
    outlet = Duplex() if duplex else InTurn()

    async def chunks() -> AsyncIterator[bytes]:
        for piece in anywhere(seed)(raw):
            outlet.received(len(piece))
            yield piece
            await asyncio.sleep(0)

    def failed(error: Exception) -> str | None:
        assert isinstance(error, ModelFailed)
        return None if fails_open else ""

    reply = StreamedReply(
        openai.Chat(),
        ServerSent(),
        len(readers),
        10_000,
        lambda index: readers[index % len(readers)],
        lambda _: "",
        failed,
    )
    answers = []
    reading = chunks()
    async with aclosing(reply.segments(reading)) as segments:
        async for taken, given in segments:
            answers += list(outlet.passed(taken, given))
    async for chunk in reading:
        answers += list(outlet.passed(len(chunk), b""))
    answers += list(outlet.ended(False))
    mutations = [answer.response_body.response.body_mutation for answer in answers]
    if not duplex:
        assert len(mutations) == len(anywhere(seed)(raw)), "each message has one answer"
    return b"".join(mutation.streamed_response.body if duplex else mutation.body for mutation in mutations)


PARTS = st.sampled_from(["a", " bake", "🧈", "\ud83e", "\uddc8", "\ud83e", "é"])
TEXTS = st.lists(st.lists(PARTS, max_size=12), min_size=1, max_size=3)


@given(TEXTS, st.integers(0, 10_000), st.integers(1, 9), st.booleans())
async def test_what_passes_goes_on_byte_for_byte(texts: list[list[str]], seed: int, step: int, duplex: bool) -> None:
    """Whatever cuts it, and halves of characters too; and every character was judged."""
    raw = stream(texts)
    readers = [Reader(step) for _ in texts]
    assert await passed(raw, seed, readers, duplex=duplex) == raw
    for reader, parts in zip(readers, texts, strict=True):
        expected = "".join(parts).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        assert len(reader.seen) >= len(expected.replace("\ufffd", ""))


@given(st.lists(st.sampled_from(["a", " bake"]), max_size=9), st.integers(0, 10_000), st.booleans(), st.booleans())
async def test_nothing_of_what_is_cut_goes_on_and_all_of_the_others_does(
    before: list[str], seed: int, duplex: bool, is_alone: bool
) -> None:
    texts = [[*before, BAD, *before]] if is_alone else [[*before, BAD, *before], ["fine", "."]]
    found = await passed(stream(texts), seed, [Reader() for _ in texts], duplex=duplex)
    chunks = [json.loads(line[6:]) for line in found.decode().split("\n\n") if line.startswith("data: {")]
    said = dict.fromkeys(range(len(texts)), "")
    ends: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        assert choice["index"] not in ends, "nothing after the end"
        said[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert BAD not in said[0]
    assert "".join(before).startswith(said[0])
    assert ends[0] == "content_filter"
    assert found.endswith(b"data: [DONE]\n\n")
    assert found.count(b"[DONE]") == 1
    if not is_alone:
        assert (said[1], ends[1]) == ("fine.", "stop")


@pytest.mark.parametrize("duplex", [True, False])
async def test_where_judging_breaks_the_policy_says_what_becomes_of_the_rest(duplex: bool) -> None:
    raw = stream([["abc"] * 20])
    for seed in range(20):
        assert await passed(raw, seed, [Reader(breaks_at=30)], fails_open=True, duplex=duplex) == raw
        closed = await passed(raw, seed, [Reader(breaks_at=30)], duplex=duplex)
        assert closed.count(b"abc") < 10
        assert b"content_filter" in closed


async def test_what_cannot_be_read_ends_every_reply() -> None:
    for texts in ([["abc"]], [["abc"], ["abc"]]):
        raw = b": a note\n\n" + stream(texts).replace(b'"index": 0', b'"index": 0, "index": 0')
        found = await passed(raw, 1, [Reader() for _ in texts])
        assert b"abc" not in found
        assert found.count(b"content_filter") == len(texts)
        assert found.endswith(b"data: [DONE]\n\n")


async def test_more_replies_than_were_asked_for_are_not_shown() -> None:
    for first in (b'"index": 0', b'"index": 7'):
        raw = stream([["fine"], ["more"]]).replace(b'"index": 0', first)
        found = await passed(raw, 1, [Reader()])
        assert b"more" not in found
        assert found.count(b"content_filter") == 1
        assert found.endswith(b"data: [DONE]\n\n")
