"""The clients, against a real server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import NamedTuple

import pytest

from guard.client import Client, SyncClient, check_request, conversation_request
from guard.errors import Cut, Expired, GuardError, InputError, NotFound, Overloaded, Unanswered
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Serve, Service, until

HI = [("user", "Hi!")]


def item(id: str, text: str = "Hi!") -> pb.CheckManyRequest:
    return pb.CheckManyRequest(id=id, request=check_request([("user", text)]))


class Outcome(NamedTuple):
    """What a stream gave, and what it raised then."""

    answers: list[pb.CheckManyResponse]
    error: Exception | None


Many = Callable[[Service, Iterator[pb.CheckManyRequest]], Coroutine[None, None, Outcome]]


async def many(service: Service, requests: Iterator[pb.CheckManyRequest]) -> Outcome:
    outcome = Outcome([], None)
    try:
        async for answer in service.client.check_many(requests):
            outcome.answers.append(answer)
    except Exception as error:
        return outcome._replace(error=error)
    return outcome


async def many_synchronously(service: Service, requests: Iterator[pb.CheckManyRequest]) -> Outcome:
    def ask() -> Outcome:
        outcome = Outcome([], None)
        try:
            with SyncClient(service.target, retries=False) as client:
                outcome.answers.extend(client.check_many(requests))
        except Exception as error:
            return outcome._replace(error=error)
        return outcome

    return await asyncio.to_thread(ask)


def test_a_request_is_made_from_pairs_messages_or_another_request() -> None:
    """All three say the same; options are added to what a given request says."""
    turn = pb.Turn(role=pb.ROLE_USER, text="Hi!")
    expected = pb.CheckRequest(turns=[turn], policy="strict", target=0, metadata={"a": "b"})
    given = check_request([turn], policy="default", metadata={"a": "b"})
    assert check_request(HI, policy="strict", target=0, metadata={"a": "b"}) == expected
    assert check_request(given, policy="strict", target=0) == expected
    assert given.policy == "default"
    whole = pb.CheckConversationRequest(turns=[turn], policy="strict")
    assert conversation_request(HI, policy="strict") == whole
    assert conversation_request(whole) == whole


def test_a_role_that_there_is_not_is_refused_before_it_is_sent() -> None:
    """The message names the roles that there are."""
    with pytest.raises(InputError, match=r"^role: should be one of user, agent, system, tool$"):
        check_request([("assistant", "Hi!")])


@pytest.mark.parametrize(
    ("text", "policy", "error"),
    [
        ("Hi!", "none", NotFound("policy", "no policy is named 'none'")),
        ("full", "", Overloaded(1.5)),
        ("late", "", Expired()),
        ("bug", "", Unanswered("INTERNAL: internal error")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, GuardError) else None,
)
async def test_refusals_are_errors_of_their_kind(service: Service, text: str, policy: str, error: GuardError) -> None:
    """Both clients raise what the server meant, with all that it said."""

    def check() -> None:
        with SyncClient(service.target, retries=False) as client:
            client.check([("user", text)], policy=policy)

    for call in (service.client.check([("user", text)], policy=policy), asyncio.to_thread(check)):
        with pytest.raises(type(error)) as raised:
            await call
        assert str(raised.value) == str(error)
        assert vars(raised.value) == vars(error)


async def test_no_turns_are_the_callers_fault(service: Service) -> None:
    """The field comes back with the error."""
    with pytest.raises(InputError, match=r"^turns: at least one is needed$") as raised:
        await service.client.check_conversation([])
    assert raised.value.field == "turns"


async def test_a_call_ends_by_its_timeout(service: Service) -> None:
    """A server that takes too long leaves the caller with Expired, and drops the request."""
    async with Client(service.target, timeout=0.05) as client:
        with pytest.raises(Expired):
            await client.check([("user", "wait")])


async def test_a_refused_call_is_tried_again(service: Service) -> None:
    """By default, and when the server says to: the call succeeds once the server is there for it."""
    async with Client(service.target, timeout=60) as client:
        call = asyncio.create_task(client.check([("user", "busy once")]))
        assert (await call).verdict.action == pb.ACTION_ALLOW
    assert len(service.judge.lanes) == 2


async def test_all_addresses_of_a_name_are_asked(serve: Serve) -> None:
    """Each in its turn, not the first alone."""
    async with serve() as one, serve() as other:
        target = f"ipv4:127.0.0.1:{one.server.grpc_port},127.0.0.1:{other.server.grpc_port}"
        async with Client(target) as client:
            while not (one.judge.lanes and other.judge.lanes):
                await client.check(HI)


async def test_a_server_that_is_not_there_is_told() -> None:
    """It is Unanswered, with gRPC's own words."""
    async with Client("localhost:1", retries=False) as client:
        with pytest.raises(Unanswered, match=r"^UNAVAILABLE: "):
            await client.check(HI)


async def test_thousands_may_be_in_flight(service: Service) -> None:
    """Every one of many requests is answered once."""
    requests = [item(str(number)) for number in range(3000)]
    answers = [answer async for answer in service.client.check_many(requests)]
    assert sorted(int(answer.id) for answer in answers) == list(range(3000))
    assert {answer.WhichOneof("result") for answer in answers} == {"response"}


@pytest.mark.parametrize("many", [many, many_synchronously])
async def test_an_error_of_the_requests_is_the_callers(service: Service, many: Many) -> None:
    """What the caller's own iterator raises comes back as it is, after the answers to what came before it."""

    def requests() -> Iterator[pb.CheckManyRequest]:
        yield item("a")
        raise LookupError("no more")

    answers, error = await many(service, requests())
    assert [(answer.id, answer.WhichOneof("result")) for answer in answers] == [("a", "response")]
    assert isinstance(error, LookupError)


@pytest.mark.parametrize("many", [many, many_synchronously])
async def test_what_a_broken_stream_leaves_unanswered_is_told(serve: Serve, many: Many) -> None:
    """Each request that was taken comes back, with an answer or with the cause, and the cause is raised at the end."""
    sent: list[str] = []

    def requests() -> Iterator[pb.CheckManyRequest]:
        for id in "abc":
            yield item(id, "wait")
            sent.append(id)

    async with serve(max_in_flight=1, drain_seconds=600) as service:
        asking = asyncio.create_task(many(service, requests()))
        await service.judge.started.acquire()
        await until(lambda: len(sent) == 3)
        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        service.judge.gate.set()
        answers, error = await asking
        await stopped
    assert (answers[0].id, answers[0].WhichOneof("result")) == ("a", "response")
    cause = pb.Error(code=14, message="the service is stopping")
    assert answers[1:] == [pb.CheckManyResponse(id=id, error=cause) for id in "bc"]
    assert str(error) == "UNAVAILABLE: the service is stopping"


@pytest.mark.parametrize("many", [many, many_synchronously])
async def test_a_stream_that_breaks_after_the_last_answer_is_whole(serve: Serve, many: Many) -> None:
    """Nothing is missing, though the server, which could not read on, never knew that there was no more to come."""
    async with serve(max_in_flight=1, drain_seconds=600) as service:
        asking = asyncio.create_task(many(service, iter([item("a", "wait")])))
        await service.judge.started.acquire()
        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        service.judge.gate.set()
        answers, error = await asking
        await stopped
        assert service.events("call")[-1]["code"] == "UNAVAILABLE"
    assert [(answer.id, answer.WhichOneof("result")) for answer in answers] == [("a", "response")]
    assert error is None


async def test_a_stream_that_its_taker_leaves_is_given_up(service: Service) -> None:
    """The server drops what was in flight."""

    def requests() -> Iterator[pb.CheckManyRequest]:
        yield item("a")
        yield from (item(str(number), "wait") for number in range(20))

    answers = service.client.check_many(requests())
    assert (await anext(answers)).id == "a"
    await service.judge.started.acquire()
    await answers.aclose()
    await until(lambda: service.judge.running == 0)


async def test_the_synchronous_client_does_what_the_other_does(service: Service) -> None:
    """Every method gives the answer that the asynchronous one gives."""

    def ask() -> list[object]:
        with SyncClient(service.target) as client:
            return [
                client.check(HI).verdict,
                client.check_conversation(HI).verdicts[0],
                {answer.id: answer.response.verdict for answer in client.check_many(item(str(n)) for n in range(3))},
                client.model(),
                client.policies(),
                client.policy("lenient"),
                client.serving(),
            ]

    client = service.client
    assert await asyncio.to_thread(ask) == [
        (await client.check(HI)).verdict,
        (await client.check_conversation(HI)).verdicts[0],
        {str(n): (await client.check(HI)).verdict for n in range(3)},
        await client.model(),
        await client.policies(),
        await client.policy("lenient"),
        True,
    ]
    assert await client.serving()


async def _each(pieces: Iterable[str]) -> AsyncIterator[str]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


async def show(pieces: AsyncIterator[str], shown: list[str]) -> None:
    """Piece by piece, so that what came before an error is there."""
    async for piece in pieces:
        shown.append(piece)  # noqa: PERF401 # which an error would take away


@pytest.mark.parametrize("mode", ["hold", "lag", "monitor"])
async def test_a_filter_yields_what_may_be_shown(service: Service, mode: str) -> None:
    """All of a harmless text, whole characters at a time, from either client."""
    text = "Here is what you asked for. 👩‍👩‍👧 It is \U0001d518 fine."
    units = text.encode("utf-16-le")
    halves = [units[place : place + 2].decode("utf-16-le", "surrogatepass") for place in range(0, len(units), 2)]
    shown = [piece async for piece in service.client.filter(_each(halves), [("user", "Hello!")], mode=mode)]
    assert "".join(shown) == text
    assert "".join(shown).encode()

    def in_turn() -> str:
        with SyncClient(service.target) as guard:
            return "".join(guard.filter(halves, [("user", "Hello!")], mode=mode))

    assert await asyncio.to_thread(in_turn) == text


async def test_a_filter_raises_where_a_text_is_cut(service: Service) -> None:
    """With the verdict, where it turned, and how much was shown, which is less."""
    pieces = ["All is well. ", "But this is an attack. "]
    shown = list[str]()
    with pytest.raises(Cut) as raised:
        await show(service.client.filter(_each(pieces), [("user", "Hello!")]), shown)
    assert raised.value.shown == len("".join(shown)) <= raised.value.offset == "".join(pieces).index("attack") + 6
    assert isinstance(raised.value.verdict, pb.Verdict)

    def in_turn() -> None:
        with SyncClient(service.target) as guard:
            list(guard.filter(pieces))

    with pytest.raises(Cut):
        await asyncio.to_thread(in_turn)


async def test_a_filter_tells_what_its_source_raises(service: Service) -> None:
    """After what came before it, in either client; and of a server that refuses, what it says."""

    def failing() -> Iterator[str]:
        yield "All is well. "
        raise LookupError("the backend broke")

    shown = list[str]()
    with pytest.raises(LookupError):
        await show(service.client.filter(failing()), shown)
    assert shown == ["All is well. "]
    with pytest.raises(NotFound):
        [piece async for piece in service.client.filter(["Hello"], policy="none")]
    with pytest.raises(InputError, match="role"):
        [piece async for piece in service.client.filter(["Hello"], role="nobody")]


async def test_a_filter_that_is_left_ends_the_stream(service: Service) -> None:
    """The source is taken no further, and the server is rid of it."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "Hello there. "

    pieces = service.client.filter(endless())
    assert await anext(pieces)
    await pieces.aclose()
    at = taken
    await asyncio.sleep(0.05)
    assert taken == at
    await until(lambda: service.judge.running == 0)
