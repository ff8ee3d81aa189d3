"""Kinds of error to gRPC statuses with details: one table, for calls and for the items of a stream."""

import math

import grpc
from google.rpc import error_details_pb2, status_pb2

from guard.errors import (
    Draining,
    Expired,
    GuardError,
    Idle,
    InputError,
    Loading,
    NotFound,
    Overloaded,
    PolicyError,
    Unauthenticated,
)
from guard.v1 import moderation_pb2 as pb

_ROOM = 2000  # bytes of a message that may be long

# A kind that is not here is a fault of ours.
_CODES: dict[type[GuardError], grpc.StatusCode] = {
    InputError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    PolicyError: grpc.StatusCode.INVALID_ARGUMENT,  # of a policy that came with the call
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    Idle: grpc.StatusCode.DEADLINE_EXCEEDED,
    Loading: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.UNAVAILABLE,
}


def code_of(error: Exception) -> grpc.StatusCode:
    """INTERNAL where the error is none of those that a caller is told about."""
    known = (_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    return next(known, grpc.StatusCode.INTERNAL)


def reason_of(error: Exception) -> str:
    """The same for metrics: the kind of the error, e.g. "Overloaded"."""
    return "Internal" if code_of(error) is grpc.StatusCode.INTERNAL else type(error).__name__


def to_status(error: Exception) -> status_pb2.Status:
    """What the caller is told: what is wrong with the request, or when to come back, or merely that we failed."""
    status = status_pb2.Status(code=_number(error), message=_message(error))
    if isinstance(error, InputError):
        problem = str(error).removeprefix(f"{error.field}: ")
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=problem)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded):
        hint = error_details_pb2.RetryInfo()
        hint.retry_delay.FromMilliseconds(retry_after_ms(error))
        status.details.add().Pack(hint)
    return status


def to_item_error(error: Exception) -> pb.Error:
    """The same for one request of a stream."""
    return pb.Error(code=_number(error), message=_message(error), retry_after_ms=retry_after_ms(error))


def retry_after_ms(error: Exception) -> int:
    """0 where there is no telling when, or whether, another try would help."""
    return math.ceil(error.retry_after * 1000) if isinstance(error, Overloaded) else 0


def _number(error: Exception) -> int:
    number: int = code_of(error).value[0]
    return number


def _message(error: Exception) -> str:
    if isinstance(error, PolicyError):
        return _shortened(str(error))
    return "internal error" if code_of(error) is grpc.StatusCode.INTERNAL else str(error)


def _shortened(lines: str) -> str:
    """What of the lines has room in the headers that a status travels in; it is in them twice, and encoded."""
    kept: list[str] = []
    room = _ROOM
    for line in lines.splitlines():
        room -= len(line.encode())
        if room < 0 and kept:
            break
        kept.append(line)
    more = len(lines.splitlines()) - len(kept)
    return "\n".join([*kept, f"and {more} more"] if more else kept)
