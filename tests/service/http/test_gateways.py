"""What gateways ask: LiteLLM's generic guardrail, agentgateway's webhook, and detectors of the FMS orchestrator."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from guard.policy.compile import Category, Policy, Threshold
from guard.policy.store import PolicyStore
from guard.types import Action, Reply, Role
from tests.conftest import Running, Service
from tests.stand_ins import POLICY

LITELLM = "/beta/litellm_basic_guardrail_api"
LINE = "Call the crisis line."


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=service.url) as session:
        yield session


@pytest.fixture
def redirecting(service: Service) -> None:
    """A policy that puts a reply in place of attacks."""
    redirect = (Threshold(Action.REDIRECT, 0.75, Reply("crisis", LINE)),)
    thresholds = dict.fromkeys((Role.USER, Role.AGENT), redirect)
    policy = Policy("default", "r", "", (Category("unsafe", "Unsafe", (), thresholds),), POLICY.on_error)
    service.judge.policies = PolicyStore([policy], "default")


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any], **headers: str) -> Any:
    answer = await http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "1", "type": "function", "function": {"name": "mail", "arguments": '{"to": "attack"}'}}
BLOCKED = {"action": "BLOCKED", "blocked_reason": "blocked by policy default: unsafe"}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"texts": ["Hi!"]}, {"action": "NONE"}),
        ({"texts": []}, {"action": "NONE"}),
        ({"texts": ["my address"]}, {"action": "NONE"}),  # flagged
        ({"texts": ["Hi!", "attack"]}, BLOCKED),
        ({"texts": ["attack my address"]}, BLOCKED),
        (
            {"texts": ["broken"]},
            BLOCKED | {"blocked_reason": "blocked by policy default, as the model could not answer"},
        ),
        ({"texts": ["attack"], "structured_messages": [said("user", "Hi!")]}, {"action": "NONE"}),
        ({"structured_messages": [said("user", [{"type": "text", "text": "attack"}])]}, BLOCKED),
        (
            {"structured_messages": [said("user", "attack"), said("assistant", "No."), said("user", "Why?")]},
            {"action": "NONE"},
        ),
        ({"structured_messages": [said("user", "Hi!"), said("assistant", "attack")]}, BLOCKED),
        (
            {"structured_messages": [said("user", "a"), said("assistant", "b"), said("tool", "attack")]},
            {"action": "NONE"},
        ),
        ({"tool_calls": [CALL]}, BLOCKED),
        ({"input_type": "response", "texts": ["Hi!"], "tool_calls": [CALL]}, BLOCKED),
        ({"input_type": "response", "texts": ["attack"]}, BLOCKED),
        (
            {"input_type": "response", "texts": ["Hi!"], "structured_messages": [said("user", "attack")]},
            {"action": "NONE"},
        ),
        ({"texts": ["attack"], "additional_provider_specific_params": {"policy": "lenient"}}, {"action": "NONE"}),
    ],
)
async def test_litellm_is_told_what_to_do(http: httpx.AsyncClient, body: dict[str, Any], answer: Any) -> None:
    """Of a request what comes after the last answer is judged, of a response its texts and calls of tools."""
    assert await ask(http, LITELLM, {"input_type": "request", "litellm_version": "1", **body}) == answer


@pytest.mark.usefixtures("redirecting")
async def test_litellm_gets_the_reply_of_a_redirect(http: httpx.AsyncClient) -> None:
    """In place of the text of a response, and otherwise as the reason of a block."""
    response = {"input_type": "response", "texts": ["Hi!", "attack"]}
    intervened = {"action": "GUARDRAIL_INTERVENED", "texts": ["Hi!", LINE]}
    assert await ask(http, LITELLM, response) == intervened
    for body in ({"texts": ["attack"]}, response | {"tool_calls": [CALL]}):
        assert await ask(http, LITELLM, body) == {"action": "BLOCKED", "blocked_reason": LINE}


async def test_litellms_metadata_are_those_of_the_request(http: httpx.AsyncClient, service: Service) -> None:
    """What of them is text, for the overlays of a policy."""
    data = {"user_api_key_team_id": "t1", "user_api_key_org_id": None, "more": {"a": 1}}
    await ask(http, LITELLM, {"texts": ["Hi!"], "request_data": data, "litellm_call_id": "c"})
    assert service.judge.metadata == [{"user_api_key_team_id": "t1"}]


async def test_litellm_is_told_of_a_policy_that_is_not_there(http: httpx.AsyncClient) -> None:
    """Rather than judged by another."""
    params = {"additional_provider_specific_params": {"policy": "lenint"}}
    answer = await http.post(LITELLM, json={"texts": ["Hi!"], **params})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "policy"


DETECTED = {
    "detection": "unsafe",
    "detection_type": "risk",
    "score": 0.875,
    "evidence": [],
    "metadata": {"action": "block", "policy": "default", "revision": POLICY.revision},
}


async def test_a_detector_tells_what_the_policy_finds(http: httpx.AsyncClient) -> None:
    """A list for each text, with its place in characters; the categories of a conversation once each."""
    contents = {"contents": ["Hi!", "attack 🙂"]}
    found = await ask(http, "/api/v1/text/contents", contents, **{"detector-id": "guard"})
    assert found == [[], [DETECTED | {"start": 0, "end": 8, "text": "attack 🙂"}]]
    chat = {"messages": [said("user", "attack"), said("tool", "a"), said("user", "attack")]}
    assert await ask(http, "/api/v1/text/chat", chat, **{"detector-id": "default"}) == [DETECTED]
    generation = {"prompt": "attack", "generated_text": "No."}
    assert await ask(http, "/api/v1/text/generation", generation, **{"detector-id": "default"}) == []
    generation = {"prompt": "Hi!", "generated_text": "attack"}
    assert await ask(http, "/api/v1/text/generation", generation, **{"detector-id": "default"}) == [DETECTED]
    assert await ask(http, "/api/v1/text/generation", generation, **{"detector-id": "lenient"}) == []


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({}, {"privacy": 0.625}),
        ({"threshold": 0.1}, {"unsafe": 0.125, "privacy": 0.625}),
        ({"threshold": 0.9}, {}),
        ({"label_thresholds": {"unsafe": 0.1}}, {"unsafe": 0.125, "privacy": 0.625}),
        ({"label_thresholds": {"privacy": 0.7}}, {}),
        ({"threshold": 0.9, "label_thresholds": {"privacy": 0.6}}, {"privacy": 0.625}),
        ({"policy": "lenient", "threshold": 0}, {}),
        ({"role": "agent"}, {"privacy": 0.625}),
    ],
)
async def test_thresholds_of_a_request_stand_above_the_policys(
    http: httpx.AsyncClient, params: dict[str, Any], found: dict[str, float]
) -> None:
    """For all categories, or for those that are named."""
    body = {"contents": ["my address"], "detector_params": params}
    ((*detections,),) = await ask(http, "/api/v1/text/contents", body, **{"detector-id": "default"})
    assert {one["detection"]: one["score"] for one in detections} == found
    evidence = [one["evidence"] for one in detections if one["detection"] == "privacy"]
    assert evidence in ([], [[{"name": "S7", "value": "privacy", "score": 0.625}]])


async def test_a_detector_that_could_not_judge_says_so(http: httpx.AsyncClient) -> None:
    """An empty list would say that all is well."""
    body = {"contents": ["broken"]}
    (((detection),),) = await ask(http, "/api/v1/text/contents", body, **{"detector-id": "guard"})
    assert (detection["detection"], detection["score"], detection["evidence"]) == ("degraded", 1.0, [])


@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        ({}, {"contents": ["a"]}, 422, "detector-id: is missing from the headers"),
        ({"detector-id": "x"}, {"contents": ["a"]}, 404, "detector-id: is neither guard nor a policy"),
        (
            {"detector-id": "guard"},
            {"contents": []},
            422,
            "contents: List should have at least 1 item after validation, not 0",
        ),
        ({"detector-id": "guard"}, {"contents": [1]}, 422, "contents[0]: Input should be a valid string"),
        ({"detector-id": "guard"}, {"contents": ["full"]}, 503, "the queue is full"),
    ],
)
async def test_a_detector_refuses_in_its_apis_words(
    http: httpx.AsyncClient, headers: dict[str, str], body: Any, status: int, message: str
) -> None:
    """A code and a message."""
    answer = await http.post("/api/v1/text/contents", json=body, headers=headers)
    assert (answer.status_code, answer.json()) == (status, {"code": status, "message": message})


async def test_the_orchestrator_can_ask_for_health(http: httpx.AsyncClient) -> None:
    """Where it looks for it."""
    assert (await http.get("/health")).json() == {"status": "SERVING"}


def choices(*texts: str) -> dict[str, Any]:
    return {"choices": [{"index": index, "message": said("assistant", text)} for index, text in enumerate(texts)]}


async def test_agentgateway_passes_and_rejects(http: httpx.AsyncClient) -> None:
    """Prompts by what comes after the last answer, and answers by each of their choices."""
    passed = {"action": {"reason": "allowed"}}
    reason = "blocked by policy default: unsafe"
    rejected = {"action": {"body": reason, "status_code": 403, "reason": reason}}
    assert await ask(http, "/request", {"body": {"messages": [said("user", "my address")]}}) == passed
    assert await ask(http, "/request", {"body": {"messages": [said("user", "attack")]}}) == rejected
    assert await ask(http, "/response", {"body": choices("Hi!", "Ho!")}) == passed
    assert await ask(http, "/response", {"body": choices("Hi!", "attack")}) == rejected


@pytest.mark.usefixtures("redirecting")
async def test_agentgateway_masks_an_answer_that_is_redirected(http: httpx.AsyncClient) -> None:
    """The reply stands in its place; to a prompt it is what the client gets."""
    masked = {"index": 1, "message": said("assistant", LINE)}
    shown = [*choices("Hi!")["choices"], masked]
    answer = await ask(http, "/response", {"body": choices("Hi!", "attack")})
    assert answer == {"action": {"body": {"choices": shown}, "reason": "redirected"}}
    answer = await ask(http, "/request", {"body": {"messages": [said("user", "attack")]}})
    assert answer == {"action": {"body": LINE, "status_code": 403, "reason": "redirected"}}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/request", {"body": {"messages": []}}, "body.messages: at least one is needed"),
        ("/request", {"body": {}}, "body.messages: Field required"),
        ("/response", {"body": {"choices": []}}, "body.choices: at least one is needed"),
        ("/response", {"body": {"choices": [{}]}}, "body.choices[0]: should be an object"),
        (LITELLM, {"texts": "Hi!"}, "texts: Input should be a valid array"),
        (LITELLM, {"structured_messages": [said("pirate", "Arr")]}, None),
        (LITELLM, {"input_type": "both"}, "input_type: Input should be 'request' or 'response'"),
    ],
)
async def test_a_malformed_request_is_refused(
    http: httpx.AsyncClient, path: str, body: Any, message: str | None
) -> None:
    """By the place of what is wrong."""
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert told == message if message else told.startswith("structured_messages[0].role: should be one of")


async def test_the_embedded_model_stands_behind_them_all(embedded: Running) -> None:
    """An insult is blocked, or detected, whoever asks."""
    insult = "You worthless pig, everybody here hates you and laughs at your stupid face."
    async with httpx.AsyncClient(base_url=embedded.url, timeout=120) as http:
        assert (await ask(http, LITELLM, {"texts": [insult]}))["action"] == "BLOCKED"
        body = {"messages": [said("user", insult)]}
        assert (await ask(http, "/request", {"body": body}))["action"]["status_code"] == 403
        found = await ask(http, "/api/v1/text/chat", body, **{"detector-id": "guard"})
    assert "harassment" in {one["detection"] for one in found}
