"""Kinds of error to HTTP statuses, and to what the caller is told: one table, and the form that OpenAI gives errors."""

import math
import re
from http import HTTPStatus

from pydantic import BaseModel
from starlette.exceptions import HTTPException

from guard.errors import (
    Draining,
    Expired,
    GuardError,
    InputError,
    Loading,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthenticated,
)


class TooLarge(InputError):
    """The body is longer than `max_message_bytes`."""

    def __init__(self, limit: int) -> None:
        super().__init__("request", f"is larger than {limit} bytes")


# A full queue is no fault of this caller's, so it is 503: what OpenAI's clients retry as they do 429, and what gateways
# such as LiteLLM count as "unreachable", for which their operator has chosen to go on or not.
# A kind that is not here is a fault of ours.
_STATUSES: dict[type[Exception], HTTPStatus] = {
    InputError: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    Loading: HTTPStatus.SERVICE_UNAVAILABLE,
    Draining: HTTPStatus.SERVICE_UNAVAILABLE,
    Expired: HTTPStatus.GATEWAY_TIMEOUT,
}
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The path to what is wrong with the request."""
    code: str


class Failure(BaseModel):
    """An answer that is none."""

    error: Fault


def status_of(error: Exception) -> HTTPStatus:
    """500 where the error is none of those that a caller is told about."""
    if isinstance(error, HTTPException):
        return HTTPStatus(error.status_code)
    known = (_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
    return next(known, HTTPStatus.INTERNAL_SERVER_ERROR)


def message_of(error: Exception) -> str:
    status = status_of(error)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR:
        return "internal error"
    return str(error) if isinstance(error, GuardError) else status.phrase


def failure_of(error: Exception) -> Failure:
    """As OpenAI's clients read it."""
    status = status_of(error)
    kind = _TYPES.get(status, _TYPES[400 if status < 500 else 500])
    code = type(error).__name__ if isinstance(error, GuardError) else status.phrase.title().replace(" ", "")
    param = error.field if isinstance(error, InputError) else None
    return Failure(error=Fault(message=message_of(error), type=kind, param=param, code=_snake(code)))


def headers_of(error: Exception) -> dict[str, str]:
    """When to come back, what to show, and that no more is read of what is too large."""
    if isinstance(error, Overloaded):
        milliseconds = math.ceil(error.retry_after * 1000)
        return {"Retry-After": str(math.ceil(error.retry_after)), "Retry-After-Ms": str(milliseconds)}
    if isinstance(error, Loading | Draining):
        return {"Retry-After": "1"}
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooLarge):
        return {"Connection": "close"}
    return dict(getattr(error, "headers", None) or {})


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
