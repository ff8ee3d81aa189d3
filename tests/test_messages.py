"""What chat APIs send, as turns."""

from typing import Any

import pytest

from guard.errors import InputError
from guard.messages import new_turns, tool_calls, turns
from guard.types import Role, Turn


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "user", "content": "Hi!"}, Turn(Role.USER, "Hi!")),
        ({"role": "developer", "content": "Be brief."}, Turn(Role.SYSTEM, "Be brief.")),
        ({"role": "function", "content": "42"}, Turn(Role.TOOL, "42")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"text": "b"}]},
            Turn(Role.USER, "a\nb"),
        ),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, Turn(Role.AGENT, "No.")),
        ({"role": "assistant", "content": None, "refusal": "No."}, Turn(Role.AGENT, "No.")),
        (
            {
                "role": "assistant",
                "content": "Wait.",
                "tool_calls": [
                    {"function": {"name": "find", "arguments": '{"q":"ü"}'}},
                    {"function": {"name": "find", "arguments": {"q": "ü"}}},
                    {"custom": {"name": "run", "input": "ls"}},
                    {"function": {"name": "stop"}},
                ],
            },
            Turn(Role.AGENT, 'Wait.\nfind {"q":"ü"}\nfind {"q": "ü"}\nrun ls\nstop'),
        ),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, Turn(Role.AGENT, "f {}")),
    ],
)
def test_a_message_is_a_turn(message: dict[str, Any], turn: Turn) -> None:
    """With all that it says and asks tools for; what is not text is passed over."""
    assert turns([message]) == (turn,)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("Hi!", "messages: should be a list"),
        ([], "messages: at least one is needed"),
        (["Hi!"], "messages[0]: should be an object"),
        (
            [{"role": "pirate", "content": "Arr"}],
            "messages[0].role: should be one of user, assistant, agent, system, developer, tool, function",
        ),
        ([{"role": "user", "content": 1}], "messages[0].content: should be a string"),
        (
            [{"role": "user", "content": "\ud800"}],
            "messages[0].content: is not valid Unicode (it holds a lone surrogate)",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: should be a string"),
        (
            [{"role": "user", "content": [{"type": "smell"}]}],
            "messages[0].content[0].type: should be one of file, image_url, input_audio, input_file, input_image, "
            "input_text, output_text, refusal, text, video_url",
        ),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls: should be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function: should be an object"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "messages[0].tool_calls[0].function.name: should be a string",
        ),
    ],
)
def test_what_no_chat_api_takes_is_refused(messages: object, problem: str) -> None:
    """By the place of what is wrong, and without its text."""
    with pytest.raises(InputError) as raised:
        turns(messages)
    assert str(raised.value) == problem


def test_the_place_begins_where_the_caller_says() -> None:
    """As each API calls its messages by a name of its own."""
    with pytest.raises(InputError, match=r"^body\.messages: should be a list$"):
        turns(None, "body.messages")
    with pytest.raises(InputError, match=r"^calls\[0\]: should be an object$"):
        tool_calls([None], "calls")


@pytest.mark.parametrize(
    ("roles", "new"),
    [
        ("u", [0]),
        ("su", [0, 1]),
        ("uau", [2]),
        ("uaut", [2, 3]),
        ("uatau", [4]),
        ("uaua", [2, 3]),
        ("ua", [0, 1]),
        ("a", [0]),
        ("", []),
    ],
)
def test_new_is_what_no_answer_has_followed(roles: str, new: list[int]) -> None:
    """An agent turn at the end is the beginning of the next answer."""
    by_letter = {role.value[0]: role for role in Role}
    assert list(new_turns([Turn(by_letter[letter], "") for letter in roles])) == new
