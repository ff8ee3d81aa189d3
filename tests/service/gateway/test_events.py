"""Whatever bytes come in, cut anywhere: the same events, and not a byte more or less."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import InputError
from guard.service.gateway.apis import loads
from guard.service.gateway.events import Event, Events, Framing, Lines, ServerSent

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.sampled_from(
    [b"data: {}", b"data:x", b"event: y", b": note", b"id: 1", b"", b"data: \xf0\x9f\xa7\x88", b"datax: 1"]
)
STREAMS = st.lists(st.tuples(LINES, ENDS).map(b"".join), max_size=30).map(b"".join)
CUTS = st.lists(st.integers(0, 200), max_size=20)


def events(framing: Framing, raw: bytes, cuts: list[int], limit: int = 10_000) -> list[Event]:
    places = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    reader = Events(framing, limit)
    found = [event for start, end in zip(places, places[1:], strict=False) for event in reader.add(raw[start:end])]  # noqa: RUF007
    return [*found, *reader.add(b"", final=True)]


@given(STREAMS, CUTS)
def test_server_sent_events_are_the_same_however_they_are_cut(raw: bytes, cuts: list[int]) -> None:
    found = events(ServerSent(), raw, cuts)
    assert b"".join(event.raw for event in found) == raw
    said = [event.data for event in found if event.data]
    assert said == [event.data for event in events(ServerSent(), raw, []) if event.data]


@given(st.lists(st.text(alphabet="a🧈", max_size=5), max_size=9), CUTS)
def test_lines_are_the_same_however_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    raw = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    found = events(Lines(), raw, cuts)
    assert [json.loads(event.data)["text"] for event in found] == texts
    assert b"".join(event.raw for event in found) == raw


def test_data_of_several_lines_is_one_and_a_last_event_needs_no_end() -> None:
    raw = b"event: x\r\ndata: a\r\ndata:b\r\n\r\n: note\n\ndata: c"
    assert [event.data for event in events(ServerSent(), raw, [])] == [b"a\nb", b"", b"c"]


def test_an_event_without_end_is_not_read_for_ever() -> None:
    with pytest.raises(InputError, match="too long"):
        events(ServerSent(), b"data: " + b"x" * 100, [50], limit=60)


@pytest.mark.parametrize(
    "text", ["{", "[]", '"a"', '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[" * 100_000, "\xff"]
)
def test_what_two_readers_may_read_differently_is_not_read(text: str) -> None:
    with pytest.raises(InputError):
        loads(text.encode("latin-1"), "request")
