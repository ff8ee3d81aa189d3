"""What is served over plain HTTP, for machines that watch: /metrics for Prometheus and /healthz."""

from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


def make_app(
    registry: CollectorRegistry, serving: Callable[[], bool], differences: Callable[[], Sequence[str]]
) -> web.Application:
    """/healthz is 200 while `serving()` and 503 otherwise; `differences()` are in what policies are not as on disk."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        if serving():
            found = differences()
            return web.json_response({"status": "SERVING"} | ({"policies_differ": found} if found else {}))
        return web.json_response({"status": "NOT_SERVING"}, status=503)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz)])
    return app
