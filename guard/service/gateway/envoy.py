"""Messages of Envoy's external processing, and how the bytes of a reply are put into them."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from guard.v1.envoy import ext_proc_pb2 as pb

NAMESPACE = "guard"
"""Of the dynamic metadata, for access logs and other filters: request and reply, each with its action and why."""


def headers_of(message: pb.HttpHeaders) -> dict[str, str]:
    """By name, in small letters; of one that stands twice, all values as HTTP joins them."""
    found: dict[str, str] = {}
    for header in message.headers.headers:
        value = header.value or header.raw_value.decode("latin-1")
        found[header.key] = f"{found[header.key]},{value}" if header.key in found else value
    return found


def setting(headers: Mapping[str, str], remove: tuple[str, ...] = ()) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(
                header=pb.HeaderValue(key=name, raw_value=value.encode("latin-1", "replace")),
                append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for name, value in headers.items()
        ],
        remove_headers=remove,
    )


def passing() -> pb.ProcessingResponse:
    """To a request's headers: no body of this exchange is looked at."""
    mode = pb.ProcessingMode(
        request_body_mode=pb.NONE,
        response_body_mode=pb.NONE,
        response_header_mode=pb.ProcessingMode.SEND,
    )
    return pb.ProcessingResponse(request_headers=pb.HeadersResponse(), mode_override=mode)


def immediate(status: int, headers: Mapping[str, str], body: bytes, details: str) -> pb.ProcessingResponse:
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=status),
            headers=setting(headers),
            body=body,
            details=details,
        )
    )


def tell(response: pb.ProcessingResponse, about: Mapping[str, Mapping[str, Any]]) -> pb.ProcessingResponse:
    """The same response, with dynamic metadata about the request, the reply or both."""
    response.dynamic_metadata.update({NAMESPACE: about})
    return response


class Outlet(Protocol):
    """How a reply that streams goes back to Envoy."""

    ends_early: bool
    """Whether a reply may end before the backend's does."""
    keeps_headers: bool
    """Whether the headers of a reply may wait for its body."""

    def received(self, size: int) -> None:
        """So many bytes came in one message."""

    def passed(self, taken: int, given: bytes) -> Iterator[pb.ProcessingResponse]:
        """So many bytes are dealt with, and these go on in their place."""

    def ended(self, has_trailers: bool) -> Iterator[pb.ProcessingResponse]:
        """Nothing more goes on, whatever was received."""

    def echoed(self, message: pb.HttpBody) -> Iterator[pb.ProcessingResponse]:
        """A message goes on as it came."""


class Duplex:
    """FULL_DUPLEX_STREAMED: Envoy keeps nothing, and what is given goes on whenever it comes."""

    ends_early = keeps_headers = True

    def received(self, size: int) -> None: ...

    def passed(self, taken: int, given: bytes) -> Iterator[pb.ProcessingResponse]:
        if given:
            yield self._body(given, False)

    def ended(self, has_trailers: bool) -> Iterator[pb.ProcessingResponse]:
        if has_trailers:
            yield pb.ProcessingResponse(response_trailers=pb.TrailersResponse())
        else:
            yield self._body(b"", True)

    def echoed(self, message: pb.HttpBody) -> Iterator[pb.ProcessingResponse]:
        yield self._body(message.body, message.end_of_stream)

    @staticmethod
    def _body(body: bytes, is_last: bool) -> pb.ProcessingResponse:
        mutation = pb.BodyMutation(streamed_response=pb.StreamedBodyResponse(body=body, end_of_stream=is_last))
        return pb.ProcessingResponse(response_body=pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation)))


class InTurn:
    """STREAMED: each message is answered by one, and Envoy keeps it until then.

    It is answered once all its bytes are dealt with; so where Guard is lost, what Envoy keeps is what was not passed
    on, neither more nor less, and a filter that fails open goes on with it.
    """

    ends_early = keeps_headers = False

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._dealt = 0  # bytes of those
        self._given = bytearray()

    def received(self, size: int) -> None:
        self._sizes.append(size)

    def passed(self, taken: int, given: bytes) -> Iterator[pb.ProcessingResponse]:
        self._dealt += taken
        self._given += given
        while self._sizes and self._dealt >= self._sizes[0] and (self._dealt or self._given):
            self._dealt -= self._sizes.popleft()
            # What is passed on unchanged keeps to the messages that it came in.
            size = len(self._given) - (self._dealt if len(given) == taken else 0)
            yield self._body(size)

    def ended(self, has_trailers: bool) -> Iterator[pb.ProcessingResponse]:
        while self._sizes:
            self._sizes.popleft()
            yield self._body(len(self._given))
        if has_trailers:
            yield pb.ProcessingResponse(response_trailers=pb.TrailersResponse())

    def echoed(self, message: pb.HttpBody) -> Iterator[pb.ProcessingResponse]:
        yield pb.ProcessingResponse(response_body=pb.BodyResponse())

    def _body(self, size: int) -> pb.ProcessingResponse:
        body = bytes(self._given[: max(size, 0)])
        del self._given[: max(size, 0)]
        mutation = pb.BodyMutation(body=body) if body else pb.BodyMutation(clear_body=True)
        return pb.ProcessingResponse(response_body=pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation)))
