"""What rows of logs look like, found out or told, and the conversations in them."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from guard.audit.records import Place, Record, Reject
from guard.audit.shapes import Shape, detect, read_time
from guard.errors import ConfigError
from guard.types import Role, Turn

PLACE = Place("a.jsonl", 3)
U, A, S, T = Role.USER, Role.AGENT, Role.SYSTEM, Role.TOOL

SHAPES: dict[str, tuple[dict[str, Any], list[tuple[Role, str]]]] = {
    "Guard's own": (
        {"turns": [{"role": "user", "text": "Hi!"}, {"role": "agent", "text": ""}], "conversation_id": "c"},
        [(U, "Hi!"), (A, "")],
    ),
    "captured": (
        {"id": "c", "actions": ["allow"], "turns": [{"role": "user", "text": "Hi!"}], "time": "2026-10-01T12:00:00Z"},
        [(U, "Hi!")],
    ),
    "OpenAI": (
        {
            "id": "c",
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "Hi!"}, {"type": "image_url", "image_url": {}}]},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "42"},
            ],
            "response": {"choices": [{"message": {"role": "assistant", "content": "It is 42."}}]},
        },
        [(S, "Be kind."), (U, "Hi!"), (A, "f {}"), (T, "42"), (A, "It is 42.")],
    ),
    "ShareGPT": (
        {
            "id": "c",
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi!"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "observation", "value": "42"},
            ],
        },
        [(S, "Be kind."), (U, "Hi!"), (A, "Hello!"), (T, "42")],
    ),
    "a list in a cell": (
        {
            "chat_id": "c",
            "messages": json.dumps([{"role": "Human", "content": "Hi!"}, {"role": "AI", "content": "Ho!"}]),
        },
        [(U, "Hi!"), (A, "Ho!")],
    ),
    "prompt and response": ({"uuid": "c", "prompt": "Hi!", "completion": "Hello!"}, [(U, "Hi!"), (A, "Hello!")]),
    "instruction, input and output": (
        {"id": "c", "system": "Be kind.", "instruction": "Translate:", "input": "Hallo", "output": "Hello"},
        [(S, "Be kind."), (U, "Translate:\n\nHallo"), (A, "Hello")],
    ),
    "a text": ({"id": "c", "body": "Hi!"}, [(U, "Hi!")]),
    "a text and who says it": ({"id": "c", "content": "Hi!", "author": "bot"}, [(A, "Hi!")]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_rows_is_found_out(name: str) -> None:
    """Each row is the conversation that people would see in it."""
    row, said = SHAPES[name]
    kind = "texts" if name.startswith("a text") else None  # an id, a role and a text may be a turn of many
    record = detect([row], kind).record(PLACE, row)
    assert isinstance(record, Record)
    assert [(turn.role, turn.text) for turn in record.turns] == said
    assert record.id == "c"


def test_a_reply_that_stands_among_the_messages_is_read_once() -> None:
    """Some logs have it in both places."""
    reply = {"role": "assistant", "content": "Ho!"}
    row = {"messages": [{"role": "user", "content": "Hi!"}, reply], "response": reply}
    record = detect([row]).record(PLACE, row)
    assert isinstance(record, Record)
    assert [turn.text for turn in record.turns] == ["Hi!", "Ho!"]


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (None, []),
        ("", []),
        ("Ho!", ["Ho!"]),
        ('{"answer": "Ho!"}', ['{"answer": "Ho!"}']),  # as a schema asked for it
        ('{"content": "Ho!", "role": "villain"}', ['{"content": "Ho!", "role": "villain"}']),
        ('["Ho!"]', ['["Ho!"]']),
        ({"choices": [{"text": "Ho!"}]}, ["Ho!"]),
        ({"choices": [{"message": {"role": "assistant", "content": "Ho!"}}]}, ["Ho!"]),
        ('{"choices": [{"message": {"role": "assistant", "content": "Ho!"}}]}', ["Ho!"]),
        ({"role": "assistant", "content": [{"type": "text", "text": "Ho!"}]}, ["Ho!"]),
        ({"content": "Ho!"}, ["Ho!"]),
        ([{"role": "assistant", "content": "Ho!"}, {"role": "assistant", "content": "Hm."}], ["Ho!", "Hm."]),
        (
            {
                "output": [
                    {"type": "reasoning", "summary": []},
                    {"type": "function_call", "name": "f", "arguments": "{}"},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Ho!"}]},
                ]
            },
            ["f {}", "Ho!"],
        ),
    ],
)
def test_replies_beside_the_messages_are_judged_in_all_their_forms(response: object, said: list[str]) -> None:
    """Whatever a chat API answers, or a text."""
    row = {"messages": [{"role": "user", "content": "Hi!"}], "response": response}
    record = detect([row | {"response": "Ho!"}]).record(PLACE, row)
    assert isinstance(record, Record)
    assert [(turn.role, turn.text) for turn in record.turns] == [(U, "Hi!"), *((A, text) for text in said)]


@pytest.mark.parametrize("response", [{"candidates": []}, ["secret"], 7, {"output": [{"type": "web_search_call"}]}])
def test_a_reply_that_nobody_can_read_is_not_left_out(response: object) -> None:
    """The row is rejected, rather than that half of it is judged."""
    row = {"messages": [{"role": "user", "content": "Hi!"}], "response": response}
    rejected = detect([row | {"response": "Ho!"}]).record(PLACE, row)
    assert isinstance(rejected, Reject)
    assert "secret" not in rejected.reason


def test_columns_that_only_look_like_a_field_are_not_taken_for_it() -> None:
    """Authors are people, and an id of a turn need be no number; where a guess is wrong, FIELD= says so."""
    comments = [{"id": number, "author": name, "body": "Hi!"} for number, name in enumerate(["ann", "bot", "bob"])]
    assert detect(comments).kind == "texts"
    assert "role" not in detect(comments).columns
    assert detect(comments, mapping=["role=author"], roles=["ann=user", "bob=user"]).kind == "rows"
    turns = [{"session_id": "s", "role": "user", "content": "Hi!", "turn_id": f"t{number}"} for number in range(3)]
    assert "turn" not in detect(turns).columns
    with pytest.raises(ConfigError, match=r"none of the first 3 rows can be read as .*: turn_id: should be a number"):
        detect(turns, mapping=["turn=turn_id"])
    alone = detect(turns, mapping=["id="])
    assert (alone.kind, alone.columns) == ("texts", {"text": "content", "role": "role"})


def test_a_text_without_a_role_is_a_users() -> None:
    row = {"text": "Hi!", "role": ""}
    record = detect([row | {"role": "agent"}], "texts").record(PLACE, row)
    assert isinstance(record, Record)
    assert record.turns == (Turn(U, "Hi!"),)


def test_rows_none_of_which_can_be_read_are_an_error() -> None:
    """Rather than that all of them are rejected, one by one."""
    with pytest.raises(
        ConfigError, match=r"none of the first 2 rows can be read as .*: messages\[0\]\.role: should be"
    ):
        detect([{"messages": [{"role": "caller", "content": "Hi!"}]}] * 2)


def test_what_is_known_of_a_conversation_is_found_too() -> None:
    """Time, language, source, policy and metadata; without an id it is told by its place."""
    row = {
        "messages": [{"role": "user", "content": "Hi!"}],
        "created_at": 1_760_000_000,
        "lang": "de",
        "model": "m-1",
        "policy": "strict",
        "metadata": {"app": "kids", "age": 9, "tags": ["a"]},
    }
    shape = detect([row])
    record = shape.record(PLACE, row)
    assert record == Record(
        PLACE,
        "a.jsonl:3",
        (Turn(U, "Hi!"),),
        "strict",
        {"app": "kids", "age": "9"},
        datetime(2025, 10, 9, 8, 53, 20, tzinfo=UTC),
        "de",
        "m-1",
    )
    assert "turns from `messages`" in shape.described()
    assert "language from `lang`" in shape.described()


def test_columns_and_words_can_be_told() -> None:
    """Also such as lie deeper; what is told stands above what would be found."""
    row = {
        "event": {"chat": {"log": [{"role": "caller", "text": "Hi!"}, {"role": "bot", "text": "Ho!"}]}},
        "id": 7,
        "no": "x",
    }
    shape = detect([row], None, ["turns=event.chat.log", "id=no", "metadata.number=id"], ["caller=user", "bot=tool"])
    record = shape.record(PLACE, row)
    assert isinstance(record, Record)
    assert record.turns == (Turn(U, "Hi!"), Turn(T, "Ho!"))
    assert (record.id, record.metadata) == ("x", {"number": "7"})


@pytest.mark.parametrize(
    ("kind", "mapping", "roles", "message"),
    [
        (None, ["turn=3", "turns"], [], "map: expected FIELD=COLUMN, found 'turns'"),
        (None, ["txet=body"], [], "map: there is no field 'txet'; did you mean text"),
        (None, ["text=bdoy"], [], "map: text=bdoy: no such column among body, id"),
        (
            None,
            [],
            ["bot=robot"],
            "role: expected WORD=ROLE, of the roles user, agent, system, tool, found 'bot=robot'",
        ),
        ("pair", [], [], "shape: expected conversations, rows, pairs, texts, found 'pair'; did you mean pairs"),
        ("pairs", [], [], "expected pairs .a prompt and its response a row., found the columns body, id; say where"),
    ],
)
def test_what_cannot_be_is_an_error(kind: str | None, mapping: list[str], roles: list[str], message: str) -> None:
    """With what there is, before anything is judged."""
    with pytest.raises(ConfigError, match=message):
        detect([{"body": "Hi!", "id": 1}], kind, mapping, roles)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "Hi!"}, "messages: should be a list"),
        ({"messages": []}, "messages: holds no turn"),
        ({"messages": ["Hi!"]}, "messages[0]: should be an object"),
        ({"messages": [{"role": "user", "content": "Hi!"}] * 1001}, "messages: 1001 turns, at most 1000 are taken"),
        ({"messages": [{"role": "hacker", "content": "Hi!"}]}, "messages[0].role: should be one of user, "),
        ({"messages": [{"content": "Hi!"}]}, "messages[0].role: should be one of user, "),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content: should be a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content: is not valid Unicode"),
        ({}, "messages: should be a list"),
    ],
)
def test_a_row_that_does_not_fit_is_rejected(row: dict[str, Any], reason: str) -> None:
    """It names the field, and quotes nothing."""
    rejected = detect([{"messages": [{"role": "user", "content": "Hi!"}]}]).record(PLACE, row)
    assert isinstance(rejected, Reject)
    assert rejected.reason.startswith(reason)


@pytest.mark.parametrize("response", [None, ""])
def test_a_prompt_without_a_response_is_judged_alone(response: str | None) -> None:
    """And one without either is rejected."""
    shape = detect([{"prompt": "Hi!", "response": "Ho!"}])
    record = shape.record(PLACE, {"prompt": "Hi!", "response": response})
    assert isinstance(record, Record)
    assert record.turns == (Turn(U, "Hi!"),)
    assert isinstance(shape.record(PLACE, {"prompt": None}), Reject)


@pytest.mark.parametrize(
    "value",
    [
        "2026-10-01T12:00:00Z",
        "2026-10-01 12:00:00",
        "2026-10-01T14:00:00+02:00",
        1790856000,
        "1790856000.0",
        1790856000000,
        "1790856000000000",
        "20261001120000",
        datetime(2026, 10, 1, 12),  # as Parquet may have it
    ],
)
def test_times_are_read_in_all_their_forms(value: object) -> None:
    """Without a zone they are UTC's."""
    assert read_time(value) == datetime(2026, 10, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "yesterday",
        2026,
        "99999999999999999999",
        float("nan"),
        [1],
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+05:00",
        datetime(1, 1, 1),
        "9999-12-31T23:59:59Z",
        "20261301120000",
    ],
)
def test_what_is_no_time_is_none(value: object) -> None:
    """Which is no reason to reject a conversation."""
    assert read_time(value) is None


def test_shapes_are_found_for_rows_of_turns() -> None:
    """An id, a role and a text make a turn of a conversation that goes on in other rows."""
    shape = detect([{"session_id": "s", "speaker": "customer", "message": "Hi!", "timestamp": "2026-10-01"}])
    assert shape == Shape("rows", {"id": "session_id", "role": "speaker", "text": "message", "time": "timestamp"}, {})
