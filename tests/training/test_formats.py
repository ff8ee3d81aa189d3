import gzip
import json
from pathlib import Path

import pytest

from guard.errors import ConfigError
from guard.training.data import Example
from guard.training.formats import read_examples
from guard.types import Role
from tests.training.tiny import row


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def chat(label: object, *contents: object, **more: object) -> dict[str, object]:
    roles = ("system", "user", "assistant")[-len(contents) :] if len(contents) > 1 else ("user",)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return {"messages": messages, "label": label, **more}


def told(example: Example) -> tuple[object, ...]:
    turns = tuple((turn.role.value, turn.text) for turn in example.conversation.turns)
    return turns, example.unsafe, example.hazards, example.lang, example.source


def test_records_of_guard(tmp_path: Path) -> None:
    """Guard's own records are read as training reads them; those without a label are left out."""
    records = row(0, "a"), row(1, "b", None), row(2, "c", 1, categories=["S1"], lang="de")
    assert [told(example) for example in read_examples(lines(tmp_path / "rows.jsonl", *records))] == [
        ((("user", "a"),), False, frozenset(), "und", "colours"),
        ((("user", "c"),), True, {"S1"}, "de", "colours"),
    ]


def test_chats(tmp_path: Path) -> None:
    """Messages as chat APIs have them, with the label of the last one; an unsafe one may be so in unknown ways."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    path = lines(
        tmp_path / "my.chats.jsonl",
        chat(0, "be kind", parts, "hello", lang="fr"),
        chat("unsafe", "b"),
        chat("1", "c", None, categories=["X1"]),
        chat("safe", "d"),
    )
    examples = read_examples(path)
    assert [told(example) for example in examples] == [
        ((("system", "be kind"), ("user", "one\ntwo"), ("agent", "hello")), False, frozenset(), "fr", "my"),
        ((("user", "b"),), True, None, "und", "my"),
        ((("user", "c"), ("agent", "")), True, {"X1"}, "und", "my"),
        ((("user", "d"),), False, frozenset(), "und", "my"),
    ]
    assert [example.role for example in examples] == [Role.AGENT, Role.USER, Role.AGENT, Role.USER]
    assert len({example.id for example in examples}) == 4


def test_tables(tmp_path: Path) -> None:
    """A text may have commas, quotes and lines; columns nobody knows are ignored, and files may be gzipped."""
    text = 'label,text,role,categories,note\r\nsafe,"one, ""two""\r\nthree",assistant,,x\r\n1,four,user,S1 X3,y\r\n'
    expected = [
        ((("agent", 'one, "two"\r\nthree'),), False, frozenset(), "und", "table"),
        ((("user", "four"),), True, {"S1", "X3"}, "und", "table"),
    ]
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("table.csv", "table.csv.gz"):
        assert [told(example) for example in read_examples(tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", json.dumps(row(0, "secret")) + '\n{"secret', ":2: Invalid JSON: EOF while parsing a string"),
        ("a.jsonl", "[\n", ":1: Invalid JSON: EOF while parsing a list"),
        ("a.jsonl", '["secret"]', ":1: Input should be an object"),
        ("a.jsonl", "\n" + json.dumps(row(0, "secret") | {"unsafe": "secret"}), ":2: unsafe: Input should be 0 or 1"),
        ("a.jsonl", json.dumps(chat("secret", "secret")), ":1: label: should be 0, 1, safe or unsafe"),
        ("a.jsonl", json.dumps({"messages": [], "label": 0}), ":1: messages: at least one is needed"),
        (
            "a.jsonl",
            json.dumps({"messages": [{"role": ["secret"]}], "label": 0}),
            ":1: messages[0].role: should be one of user,",
        ),
        ("a.jsonl", json.dumps(chat(0, ["secret"])), ":1: messages[0].content[0]: should be an object"),
        ("a.jsonl", json.dumps(chat(0, "\ud800")), ":1: Invalid JSON"),
        ("a.jsonl", json.dumps(chat(0, "secret", categories=["secret"])), ":1: categories.0: is none of S1, S2,"),
        ("a.csv", "text,label\nsecret,0\nsecret,2\n", ":3: label: should be 0, 1, safe or unsafe"),
        ("a.csv", 'text,label\n"two\nlines",0\nsecret,2\n', ":4: label: should be 0, 1, safe or unsafe"),
        ("a.csv", "text,label\nsecret\n", ":2: label: should be 0, 1, safe or unsafe"),
        ("a.csv", "text,unsafe\nsecret,0\n", ":2: label: Field required"),
        ("a.csv", "label,text\n0,secret, and more\n", ":2: has more fields than the first line"),
        ("a.csv", 'text,label\n"secret" x,0\n', ":2: ',' expected after '\"'"),
        ("a.csv", "text,label,categories\nsecret,2\n", ":2: label: should be 0, 1, safe or unsafe"),
        ("a.jsonl.gz", "secret", ": cannot be read: BadGzipFile"),
        ("a.txt", "secret", ": should end in .jsonl or .csv, with or without .gz"),
    ],
)
def test_a_wrong_file_is_told_by_its_place_and_not_quoted(
    tmp_path: Path, name: str, content: str, problem: str
) -> None:
    """File, line and key, and never a text."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_examples(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}{problem}")
    assert "secret" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    zipped = bytearray(gzip.compress(b"text,label\n" + b"secret,0\n" * 50))
    zipped[15:20] = b"\0\xff\0\xff\0"
    (tmp_path / "rows.csv.gz").write_bytes(zipped)
    with pytest.raises(ConfigError, match=r"rows\.csv\.gz: cannot be read: "):
        read_examples(tmp_path / "rows.csv.gz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv: cannot be read: FileNotFoundError"):
        read_examples(tmp_path / "gone.csv")


def test_rows_of_a_sample_have_weights(tmp_path: Path) -> None:
    """In either form, 1 where none is said; a weight that is none is an error at its line."""
    table = tmp_path / "rows.csv"
    table.write_text("text,label,weight\na,0,2.5\nb,1,40\n")
    assert [example.weight for example in read_examples(table)] == [2.5, 40]
    chats = read_examples(lines(tmp_path / "rows.jsonl", chat(0, "a", weight=3), chat(1, "b")))
    assert [example.weight for example in chats] == [3, 1]
    table.write_text("text,label,weight\na,0,0\n")
    with pytest.raises(ConfigError, match=r"rows\.csv:2: weight: Input should be greater than 0$"):
        read_examples(table)
