"""Envoy's external processor: judges a request and the reply to it, while both are on their way.

https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/ext_proc_filter
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import grpc

from guard.errors import InputError, Overloaded, Unanswered
from guard.policy.compile import Policy
from guard.service import convert
from guard.service.access import caller
from guard.service.decisions import Decisions
from guard.service.gateway import anthropic, envoy, ollama, openai
from guard.service.gateway.apis import Api, Asked, dumps, loads, whole
from guard.service.gateway.events import Framing, Lines, ServerSent
from guard.service.gateway.reply import StreamedReply
from guard.service.rollout import Rollout
from guard.service.status import reason_of
from guard.service.stream import Stream
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Action, Conversation, Decision, Role, Turn, Verdict
from guard.v1 import moderation_pb2
from guard.v1.envoy import ext_proc_pb2 as pb
from guard.v1.envoy.ext_proc_pb2_grpc import ExternalProcessorServicer

SERVICE = pb.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name

APIS: Mapping[str, type[Api]] = {
    "/chat/completions": openai.Chat,
    "/completions": openai.Completions,
    "/responses": openai.Responses,
    "/messages": anthropic.Messages,
    "/api/chat": ollama.Chat,
}
"""By how a path ends; what stands before is the backend's, such as /v1 or /openai/deployments/NAME."""
_SILENT = ("/embeddings", "/embed", "/tokenize", "/detokenize", "/count_tokens", "/rerank", "/score", "/pooling")
"""Ends of paths whose answers say nothing to anybody."""
_BODILESS = ("GET", "HEAD", "OPTIONS", "DELETE")
_FRAMINGS: Mapping[str, Framing] = {"text/event-stream": ServerSent(), "application/x-ndjson": Lines()}

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What Envoy says of a route in the metadata of its calls, as guard-policy, guard-metadata-NAME and so on.

    `other` is what becomes of what no API here explains; `headers` are those of a request that policies may ask for.
    """

    policy: str = ""
    other: Literal["refuse", "pass"] = "refuse"
    optimistic: bool = False
    mode: moderation_pb2.StreamMode.ValueType = moderation_pb2.STREAM_MODE_HOLD
    conversation_header: str = "x-conversation-id"
    headers: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, given: Iterable[tuple[str, str | bytes]]) -> Self:
        """Raises InputError for what is unknown."""
        values: dict[str, Any] = {"metadata": ()}
        for name, value in given:
            match name.removeprefix("guard-") if name.startswith("guard-") else "", value:
                case "", _:
                    pass
                case ("policy" | "conversation-header") as key, str():
                    values[key.replace("-", "_")] = value
                case "other", "refuse" | "pass":
                    values["other"] = value
                case "optimistic", "true" | "false":
                    values["optimistic"] = value == "true"
                case "mode", "hold" | "lag" | "monitor":
                    values["mode"] = moderation_pb2.StreamMode.Value(f"STREAM_MODE_{value.upper()}")
                case "headers", str():
                    values["headers"] = tuple(filter(None, (part.strip().lower() for part in value.split(","))))
                case key, str() if key.startswith("metadata-"):
                    values["metadata"] += ((key.removeprefix("metadata-"), value),)
                case _:
                    raise InputError(name, "is unknown, or cannot be so")
        return cls(**values)


class ExtProc(ExternalProcessorServicer):
    """A call is one HTTP exchange. Where no policy is known yet the call fails, and Envoy does as it is set to."""

    def __init__(self, settings: Settings, telemetry: Telemetry, rollout: Rollout, decisions: Decisions) -> None:
        # How long a backend may think is Envoy's to say.
        self._settings = settings.model_copy(update={"stream_idle_seconds": float(sys.maxsize)})
        self._telemetry = telemetry
        self._rollout = rollout
        self._decisions = decisions

    async def Process(
        self, request_iterator: AsyncIterator[pb.ProcessingRequest], context: _Context
    ) -> AsyncIterator[pb.ProcessingResponse]:
        options = Options.of(context.invocation_metadata() or ())
        exchange = _Exchange(options, self._settings, self._telemetry, self._rollout, self._decisions)
        async with aclosing(exchange.answers(request_iterator)) as answers:
            async for answer in answers:
                yield answer


class _Outcome(NamedTuple):
    """What is said of a request or a reply. `word` is its action, or why there is none."""

    word: str
    action: Action = Action.ALLOW
    decision: Decision | None = None
    verdict: Verdict | None = None
    error: Unanswered | None = None

    @property
    def refuses(self) -> bool:
        return self.action >= Action.REDIRECT

    def words(self, policy: Policy) -> str:
        """What people are told in place of what is refused; nothing where that is for an error to say."""
        reply = self.verdict.reply if self.verdict is not None else None
        if reply is not None:
            return reply.text
        return policy.refusal.text if policy.refusal.form == "reply" else ""

    def facts(self) -> dict[str, str]:
        """The outcome for people and programs, without anybody's text."""
        found = {"action": self.word}
        if self.verdict is not None and self.verdict.violations:
            named = dict.fromkeys(violation.category or violation.rule for violation in self.verdict.violations)
            found["violations"] = ", ".join(named)
        if self.decision is not None:
            policy = self.decision.policy
            found |= {"decision": self.decision.id, "policy": f"{policy.name}@{policy.revision}"}
        return found


_NOTHING = _Outcome("none")  # was to be judged
_UNCHECKED = _Outcome("unchecked")
_STREAM = _Outcome("stream")  # is judged as it comes


class _Refused(Exception):
    """The exchange ends here, with an answer of ours."""

    def __init__(self, answer: pb.ProcessingResponse) -> None:
        self.answer = answer


class _Exchange:
    """One request and its reply."""

    def __init__(
        self, options: Options, settings: Settings, telemetry: Telemetry, rollout: Rollout, decisions: Decisions
    ) -> None:
        self._options = options
        self._settings = settings
        self._telemetry = telemetry
        self._rollout = rollout
        self._decisions = decisions
        self._api: Api = openai.Chat()  # whose errors most clients can read
        self._is_known = False  # which API it is
        self._asked: Asked | None = None
        self._judging: asyncio.Task[_Outcome] | None = None
        self._request, self._reply = _NOTHING, _NOTHING
        self._outlet: envoy.Outlet = envoy.InTurn()
        self._is_over = False
        self._conversation_id = ""
        self._metadata = dict(options.metadata)

    async def answers(
        self, messages: AsyncIterator[pb.ProcessingRequest]
    ) -> AsyncGenerator[pb.ProcessingResponse, None]:
        try:
            async for message in messages:
                match message.WhichOneof("request"):
                    case "request_headers":
                        if message.protocol_config.response_body_mode == pb.FULL_DUPLEX_STREAMED:
                            self._outlet = envoy.Duplex()
                        yield self._begin(message.request_headers)
                    case "request_body" if self._is_known:
                        yield await self._ask(message.request_body.body)
                    case "request_body":  # Envoy need not heed what it is told to leave out
                        yield pb.ProcessingResponse(request_body=pb.BodyResponse())
                    case "response_headers":
                        async with aclosing(self._answer(message.response_headers, messages)) as answers:
                            async for answer in answers:
                                yield answer
                        if self._is_over:
                            return
                    case "response_body":  # of which nothing is looked at
                        for answer in self._outlet.echoed(message.response_body):
                            yield answer
                    case "request_trailers":
                        yield pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
                    case _:
                        yield pb.ProcessingResponse(response_trailers=pb.TrailersResponse())
        except _Refused as refused:
            yield refused.answer
        finally:
            if self._judging is not None:
                self._judging.cancel()
                await asyncio.gather(self._judging, return_exceptions=True)
            api = "" if self._asked is None else type(self._api).__module__.rpartition(".")[2]
            self._telemetry.metrics.exchanges.labels(api, self._request.word, self._reply.word).inc()

    @property
    def _policy(self) -> Policy:
        """That of the exchange; raises Loading and NotFound."""
        return self._rollout.policies.choose(self._options.policy, self._conversation_id).policy

    def _begin(self, message: pb.HttpHeaders) -> pb.ProcessingResponse:
        """The request's headers tell which API it is, and whether it can be read."""
        headers = envoy.headers_of(message)
        path = headers.get(":path", "").partition("?")[0].rstrip("/")
        self._conversation_id = headers.get(self._options.conversation_header, "")
        self._metadata |= {name: headers[name] for name in self._options.headers if name in headers}
        if message.end_of_stream or headers.get(":method") in _BODILESS or path.endswith(_SILENT):
            return envoy.passing()
        kind = next((api for end, api in APIS.items() if path.endswith(end)), None)
        if kind is None and self._options.other == "pass":
            self._request = self._reply = _UNCHECKED
            return envoy.passing()
        if kind is None:
            raise self._error(403, "what this path takes cannot be checked", "guard_unknown_path")
        self._api, self._is_known = kind(), True
        try:
            self._policy  # noqa: B018 # is there
        except InputError:
            raise self._error(500, "the policy of this route is unknown", "guard_unknown_policy") from None
        if headers.get("content-encoding", "identity") != "identity":
            raise self._error(415, "a compressed request cannot be checked", "guard_unreadable")
        common = pb.CommonResponse(header_mutation=envoy.setting({"accept-encoding": "identity"}))
        return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))

    async def _ask(self, body: bytes) -> pb.ProcessingResponse:
        """The request's body, whole, is judged before it goes up, or while the backend begins."""
        try:
            self._asked = asked = self._api.ask(loads(body, "request", folds=True))
            if any(len(turns) >= self._settings.max_turns for turns in asked.conversations):
                raise InputError("request", f"has too many turns, at most {self._settings.max_turns} are taken")
        except InputError as error:
            raise self._error(400, f"the request cannot be checked; {error}", "guard_unreadable") from None
        self._judging = asyncio.create_task(self._judge_request(asked))
        if not self._options.optimistic:
            await self._settle(asked)
        return envoy.tell(pb.ProcessingResponse(request_body=pb.BodyResponse()), {"request": self._request.facts()})

    async def _judge_request(self, asked: Asked) -> _Outcome:
        """The strictest of what is said of the turns that were not answered yet."""
        turns = [
            Conversation(turns[: index + 1], index)
            for turns, new in zip(asked.conversations, asked.new, strict=True)
            for index in new
        ]
        outcomes = await asyncio.gather(*map(self._judge, turns))
        return max(outcomes, key=_severity, default=_NOTHING)

    async def _judge(self, conversation: Conversation) -> _Outcome:
        """What is said of a turn; where nobody can say, what the policy says of that."""
        assert conversation.target is not None
        try:
            decision = await self._decisions.decide(
                conversation,
                policy=self._options.policy,
                metadata=self._metadata,
                conversation_id=self._conversation_id,
            )
        except Unanswered as error:
            action = self._policy.on_error[conversation.turns[conversation.target].role]
            return _Outcome(_UNCHECKED.word, action, error=error)
        (verdict,) = decision.verdicts
        word = _UNCHECKED.word if verdict.degraded else verdict.action.name.lower()
        return _Outcome(word, verdict.action, decision, verdict)

    async def _settle(self, asked: Asked) -> None:
        """Waits for what is said of the request, and ends the exchange where it is refused."""
        if self._judging is None:
            return
        self._request, self._judging = await self._judging, None
        outcome, policy = self._request, self._policy
        if not outcome.refuses:
            return
        if outcome.error is not None:
            raise self._error(503, "the request cannot be checked now", "guard_unavailable", outcome.error)
        if text := outcome.words(policy):
            if asked.streams:
                raise self._refuse(200, self._api.content_type, self._api.stream(asked, text))
            raise self._refuse(200, "application/json", dumps(self._api.answer(asked, text)))
        raise self._error(400, policy.refusal.text, "content_filter")

    async def _answer(
        self, message: pb.HttpHeaders, messages: AsyncIterator[pb.ProcessingRequest]
    ) -> AsyncGenerator[pb.ProcessingResponse, None]:
        """The reply's headers tell whether there is something to judge, and whether it comes whole or in events."""
        asked, headers = self._asked, envoy.headers_of(message)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if asked is not None:
            await self._settle(asked)
        if asked is None or message.end_of_stream or not headers.get(":status", "").startswith("2"):
            yield self._headers(pb.NONE)
        elif headers.get("content-encoding", "identity") != "identity":
            raise self._error(502, "a compressed reply cannot be checked", "guard_unreadable")
        elif kind == "application/json":
            async for answer in self._whole(asked, messages):
                yield answer
        elif framing := _FRAMINGS.get(kind):
            self._reply = _STREAM
            yield self._headers(changes_size=True)
            async for answer in self._streamed(asked, framing, messages):
                yield answer
        elif self._options.other == "pass":
            self._reply = _UNCHECKED
            yield self._headers(pb.NONE)
        else:
            raise self._error(502, "a reply of this type cannot be checked", "guard_unreadable")

    def _headers(
        self, body: pb.BodySendMode.ValueType | None = None, changes_size: bool = False
    ) -> pb.ProcessingResponse:
        """Lets the reply's headers go on; `body` is how its body is to come, where not as Envoy is set to."""
        mutation = envoy.setting(self._marks(), ("content-length",) if changes_size else ())
        common = pb.CommonResponse(header_mutation=mutation)
        response = pb.ProcessingResponse(response_headers=pb.HeadersResponse(response=common))
        if body is not None:
            response.mode_override.response_body_mode = body
        return envoy.tell(response, {"request": self._request.facts(), "reply": self._reply.facts()})

    async def _whole(
        self, asked: Asked, messages: AsyncIterator[pb.ProcessingRequest]
    ) -> AsyncGenerator[pb.ProcessingResponse, None]:
        """A reply that is there at once goes on as it came, or with what is refused taken out."""
        outlet, body = self._outlet, bytearray()
        if not outlet.keeps_headers:
            yield self._headers(pb.BUFFERED)
        reading = _Body(messages, outlet)
        async with reading:
            async for chunk in reading.chunks():
                body += chunk
                if len(body) > self._settings.max_message_bytes:
                    raise self._error(502, "the reply is too long to be checked", "guard_unreadable")
        changed = await self._judged(asked, bytes(body))
        if outlet.keeps_headers:
            yield self._headers(changes_size=True)
            for answer in (*outlet.passed(len(body), changed), *outlet.ended(reading.has_trailers)):
                yield answer
        else:
            marks = self._marks() | {"content-length": str(len(changed))}
            common = pb.CommonResponse(
                header_mutation=envoy.setting(marks), body_mutation=pb.BodyMutation(body=changed)
            )
            response = pb.ProcessingResponse(response_body=pb.BodyResponse(response=common))
            yield envoy.tell(response, {"reply": self._reply.facts()})
        self._is_over = True

    async def _judged(self, asked: Asked, body: bytes) -> bytes:
        """What of a whole reply may go on."""
        try:
            reply = loads(body, "reply")
            texts = self._api.texts(reply)
        except (InputError, KeyError):
            raise self._error(502, "the reply is not what this API answers", "guard_unreadable") from None
        replies = [(*asked.context(index), Turn(Role.AGENT, whole(text))) for index, text in texts.items()]
        outcomes = await asyncio.gather(*(self._judge(Conversation(turns, len(turns) - 1)) for turns in replies))
        for index, outcome in zip(texts, outcomes, strict=True):
            if outcome.refuses:
                self._api.withhold(reply, index, outcome.words(self._policy))
        self._reply = max(outcomes, key=_severity, default=_NOTHING)
        return dumps(reply) if self._reply.refuses else body

    async def _streamed(
        self, asked: Asked, framing: Framing, messages: AsyncIterator[pb.ProcessingRequest]
    ) -> AsyncGenerator[pb.ProcessingResponse, None]:
        """A reply that comes in events, to its end; what the backend says after a cut is thrown away."""
        outlet, policy = self._outlet, self._policy
        body = _Body(messages, outlet)

        def refused(answer: moderation_pb2.CheckStreamResponse) -> str:
            text = answer.verdict.reply.text or _UNCHECKED.words(policy)
            return f"\n\n{text}" if text and answer.release else text

        def failed(error: Exception) -> str | None:
            self._telemetry.metrics.refusals.labels(reason_of(error)).inc()
            if isinstance(error, Unanswered) and policy.on_error[Role.AGENT] < Action.REDIRECT:
                return None
            return _UNCHECKED.words(policy)

        limit = self._settings.max_message_bytes
        reply = StreamedReply(self._api, framing, asked.replies, limit, self._judge_stream, refused, failed)
        async with body, aclosing(reply.segments(body.chunks())) as segments:
            async for segment in segments:
                for answer in outlet.passed(*segment):
                    yield answer
            self._reply = _Outcome(_UNCHECKED.word if reply.is_unchecked else reply.action.name.lower(), reply.action)
            if not outlet.ends_early:
                async for chunk in body.chunks():
                    for answer in outlet.passed(len(chunk), b""):
                        yield answer
            for answer in outlet.ended(body.has_trailers):
                yield envoy.tell(answer, {"reply": self._reply.facts() | _facts(reply.decisive)})
        self._is_over = True

    def _judge_stream(self, index: int) -> Stream:
        assert self._asked is not None
        opened = moderation_pb2.StreamOpen(
            turns=map(convert.from_turn, self._asked.context(index)),
            policy=self._options.policy,
            conversation_id=self._conversation_id,
            metadata=self._metadata,
            mode=self._options.mode,
        )
        tell = self._decisions.tell
        return Stream(opened, self._rollout, self._settings, self._telemetry, caller.get(), tell)

    def _marks(self) -> dict[str, str]:
        """The headers that tell the client, and whoever logs them, what was said."""
        return {
            f"x-guard-{side}" if name == "action" else f"x-guard-{side}-{name}": value
            for side, outcome in (("request", self._request), ("reply", self._reply))
            for name, value in outcome.facts().items()
        }

    def _error(self, status: int, message: str, code: str, cause: Unanswered | None = None) -> _Refused:
        """An answer that clients of the API raise."""
        body = dumps(self._api.error(status, message[:1].upper() + message[1:], code))
        retry = {"retry-after": str(max(1, round(cause.retry_after)))} if isinstance(cause, Overloaded) else {}
        return self._refuse(status, "application/json", body, retry, code)

    def _refuse(
        self, status: int, kind: str, body: bytes, more: Mapping[str, str] | None = None, code: str = "content_filter"
    ) -> _Refused:
        headers = self._marks() | {"content-type": kind} | dict(more or {})
        return _Refused(envoy.tell(envoy.immediate(status, headers, body, code), {"request": self._request.facts()}))


class _Body:
    """The messages of a reply's body, read ahead by a task of its own: a reader that gives up loses none of them."""

    def __init__(self, messages: AsyncIterator[pb.ProcessingRequest], outlet: envoy.Outlet) -> None:
        self._messages = messages
        self._outlet = outlet
        self._read: asyncio.Queue[pb.ProcessingRequest | Exception | None] = asyncio.Queue(maxsize=4)
        self._is_over = False
        self.has_trailers = False

    async def __aenter__(self) -> Self:
        self._reading = asyncio.create_task(self._pump())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Those that were not read yet, up to the last."""
        while not self._is_over:
            message = await self._read.get()
            if isinstance(message, Exception):
                raise message
            if message is None:
                self._is_over = True
                return
            if message.HasField("response_trailers"):
                self.has_trailers = self._is_over = True
                return
            chunk = message.response_body.body
            self._is_over = message.response_body.end_of_stream
            self._outlet.received(len(chunk))
            yield chunk

    async def _pump(self) -> None:
        try:
            async for message in self._messages:
                await self._read.put(message)
                if message.HasField("response_trailers") or message.response_body.end_of_stream:
                    return
        except Exception as error:
            await self._read.put(error)
        else:
            await self._read.put(None)


def _facts(said: moderation_pb2.CheckStreamResponse | None) -> dict[str, str]:
    """Those of a reply that streamed, beside what became of it."""
    if said is None:
        return {}
    named = dict.fromkeys(violation.category or violation.rule for violation in said.verdict.violations)
    policy = f"{said.provenance.policy}@{said.provenance.policy_revision}"
    return {"decision": said.decision_id, "policy": policy} | ({"violations": ", ".join(named)} if named else {})


def _severity(outcome: _Outcome) -> tuple[Action, bool]:
    return outcome.action, outcome.word == _UNCHECKED.word
