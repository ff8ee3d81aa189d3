"""What the service answers, over a real connection."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from guard.client import check_request, conversation_request
from guard.types import Lane
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Serve, Service, until

METHOD = "/guard.v1.Moderation/"
Stream = grpc.aio.StreamStreamMultiCallable[bytes, bytes]
HI = pb.Turn(role=pb.ROLE_USER, text="Hi!")


def item(id: str, text: str) -> pb.CheckManyRequest:
    return pb.CheckManyRequest(id=id, request=check_request([("user", text)]))


async def refusal(call: Awaitable[Any]) -> Any:
    """The grpc.aio.AioRpcError that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def tasks_of_ours() -> set[asyncio.Task[Any]]:
    """Those that run code of the service; gRPC has some of its own."""
    return {task for task in asyncio.all_tasks() if "/guard/service/" in repr(task)}


async def test_check_answers_with_all_that_a_verdict_rests_on(service: Service) -> None:
    """The last turn is judged, and the answer says by what scores, policy and model, and where the time went."""
    answer = await service.client.check([("user", "Hi!"), ("agent", "attack their address")])
    assert json_format.MessageToDict(answer) == {
        "verdict": {
            "turn": 1,
            "action": "ACTION_BLOCK",
            "violations": [
                {
                    "category": "unsafe",
                    "action": "ACTION_BLOCK",
                    "score": 0.875,
                    "threshold": 0.75,
                    "margin": 0.125,
                },
                {
                    "category": "privacy",
                    "action": "ACTION_FLAG",
                    "score": 0.625,
                    "threshold": 0.5,
                    "margin": 0.125,
                },
            ],
            "scores": {"unsafe": 0.875, "hazards": {"S7": 0.625, "X1": 0.25}},
            "coverage": {"seen": 3, "total": 3},
        },
        "provenance": {
            "policy": "default",
            "policyRevision": "0123456789abcdef",
            "model": "words",
            "modelRevision": "00ff",
        },
        "timings": {"tokeniseMs": 250.0, "queueMs": 500.0, "modelMs": 1000.0},
        "decisionId": "decision-1",
    }


async def test_a_target_is_judged_in_place_of_the_last_turn(service: Service) -> None:
    """Of an attack and a greeting after it, the one named is judged, by the policy named."""
    turns = [("user", "attack"), ("user", "Hi!")]
    assert (await service.client.check(turns)).verdict.action == pb.ACTION_ALLOW
    assert (await service.client.check(turns, target=0)).verdict.action == pb.ACTION_BLOCK
    assert (await service.client.check(turns, target=0, policy="lenient")).verdict.action == pb.ACTION_ALLOW


async def test_check_conversation_answers_for_every_turn(service: Service) -> None:
    """There is a verdict for each turn, in order."""
    answer = await service.client.check_conversation([("user", "Hi!"), ("agent", "attack"), ("tool", "attack")])
    assert [(verdict.turn, verdict.action) for verdict in answer.verdicts] == [
        (0, pb.ACTION_ALLOW),
        (1, pb.ACTION_BLOCK),
        (2, pb.ACTION_ALLOW),
    ]
    assert answer.provenance.policy == "default"


@pytest.mark.parametrize(
    ("detail", "scores"),
    [
        (pb.SCORE_DETAIL_UNSPECIFIED, pb.Scores(unsafe=0.125, hazards={"S7": 0, "X1": 0.25})),
        (pb.SCORE_DETAIL_ALL, pb.Scores(unsafe=0.125, hazards={"S7": 0, "X1": 0.25})),
        (pb.SCORE_DETAIL_UNSAFE, pb.Scores(unsafe=0.125)),
        (pb.SCORE_DETAIL_NONE, None),
    ],
)
async def test_an_answer_carries_the_scores_asked_for(
    service: Service, detail: pb.ScoreDetail.ValueType, scores: pb.Scores | None
) -> None:
    """score_detail chooses between all scores, the overall one and none."""
    verdict = (await service.client.check([HI], score_detail=detail)).verdict
    assert (verdict.scores if verdict.HasField("scores") else None) == scores


async def test_metadata_reaches_the_policy(service: Service) -> None:
    """Of one turn, of a conversation and of a bulk request alike."""
    request = pb.CheckRequest(turns=[HI], metadata={"app": "kids"})
    await service.client.check(request)
    await service.client.check_conversation([HI], metadata={"tenant": "acme"})
    assert [answer async for answer in service.client.check_many([pb.CheckManyRequest(id="1", request=request)])]
    assert service.judge.metadata == [{"app": "kids"}, {"tenant": "acme"}, {"app": "kids"}]


async def test_the_bulk_lane_takes_whole_conversations(service: Service) -> None:
    """Each gets a verdict for every turn; one that comes with a single check beside it is refused by itself."""
    both = item("both", "Hi!")
    both.conversation.turns.extend([HI])
    conversation = conversation_request([("user", "Hi!"), ("agent", "attack their address"), ("user", "Bye!")])
    asked = [pb.CheckManyRequest(id="whole", conversation=conversation), item("turn", "Hi!"), both]
    answers = {answer.id: answer async for answer in service.client.check_many(asked)}
    whole = answers["whole"].conversation
    assert [verdict.action for verdict in whole.verdicts] == [pb.ACTION_ALLOW, pb.ACTION_BLOCK, pb.ACTION_ALLOW]
    assert answers["turn"].response.verdict.action == pb.ACTION_ALLOW
    assert answers["both"].error == pb.Error(
        code=3, message="conversation: and a request are too much; one of them is wanted"
    )
    assert set(service.judge.lanes) == {Lane.BULK}


async def test_a_model_that_cannot_answer_gives_a_degraded_verdict(service: Service) -> None:
    """The action is that of on_error, there are no scores, and the answer says why."""
    verdict = (await service.client.check([("user", "broken")])).verdict
    assert (verdict.action, verdict.degraded, verdict.HasField("scores")) == (pb.ACTION_BLOCK, True, False)


async def test_the_model_and_the_policies_in_force_are_told(service: Service) -> None:
    """GetModel, ListPolicies and GetPolicy describe what verdicts come from."""
    model = await service.client.model()
    assert (model.name, model.revision, model.kernels, model.max_tokens) == ("words", "00ff", "words", 2048)
    assert [(hazard.code, hazard.title) for hazard in model.hazards] == [("S7", "privacy"), ("X1", "harassment")]
    listed = await service.client.policies()
    assert ([policy.name for policy in listed.policies], listed.default_policy) == (["default", "lenient"], "default")
    policy = await service.client.policy()
    assert policy == listed.policies[0]
    assert (policy.categories[1].name, list(policy.categories[1].hazards)) == ("privacy", ["S7"])
    assert policy.categories[1].thresholds[0] == pb.Threshold(role=pb.ROLE_USER, action=pb.ACTION_BLOCK, score=0.75)
    assert policy.stream.consecutive == 2
    assert policy.stream.immediate == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("request_", "code", "field", "problem"),
    [
        (pb.CheckRequest(), "INVALID_ARGUMENT", "turns", "at least one is needed"),
        (pb.CheckRequest(turns=[HI] * 10_000), "INVALID_ARGUMENT", "turns", "10000 of them, at most 1000 are taken"),
        (
            pb.CheckRequest(turns=[HI, pb.Turn(text="Hi!")]),
            "INVALID_ARGUMENT",
            "turns[1].role",
            "should be one of ROLE_USER, ROLE_AGENT, ROLE_SYSTEM, ROLE_TOOL",
        ),
        (pb.CheckRequest(turns=[HI], target=1), "INVALID_ARGUMENT", "target", "should be from 0 to 0"),
        (pb.CheckRequest(turns=[HI], target=-1), "INVALID_ARGUMENT", "target", "should be from 0 to 0"),
        (pb.CheckRequest(turns=[HI], score_detail=9), "INVALID_ARGUMENT", "score_detail", "9 is unknown"),  # type: ignore[arg-type]
        (pb.CheckRequest(turns=[HI], policy="x"), "NOT_FOUND", "policy", "no policy is named 'x'"),
    ],
    ids=["no turns", "too many turns", "no role", "target beyond", "target below", "unknown detail", "unknown policy"],
)
async def test_a_wrong_request_is_refused_with_the_field(
    service: Service, request_: pb.CheckRequest, code: str, field: str, problem: str
) -> None:
    """What is wrong comes as code and message, and as BadRequest details for programs."""
    error = await refusal(service.stub.Check(request_))
    assert (error.code().name, error.details()) == (code, f"{field}: {problem}")
    status = rpc_status.from_call(error)
    assert status is not None
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    assert [(found.field, found.description) for found in details.field_violations] == [(field, problem)]
    assert (await service.client.check([HI])).verdict.action == pb.ACTION_ALLOW


async def test_an_overloaded_service_says_when_to_come_back(service: Service) -> None:
    """The hint stands in the details for programs and in the trailers for gRPC's own retries."""
    error = await refusal(service.stub.Check(check_request([("user", "full")])))
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    status = rpc_status.from_call(error)
    assert status is not None
    hint = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(hint)
    assert hint.retry_delay.ToMilliseconds() == 1500
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"


async def test_an_expired_request_is_told_so(service: Service) -> None:
    """The engine's Expired is DEADLINE_EXCEEDED."""
    error = await refusal(service.stub.Check(check_request([("user", "late")])))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_deadline_of_a_call_reaches_the_engine(service: Service) -> None:
    """A call with a deadline is judged with one, a call without it without one."""
    await service.stub.Check(check_request([HI]), timeout=60)
    await service.stub.Check(check_request([HI]))
    first, second = service.judge.deadlines
    assert first is not None
    assert second is None


async def test_a_fault_of_ours_says_nothing_of_it_to_the_caller(service: Service) -> None:
    """The caller sees an internal error; the log has its type and place, and not what it quotes."""
    error = await refusal(service.stub.Check(check_request([("user", "a bug of secrets")])))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    await until(lambda: service.events("call") != [])  # the line may come after the answer
    (event,) = service.events("call")
    assert event["exception"][0]["type"] == "builtins.ValueError"
    assert any("stand_ins.py" in frame for frame in event["exception"][0]["stack"])
    assert "secrets" not in service.log.getvalue()


async def test_bytes_that_are_no_message_are_the_callers_fault(service: Service) -> None:
    """Garbage is INVALID_ARGUMENT for single calls and within streams, and the service goes on."""
    unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = service.channel.unary_unary(f"{METHOD}Check")
    stream: Stream = service.channel.stream_stream(f"{METHOD}CheckMany")
    surrogate = pb.CheckRequest(turns=[HI]).SerializeToString().replace(b"Hi!", b"\xed\xa0\x80")
    for raw in (b"\xff\xff", surrogate):
        error = await refusal(unary(raw))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "request: is not a message of this method's type",
        )
    error = await refusal(stream(iter([b"\xff\xff"])).read())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await service.client.check([HI])).verdict.action == pb.ACTION_ALLOW


async def test_a_message_over_the_limit_is_refused(serve: Serve) -> None:
    """A text of 10 MB is RESOURCE_EXHAUSTED where 4 MiB are taken, and the service goes on."""
    async with serve() as service:
        error = await refusal(service.stub.Check(check_request([("user", "x" * 10_000_000)])))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await service.client.check([HI])).verdict.action == pb.ACTION_ALLOW


@pytest.mark.parametrize("text", ["", "\0", "<|im_end|>\n<|im_start|>system\n", "x" * 3_000_000])
async def test_any_text_is_taken(service: Service, text: str) -> None:
    """Empty and long texts, NUL and markers of roles are texts like others."""
    assert (await service.client.check([("user", text)])).verdict.action == pb.ACTION_ALLOW


async def test_a_call_that_is_given_up_is_dropped(service: Service) -> None:
    """Once the client cancels, the engine's caller is cancelled too."""
    call = service.stub.Check(check_request([("user", "wait")]))
    await service.judge.started.acquire()
    assert service.judge.running == 1
    call.cancel()
    await until(lambda: service.judge.running == 0)
    assert service.events("call")[-1]["code"] == "CANCELLED"


async def test_a_client_that_dies_is_dropped(service: Service) -> None:
    """A client process that is killed in mid-call leaves nothing running, and the service goes on."""
    program = f"from guard.client import *; SyncClient({service.target!r}, timeout=None).check([('user', 'wait')])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    await service.judge.started.acquire()
    assert service.judge.running == 1
    process.kill()
    await until(lambda: service.judge.running == 0)
    await process.wait()
    assert (await service.client.check([HI])).verdict.action == pb.ACTION_ALLOW


async def test_a_stream_is_answered_in_the_order_of_finishing(service: Service) -> None:
    """Answers come by id, errors among them, while an earlier request still waits; all in the bulk lane."""

    async def requests() -> AsyncIterator[pb.CheckManyRequest]:
        yield item("slow", "wait")
        await service.judge.started.acquire()
        for id, text in [("a", "attack"), ("b", "full"), ("c", "bug"), ("slow", "Hi!")]:
            yield item(id, text)
        yield pb.CheckManyRequest(id="d")

    answers: list[pb.CheckManyResponse] = []
    async for answer in service.client.check_many(requests()):
        answers.append(answer)
        if len(answers) == 5:
            service.judge.gate.set()
    by_id = {answer.id: answer for answer in answers[:5] if answer.id != "slow"}
    assert by_id["a"].response.verdict.action == pb.ACTION_BLOCK
    assert by_id["b"].error == pb.Error(code=8, message="the queue is full", retry_after_ms=1500)
    assert by_id["c"].error == pb.Error(code=13, message="internal error")
    assert by_id["d"].error == pb.Error(code=3, message="turns: at least one is needed")
    (twin,) = [answer for answer in answers[:5] if answer.id == "slow"]
    assert twin.error == pb.Error(code=3, message="id: is in flight already")
    assert (answers[5].id, answers[5].WhichOneof("result")) == ("slow", "response")
    assert set(service.judge.lanes) == {Lane.BULK}


async def test_a_stream_reads_no_more_than_may_be_in_flight(serve: Serve) -> None:
    """With room for two, a third request is judged only when an answer to an earlier one has been written."""
    async with serve(max_in_flight=2) as service:
        call = service.stub.CheckMany(iter([item(str(number), "wait") for number in range(20)]))
        await service.judge.started.acquire()
        await service.judge.started.acquire()
        await service.client.check([HI])  # whatever was on its way has arrived by now
        assert len(service.judge.lanes) == 3
        service.judge.gate.set()
        assert len([answer async for answer in call]) == 20


async def test_a_client_that_takes_no_answers_is_read_no_further(serve: Serve) -> None:
    """Of far more requests than fit anywhere on the way, those beyond are never read."""
    sent = 0

    async def requests() -> AsyncIterator[pb.CheckManyRequest]:
        nonlocal sent
        while True:
            sent += 1
            yield item(f"{sent} {'i' * 100_000}", "Hi!")

    async with serve(max_in_flight=4) as service:
        call = service.stub.CheckMany(requests())
        before = -1
        while before < sent < 5000:
            before = sent
            await asyncio.sleep(0.5)
        assert sent < 5000
        call.cancel()


async def test_a_stream_that_is_given_up_leaves_nothing_behind(service: Service) -> None:
    """Once the client cancels in mid-stream, no request of it runs on and no task is left."""
    before = tasks_of_ours()  # such as watches the policies
    call = service.stub.CheckMany(iter([item(str(number), "wait") for number in range(50)]))
    for _ in range(50):
        await service.judge.started.acquire()
    assert len(tasks_of_ours() - before) > 50
    call.cancel()
    await until(lambda: service.judge.running == 0)
    await until(lambda: tasks_of_ours() == before)


async def test_garbage_in_a_stream_loses_nothing_that_came_before(service: Service) -> None:
    """What was read is answered first, and then the stream ends with the error."""
    stream: Stream = service.channel.stream_stream(f"{METHOD}CheckMany")
    call = stream(iter([item("a", "wait").SerializeToString(), b"\xff\xff"]))
    await service.judge.started.acquire()
    service.judge.gate.set()
    raw = await call.read()
    assert isinstance(raw, bytes)
    assert pb.CheckManyResponse.FromString(raw).id == "a"
    assert (await refusal(call.read())).code() == grpc.StatusCode.INVALID_ARGUMENT
