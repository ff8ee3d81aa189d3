"""The OpenAPI document: that it is whole, and that it is true."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from guard.service.http.app import ENDPOINTS, make_app
from guard.service.http.endpoint import Endpoint
from tests.conftest import Service

SAID = {"messages": [{"role": "user", "content": "attack my address"}]}
DETECTOR = {"detector-id": "guard"}
REQUESTS: dict[str, tuple[Any, dict[str, str]]] = {
    "/v1/check": (SAID, {}),
    "/v1/conversation": (SAID, {}),
    "/v1/moderations": ({"input": ["Hi!", "attack"]}, {}),
    "/beta/litellm_basic_guardrail_api": ({"texts": ["attack"], "input_type": "request"}, {}),
    "/api/v1/text/contents": ({"contents": ["attack my address"]}, DETECTOR),
    "/api/v1/text/chat": (SAID, DETECTOR),
    "/api/v1/text/generation": ({"prompt": "Hi!", "generated_text": "attack"}, DETECTOR),
    "/request": ({"body": SAID}, {}),
    "/response": ({"body": {"choices": [{"message": {"role": "assistant", "content": "Hi!"}}]}}, {}),
}


@pytest.fixture
async def document(service: Service) -> Any:
    async with httpx.AsyncClient(base_url=service.url) as http:
        return (await http.get("/openapi.json")).json()


async def answer_nothing(_endpoint: Endpoint, _request: Request) -> Response:
    return Response()


def within(value: Any) -> Iterator[Any]:
    """The value and all that it holds."""
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from within(child)


def check(document: Any, schema: Any, value: Any) -> None:
    """Against a schema of the document, where $refs are found."""
    jsonschema.validate(value, {**schema, "components": document["components"]}, jsonschema.Draft202012Validator)


def form(place: Any) -> Any:
    return place["content"]["application/json"]["schema"]


async def test_every_reference_leads_to_a_schema(document: Any) -> None:
    """And every schema is one, and is referred to."""
    schemas = document["components"]["schemas"]
    references = {value["$ref"] for value in within(document) if isinstance(value, dict) and "$ref" in value}
    assert references == {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_route_is_in_it_and_nothing_else(document: Any) -> None:
    """With its method, and the parameters of its path."""
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    app = make_app(CollectorRegistry(), lambda: True, list, answer_nothing)
    routes = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert len(app.routes) == len(routes)
    assert described == routes
    for path, methods in document["paths"].items():
        for operation in methods.values():
            named = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))


async def test_requests_and_answers_are_as_it_says(document: Any, service: Service) -> None:
    """Of every endpoint, and what it says of errors."""
    assert {endpoint.path for endpoint in ENDPOINTS if endpoint.method == "POST"} == REQUESTS.keys()
    async with httpx.AsyncClient(base_url=service.url) as http:
        for path, (body, headers) in REQUESTS.items():
            operation = document["paths"][path]["post"]
            check(document, form(operation["requestBody"]), body)
            answer = await http.post(path, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            check(document, form(operation["responses"]["200"]), answer.json())
            refused = await http.post(path, content=b"{", headers=headers)
            assert refused.status_code in (400, 422)
            check(document, form(operation["responses"]["default"]), refused.json())
        for path in ("/v1/policies", "/v1/policies/{name}", "/v1/model", "/openapi.json"):
            answer = await http.get(path.format(name="default"))
            check(document, form(document["paths"][path]["get"]["responses"]["200"]), answer.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/check", {"turns": 5}),
        ("/v1/check", {"messages": "Hi!"}),
        ("/v1/moderations", {"model": "default"}),
        ("/v1/moderations", {"input": [5]}),
        ("/beta/litellm_basic_guardrail_api", {"input_type": "both"}),
        ("/api/v1/text/contents", {"contents": []}),
        ("/request", {}),
    ],
)
async def test_what_is_refused_is_not_as_it_says(document: Any, path: str, body: Any) -> None:
    """The schemas are not mere decoration."""
    with pytest.raises(jsonschema.ValidationError):
        check(document, form(document["paths"][path]["post"]["requestBody"]), body)


async def test_a_moderation_has_all_categories(document: Any) -> None:
    """And no others."""
    schema = {"$ref": "#/components/schemas/ModerationResult"}
    names = document["components"]["schemas"]["ModerationResult"]["properties"]["categories"]["propertyNames"]["enum"]
    good: dict[str, Any] = {
        "flagged": False,
        "categories": dict.fromkeys(names, False),
        "category_scores": dict.fromkeys(names, 0.0),
        "category_applied_input_types": {name: ["text"] for name in names},
    }
    check(document, schema, good)
    for categories in (dict[str, bool](), good["categories"] | {"more": True}):
        with pytest.raises(jsonschema.ValidationError):
            check(document, schema, good | {"categories": categories})
