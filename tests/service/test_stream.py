"""Turns that are judged while they are written: what is shown when, where a turn is cut, and what the ends leave."""

import asyncio
import random
from collections.abc import Callable, Iterable

import grpc
import pytest

from guard.v1 import moderation_pb2 as pb
from tests.conftest import Running, Serve, Service, until
from tests.service.rollouts import eventually, metrics

USER = pb.Turn(role=pb.ROLE_USER, text="Hello!")
PROMPT = {"stream_wait_seconds": 0.01, "stream_tokens": 4}
END = pb.CheckStreamRequest(end=pb.StreamEnd())


def opening(**fields: object) -> pb.CheckStreamRequest:
    opened = pb.StreamOpen(turns=[USER])
    for name, value in fields.items():
        setattr(opened, name, value)
    return pb.CheckStreamRequest(open=opened)


def delta(text: str | bytes) -> pb.CheckStreamRequest:
    return pb.CheckStreamRequest(delta=text.encode() if isinstance(text, str) else text)


async def stream(running: Running, requests: Iterable[pb.CheckStreamRequest]) -> list[pb.CheckStreamResponse]:
    return [response async for response in running.stub.CheckStream(iter(requests))]


class Talk:
    """A stream that is held open, and what came of it so far."""

    def __init__(self, running: Running, **fields: object) -> None:
        self.call = running.stub.CheckStream()
        self.opening = opening(**fields)
        self.got: list[pb.CheckStreamResponse] = []

    async def __aenter__(self) -> "Talk":
        await self.call.write(self.opening)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def say(self, text: str | bytes) -> None:
        await self.call.write(delta(text))

    async def hear(self, condition: Callable[[pb.CheckStreamResponse], bool]) -> pb.CheckStreamResponse:
        """The first response, from now on, for which the condition holds."""
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.CheckStreamResponse), "the stream ended"
            self.got.append(response)
            if condition(response):
                return response


async def test_a_whole_turn_is_judged_as_check_judges_it(service: Service) -> None:
    """The last verdict is on all of the text, in the context of what was said before; then the stream ends."""
    responses = await stream(service, [opening(), delta("An address"), delta(" and more."), END])
    last = responses[-1]
    checked = await service.stub.Check(
        pb.CheckRequest(turns=[USER, pb.Turn(role=pb.ROLE_AGENT, text="An address and more.")])
    )
    assert last.verdict == checked.verdict
    assert last.provenance == checked.provenance
    assert (last.complete, last.release, last.judged, last.HasField("cut")) == (True, 20, 20, False)
    assert [response.complete for response in responses].count(True) == 1


@pytest.mark.parametrize("mode", [pb.STREAM_MODE_UNSPECIFIED, pb.STREAM_MODE_HOLD])
async def test_what_is_held_is_released_by_a_verdict_alone(serve: Serve, mode: pb.StreamMode.ValueType) -> None:
    """No character is shown before a verdict that covers it."""
    async with serve(**PROMPT) as service, Talk(service, mode=mode) as talk:
        await talk.say("Hello there. ")
        response = await talk.hear(lambda response: response.release == 13)
        assert response.judged == 13
        assert all(own.release <= own.judged for own in talk.got)
        await talk.say("wait")
        await service.judge.started.acquire()
        await talk.say(" for it")
        service.judge.gate.set()
        assert (await talk.hear(lambda response: response.release == 24)).judged == 24


async def test_a_lagging_stream_shows_so_many_characters_ahead(serve: Serve) -> None:
    """At once, without a verdict; no further than the limit, and no further at all once that time is over."""
    async with serve(**PROMPT) as service, Talk(service, mode=pb.STREAM_MODE_LAG, lag_characters=10) as talk:
        await talk.say("wait for a verdict")
        assert (await talk.hear(lambda response: response.release > 0)).release == 10
        await service.judge.started.acquire()
        service.judge.gate.set()
        assert (await talk.hear(lambda response: response.judged > 0)).release == 18
    async with serve(**PROMPT) as service, Talk(service, mode=pb.STREAM_MODE_LAG, lag_ms=0) as talk:
        await talk.say("wait ")
        await service.judge.started.acquire()
        await talk.say("and see")
        service.judge.gate.set()
        assert (await talk.hear(lambda response: response.judged == 12)).release >= 12


async def test_a_monitored_stream_shows_all_and_says_all(serve: Serve) -> None:
    """Nothing is held, nothing is cut; the verdicts tell what would have been."""
    async with serve(**PROMPT) as service, Talk(service, mode=pb.STREAM_MODE_MONITOR) as talk:
        await talk.say("An attack. ")
        assert (await talk.hear(lambda response: response.release == 11)).release == 11
        assert (await talk.hear(lambda response: response.HasField("verdict"))).verdict.action == pb.ACTION_BLOCK
        await talk.call.write(END)
        last = await talk.hear(lambda response: response.complete)
        assert (last.verdict.action, last.HasField("cut"), last.release) == (pb.ACTION_BLOCK, False, 11)


async def test_a_cut_tells_where_the_violation_began(serve: Serve) -> None:
    """It is bisected to the token with which the verdict turned, and what was shown ends before."""
    async with serve(**PROMPT) as service, Talk(service) as talk:
        await talk.say("All is well here. ")
        await talk.hear(lambda response: response.judged == 18)
        await talk.say("Now the attack goes on and on. ")
        await talk.hear(lambda response: response.judged == 49)
        await talk.say("And on. ")
        response = await talk.hear(lambda response: response.HasField("cut"))
        assert response.cut == pb.StreamCut(offset=32, shown=18)
        assert "All is well here. Now the attack"[-6:] == "attack"
        assert (response.release, response.complete, response.verdict.action) == (18, True, pb.ACTION_BLOCK)
        await talk.say("More of it, which nobody looks at.")
        await talk.call.done_writing()
        assert await talk.call.read() is grpc.aio.EOF


async def test_one_bad_verdict_is_not_enough(serve: Serve) -> None:
    """By the default policy two in a row cut, or the last; in between nothing is shown, and a good one shows all."""

    async with serve(**PROMPT) as service, Talk(service) as talk:
        await talk.say("An attack. ")
        first = await talk.hear(lambda response: response.HasField("verdict"))
        assert (first.verdict.action, first.release, first.HasField("cut")) == (pb.ACTION_BLOCK, 0, False)
        await talk.call.write(END)
        assert (await talk.hear(lambda response: response.complete)).HasField("cut")


async def test_several_turns_in_one_stream(serve: Serve) -> None:
    """Each is judged in the context of those before; of a turn that was cut what was shown is context."""
    async with serve(**PROMPT) as service:
        then = pb.CheckStreamRequest(next=pb.StreamNext(turns=[USER]))
        requests = [opening(), delta("One."), then, delta("Two, an attack."), then, delta("Three."), END]
        responses = await stream(service, requests)
        settled = [response for response in responses if response.complete]
        assert [response.turn for response in settled] == [0, 1, 2]
        assert [response.verdict.turn for response in settled] == [1, 3, 5]
        assert [response.HasField("cut") for response in settled] == [False, True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
async def test_characters_may_be_cut_anywhere(serve: Serve, encoding: str) -> None:
    """Into bytes, and into halves as languages cut whose characters are those of UTF-16."""
    text = "Grüße, 👩\u200d👩\u200d👧! 🗝️ 日本 𝔘"
    if encoding == "utf-8":
        data = text.encode()
        pieces = [data[place : place + 1] for place in range(len(data))]
    else:
        units = text.encode("utf-16-le")
        halves = [units[place : place + 2].decode("utf-16-le", "surrogatepass") for place in range(0, len(units), 2)]
        pieces = [half.encode(errors="surrogatepass") for half in halves]
    async with serve(**PROMPT) as service:
        responses = await stream(service, [opening(), *map(delta, pieces), END])
        assert responses[-1].release == len(text)
        assert {response.release for response in responses} <= set(range(len(text) + 1))


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ([delta("Hello")], "open: comes first"),
        ([opening(), opening()], "open: comes once, and first"),
        ([opening(mode=7)], "open.mode: 7 is unknown"),
        ([opening(score_detail=7)], "open.score_detail: 7 is unknown"),
        ([opening(lag_ms=-1)], "open.lag_ms: should be 0 or more"),
        ([opening(role=9)], "role: should be one of ROLE_USER, ROLE_AGENT, ROLE_SYSTEM, ROLE_TOOL"),
        ([opening(), delta("Hello"), END, delta("again")], "delta: the turn is complete"),
        ([opening(), delta(b"\xff")], "delta: is not valid UTF-8"),
        ([opening(), delta(b"\xf0\x9f"), END], "delta: is not valid UTF-8"),
        ([opening(), delta("Hello" * 500), delta("Hello" * 500)], "delta: the turn is too long"),
    ],
)
async def test_what_is_wrong_ends_the_stream(serve: Serve, requests: list[pb.CheckStreamRequest], problem: str) -> None:
    """With the field, and what should be there."""
    async with serve(max_message_bytes=4096) as service:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream(service, requests)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details() == problem


async def test_an_unknown_policy_is_told_at_once(service: Service) -> None:
    """Before anything is said."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stream(service, [opening(policy="none")])
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_idle_stream_is_ended(serve: Serve) -> None:
    """Where nothing comes for as long as the settings say."""
    async with serve(stream_idle_seconds=0.05) as service, Talk(service) as talk:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await talk.call.read()
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_who_waits_for_a_verdict_is_not_idle(serve: Serve) -> None:
    """The time runs from the verdict on, however long that took."""
    async with serve(stream_idle_seconds=0.5, **PROMPT) as service, Talk(service) as talk:
        await talk.say("wait. ")
        await until(lambda: bool(service.judge.lanes))
        await asyncio.sleep(0.6)
        service.judge.gate.set()
        await talk.hear(lambda response: response.judged == 6)
        await talk.say("And so on. ")
        await talk.hear(lambda response: response.judged == 17)


async def test_an_overloaded_engine_is_asked_again(serve: Serve) -> None:
    """Nothing is shown meanwhile, and nothing is lost."""
    async with serve(**PROMPT) as service:
        responses = await stream(service, [opening(), delta("busy once, then not"), END])
        assert (responses[-1].release, responses[-1].complete) == (19, True)
        assert len(service.judge.lanes) > 1


async def test_a_model_that_fails_is_answered_for_by_the_policy(serve: Serve) -> None:
    """Its on_error cuts a turn, as it blocks one."""
    async with serve(**PROMPT) as service:
        last = (await stream(service, [opening(), delta("broken"), END]))[-1]
        assert last.verdict.degraded
        assert last.HasField("cut")


async def test_a_writer_is_paced(serve: Serve) -> None:
    """While much is unjudged no more is read."""
    async with serve(**PROMPT, max_message_bytes=2**26) as service, Talk(service) as talk:
        await talk.say("wait ")
        await service.judge.started.acquire()
        flood = asyncio.create_task(_flood(talk))
        await asyncio.sleep(0.2)
        assert not flood.done()
        service.judge.gate.set()
        await talk.hear(lambda response: response.release > 20_000)
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)


async def _flood(talk: Talk) -> None:
    for _ in range(2000):
        await talk.say("x" * 10_000)


async def test_streams_that_break_leave_nothing_behind(serve: Serve) -> None:
    """Whatever they were at; and those beside them are served."""
    async with serve(**PROMPT) as service:
        chance = random.Random(1)

        async def broken() -> None:
            async with Talk(service) as talk:
                await talk.say(chance.choice(["wait ", "Hello there. ", "Hel"]))
                await asyncio.sleep(chance.random() / 20)

        await asyncio.gather(*(broken() for _ in range(50)))
        await until(lambda: service.judge.running == 0)

        async def all_closed() -> bool:
            return await metrics(service, "streams") == {(): 0}

        await eventually(all_closed)
        assert (await stream(service, [opening(), delta("Still here."), END]))[-1].complete


async def test_each_turn_is_counted_and_logged_once(serve: Serve) -> None:
    """By its last verdict, as if Check had been asked."""
    async with serve(**PROMPT) as service:
        async with Talk(service) as talk:
            for _ in range(3):
                await talk.say("Well said. ")
                await talk.hear(lambda response: response.HasField("verdict"))
            await talk.call.write(END)
            await talk.hear(lambda response: response.complete)
        assert await metrics(service, "verdicts_total") == {("allow", "default"): 1}
        assert (await metrics(service, "stream_verdicts_total"))[("allow",)] >= 3


async def test_a_verdict_says_what_check_says_of_the_text_so_far(embedded: Running) -> None:
    """At every point, to the bit, with the real model; whatever was said before."""
    said = "Sure. First, unlock the phone. Then read her messages while she is asleep, and delete the log."
    pieces = [said[place : place + 7] for place in range(0, len(said), 7)]
    responses = await stream(embedded, [opening(mode=pb.STREAM_MODE_MONITOR), *map(delta, pieces), END])
    points = [response for response in responses if response.HasField("verdict")]
    assert points[-1].judged == len(said)
    for point in points:
        turn = pb.Turn(role=pb.ROLE_AGENT, text=said[: point.judged])
        assert point.verdict == (await embedded.stub.Check(pb.CheckRequest(turns=[USER, turn]))).verdict
    tokens = await metrics(embedded, "prefix_cache_tokens_total")
    assert tokens[("held",)] > tokens[("read",)]
