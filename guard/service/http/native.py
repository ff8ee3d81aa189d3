"""guard.v1 as JSON, for those who have no gRPC: checks, the policies and the model."""

import json
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from guard.errors import InputError
from guard.messages import turns
from guard.service import convert
from guard.service.http.endpoint import Asked, Endpoint
from guard.service.http.forms import read_message
from guard.types import Decision
from guard.v1 import moderation_pb2 as pb

_Request = TypeVar("_Request", pb.CheckRequest, pb.CheckConversationRequest)


class Messages(BaseModel):
    """What may stand in place of `turns`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    messages: list[dict[str, Any]] = []
    """Messages of OpenAI's chat API."""


async def check(asked: Asked, request: pb.CheckRequest) -> pb.CheckResponse:
    return convert.from_decision(await _decide(asked, request), request.score_detail)


async def check_conversation(asked: Asked, request: pb.CheckConversationRequest) -> pb.CheckConversationResponse:
    return convert.from_conversation_decision(await _decide(asked, request), request.score_detail)


async def list_policies(asked: Asked, _: object) -> pb.ListPoliciesResponse:
    return convert.from_policies(asked.policies)


async def get_policy(asked: Asked, _: object) -> pb.GetPolicyResponse:
    return pb.GetPolicyResponse(policy=convert.from_policy(asked.policies.get(asked.path["name"])))


async def get_model(asked: Asked, _: object) -> pb.GetModelResponse:
    return convert.from_model(asked.rollout.judge.model)


async def _decide(asked: Asked, request: pb.CheckRequest | pb.CheckConversationRequest) -> Decision:
    return await asked.judge(
        convert.to_conversation(request, asked.max_turns),
        policy=request.policy,
        metadata=request.metadata,
        conversation_id=request.conversation_id,
    )


def _read(kind: type[_Request], raw: bytes) -> _Request:
    """A request, whose turns may stand as the messages of a chat API."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError("request", "is not JSON") from None
    if not isinstance(fields, dict):
        raise InputError("request", "should be a JSON object")
    if "messages" not in fields:
        return read_message(kind, raw)
    if "turns" in fields:
        raise InputError("request", "should have one of messages, turns")
    said = turns(fields.pop("messages"))
    request = read_message(kind, json.dumps(fields))
    request.turns.extend(convert.from_turn(turn) for turn in said)
    return request


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/check",
        "Judge one turn, in the context of those before it",
        pb.CheckResponse,
        check,
        (pb.CheckRequest, Messages),
        partial(_read, pb.CheckRequest),
    ),
    Endpoint(
        "POST",
        "/v1/conversation",
        "Judge every turn of a conversation",
        pb.CheckConversationResponse,
        check_conversation,
        (pb.CheckConversationRequest, Messages),
        partial(_read, pb.CheckConversationRequest),
    ),
    Endpoint("GET", "/v1/policies", "The policies in force", pb.ListPoliciesResponse, list_policies),
    Endpoint("GET", "/v1/policies/{name}", "One policy", pb.GetPolicyResponse, get_policy),
    Endpoint("GET", "/v1/model", "The model in force", pb.GetModelResponse, get_model),
)
