"""LiteLLM's generic guardrail API: what the proxy is about to send to a model, and what it got back."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from guard.messages import tool_calls, turns
from guard.service.http.endpoint import Asked, alone, in_context, post
from guard.service.http.verdicts import reason_of, strictest
from guard.types import Action, Conversation, Role, Turn, Verdict


class GuardrailRequest(BaseModel):
    """Of `images` and of the definitions of `tools` nothing is judged."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    input_type: Literal["request", "response"] = "request"
    texts: list[str] = []
    """What is said, each text by itself; user turns of a request, agent turns of a response."""
    structured_messages: list[dict[str, Any]] | None = None
    """Messages of OpenAI's chat API: of a request what is judged, after the last answer; of a response its context."""
    tool_calls: list[dict[str, Any]] | None = None
    """Calls as OpenAI's chat API has them; judged as agent turns."""
    images: list[str] | None = None
    request_data: dict[str, Any] = {}
    """Its texts, such as user_api_key_team_id, are metadata for the overlays of the policy."""
    litellm_call_id: str | None = None
    litellm_trace_id: str | None = None
    additional_provider_specific_params: dict[str, Any] = {}
    """`policy` names the policy."""


class GuardrailResponse(BaseModel):
    """Of an intervention the texts to go on with."""

    action: Literal["NONE", "BLOCKED", "GUARDRAIL_INTERVENED"]
    blocked_reason: str | None = None
    texts: list[str] | None = None


async def guard(asked: Asked, request: GuardrailRequest) -> GuardrailResponse:
    if not (conversations := _conversations(request)):
        return GuardrailResponse(action="NONE")
    policy = request.additional_provider_specific_params.get("policy")
    decisions = await asked.judge_each(
        conversations,
        policy=policy if isinstance(policy, str) else "",
        metadata=_texts_of(request.request_data),
        conversation_id=request.litellm_trace_id or request.litellm_call_id or "",
    )
    verdicts = [decision.verdicts[0] for decision in decisions]
    worst = strictest(verdicts)
    if worst.action is Action.BLOCK:
        return GuardrailResponse(action="BLOCKED", blocked_reason=reason_of(worst, decisions[0].policy.name))
    if worst.action is Action.REDIRECT:
        return _redirected(request, verdicts, worst)
    return GuardrailResponse(action="NONE")


def _conversations(request: GuardrailRequest) -> list[Conversation]:
    """What is judged: of a response the texts come first, in order."""
    said = turns(request.structured_messages, "structured_messages") if request.structured_messages else ()
    if request.input_type == "request" and said:
        return in_context(said)
    calls = [Turn(Role.AGENT, text) for text in [tool_calls(request.tool_calls or [])] if text]
    role = Role.USER if request.input_type == "request" else Role.AGENT
    texts = [Turn(role, text) for text in request.texts]
    if not said:
        return [alone(turn) for turn in (*texts, *calls)]
    return [Conversation((*said, turn), len(said)) for turn in (*texts, *calls)]


def _redirected(request: GuardrailRequest, verdicts: Sequence[Verdict], worst: Verdict) -> GuardrailResponse:
    """The policy's reply in place of each text that it is for; where there is no text to put it, it is the reason."""
    reply = worst.reply.text if worst.reply else ""
    answers, calls = verdicts[: len(request.texts)], verdicts[len(request.texts) :]
    if request.input_type == "request" or any(verdict.action is Action.REDIRECT for verdict in calls):
        return GuardrailResponse(action="BLOCKED", blocked_reason=reply)
    texts = [
        verdict.reply.text if verdict.reply else text for text, verdict in zip(request.texts, answers, strict=True)
    ]
    return GuardrailResponse(action="GUARDRAIL_INTERVENED", texts=texts)


def _texts_of(data: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in data.items() if isinstance(value, str)}


ENDPOINTS = (
    post(
        "/beta/litellm_basic_guardrail_api",
        "Judge what passes a LiteLLM proxy",
        GuardrailRequest,
        GuardrailResponse,
        guard,
    ),
)
