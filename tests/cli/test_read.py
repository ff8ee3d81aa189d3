"""Requests from whatever JSON people have."""

import io
import json

from hypothesis import given
from hypothesis import strategies as st

from guard.cli import read
from guard.errors import InputError
from guard.v1 import moderation_pb2 as pb

SURROGATES = st.text(st.characters(categories=("Lu", "Cs")), max_size=3)
KEYS = st.sampled_from(
    ["id", "turns", "messages", "text", "role", "content", "target", "policy", "metadata", "scoreDetail", "\ud800"]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    SURROGATES,
    st.sampled_from(["user", "ROLE_AGENT", "assistant"]),
)
DOCUMENTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.lists(DOCUMENTS, max_size=3))
def test_every_line_is_a_request_or_an_explained_mistake(documents: list[object]) -> None:
    """Whatever JSON a line holds, it comes out with an id, and neither it nor those after it get lost."""
    source = io.BytesIO("".join(json.dumps(document) + "\n" for document in documents).encode())
    found = list(read.lines(source))
    assert len(found) == len(documents)
    for id, request in found:
        if isinstance(request, InputError):
            assert pb.CheckManyResponse(id=id, error=pb.Error(message=str(request))).error.message
        else:
            assert pb.CheckManyRequest(id=id, request=request).SerializeToString()


def test_the_three_forms_of_a_conversation_are_the_same_request() -> None:
    """Our turns, a chat API's messages and a single text differ in form only."""
    turns = {"turns": [{"role": "agent", "text": "Hi!"}], "policy": "strict"}
    messages = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "Hi!"}]}], "policy": "strict"}
    text = {"text": "Hi!", "role": "ROLE_AGENT", "policy": "strict"}
    expected = pb.CheckRequest(turns=[pb.Turn(role=pb.ROLE_AGENT, text="Hi!")], policy="strict")
    assert [read.conversation(form) for form in (turns, messages, text)] == [expected] * 3


def test_messages_are_read_as_the_service_reads_them() -> None:
    """Calls of tools are text that is judged; pictures are passed over."""
    call = {"type": "function", "function": {"name": "pay", "arguments": '{"to": "Ann"}'}}
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}, {"text": "Pay Ann."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert read.conversation({"messages": said}).turns == [
        pb.Turn(role=pb.ROLE_SYSTEM, text="Be brief."),
        pb.Turn(role=pb.ROLE_USER, text="Pay Ann."),
        pb.Turn(role=pb.ROLE_AGENT, text='pay {"to": "Ann"}'),
    ]
