"""agentgateway's guardrail webhook: prompts before a model reads them, and answers before a user does."""

from typing import Any

from pydantic import BaseModel

from guard.errors import InputError
from guard.messages import turns
from guard.service.http.endpoint import Asked, in_context, post
from guard.service.http.verdicts import reason_of, strictest
from guard.types import Action, Verdict

_FORBIDDEN = 403


class Prompts(BaseModel):
    messages: list[dict[str, Any]]


class WebhookRequest(BaseModel):
    """The messages of a prompt; judged is what comes after the last answer."""

    body: Prompts


class Answers(BaseModel):
    choices: list[dict[str, Any]]


class WebhookResponse(BaseModel):
    """The choices of an answer, each with its message."""

    body: Answers


class Pass(BaseModel):
    reason: str


class Reject(BaseModel):
    """The client gets this body in place of an answer."""

    body: str
    status_code: int
    reason: str


class Mask(BaseModel):
    """These go on in place of those that came."""

    body: Answers
    reason: str


class RequestAction(BaseModel):
    action: Reject | Pass


class ResponseAction(BaseModel):
    action: Mask | Reject | Pass


async def judge_request(asked: Asked, request: WebhookRequest) -> RequestAction:
    said = turns(request.body.messages, "body.messages")
    decisions = await asked.judge_each(in_context(said))
    worst = strictest([decision.verdicts[0] for decision in decisions])
    if worst.action < Action.REDIRECT:
        return RequestAction(action=Pass(reason="allowed"))
    return RequestAction(action=_rejected(worst, decisions[0].policy.name))


async def judge_response(asked: Asked, request: WebhookResponse) -> ResponseAction:
    choices = request.body.choices
    if not choices:
        raise InputError("body.choices", "at least one is needed")
    said = turns([choice.get("message") for choice in choices], "body.choices")
    decisions = await asked.judge_each([conversation for turn in said for conversation in in_context([turn])])
    verdicts = [decision.verdicts[0] for decision in decisions]
    worst = strictest(verdicts)
    if worst.action < Action.REDIRECT:
        return ResponseAction(action=Pass(reason="allowed"))
    if worst.action is Action.BLOCK:
        return ResponseAction(action=_rejected(worst, decisions[0].policy.name))
    shown = [_masked(choice, verdict) for choice, verdict in zip(choices, verdicts, strict=True)]
    return ResponseAction(action=Mask(body=Answers(choices=shown), reason="redirected"))


def _rejected(verdict: Verdict, policy: str) -> Reject:
    """With the policy's reply, where it has one."""
    if verdict.reply:
        return Reject(body=verdict.reply.text, status_code=_FORBIDDEN, reason="redirected")
    reason = reason_of(verdict, policy)
    return Reject(body=reason, status_code=_FORBIDDEN, reason=reason)


def _masked(choice: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    if verdict.reply is None:
        return choice
    return choice | {"message": {"role": choice["message"]["role"], "content": verdict.reply.text}}


ENDPOINTS = (
    post("/request", "agentgateway's webhook for prompts", WebhookRequest, RequestAction, judge_request),
    post("/response", "agentgateway's webhook for answers", WebhookResponse, ResponseAction, judge_response),
)
