"""What is served on the HTTP port: /metrics and /healthz for machines that watch, open to all, and the APIs."""

from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from guard.service.http import agentgateway, detectors, litellm, native, openai_moderations
from guard.service.http.endpoint import Asked, Endpoint
from guard.service.http.forms import write
from guard.service.http.openapi import Document, document
from guard.service.http.status import failure_of

_PAGES = {
    "/metrics": "What is counted, for Prometheus",
    "/healthz": "Whether Guard serves",
    "/health": "The same, as the detector API has it",
}


def make_app(
    registry: CollectorRegistry,
    serving: Callable[[], bool],
    differences: Callable[[], Sequence[str]],
    serve: Callable[[Endpoint, Request], Awaitable[Response]],
) -> Starlette:
    """/healthz is 200 while `serving()` and 503 otherwise; `differences()` are in what policies are not as on disk.

    `serve` answers the requests of an endpoint.
    """

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: Request) -> Response:
        if serving():
            found = differences()
            return JSONResponse({"status": "SERVING"} | ({"policies_differ": found} if found else {}))
        return JSONResponse({"status": "NOT_SERVING"}, 503)

    pages = dict(zip(_PAGES, (metrics, healthz, healthz), strict=True))
    return Starlette(
        routes=[
            *(Route(path, page) for path, page in pages.items()),
            *(Route(endpoint.path, partial(serve, endpoint), methods=[endpoint.method]) for endpoint in ENDPOINTS),
        ],
        exception_handlers={HTTPException: _no_such_route},
    )


async def _no_such_route(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return Response(write(failure_of(error)), status, media_type="application/json")


@cache
def described() -> Document:
    """Made when it is first asked for."""
    return document(ENDPOINTS, _PAGES)


async def _describe(_asked: Asked, _body: object) -> Document:
    return described()


ENDPOINTS: tuple[Endpoint, ...] = (
    *native.ENDPOINTS,
    *openai_moderations.ENDPOINTS,
    *litellm.ENDPOINTS,
    *detectors.ENDPOINTS,
    *agentgateway.ENDPOINTS,
    Endpoint("GET", "/openapi.json", "This document", Document, _describe),
)
