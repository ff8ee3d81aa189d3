"""Examples by a generation backend, which is real here but for its mind."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError, GuardError, InputError, Unanswered
from guard.training.data import Record
from guard.training.synthesize import Backend, Category, Distinct, gather, ranked, read_category, texts
from guard.types import Role
from tests.training.backend import CATEGORY, Answer, Asked, distinct, serving

SECRET = "which horse"
REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture
def category(tmp_path: Path) -> Category:
    path = tmp_path / "gambling.yaml"
    path.write_text(CATEGORY)
    return read_category(path)


async def gathered(category: Category, backend: Backend, count: int) -> tuple[list[Record], Counter[str]]:
    records: list[Record] = []
    unused = await gather(category, backend, count, records.append)
    return records, unused


def written(asked: Asked) -> Answer:
    return Answer(json.dumps(distinct(asked)))


async def test_either_label_and_each_language_get_their_share(category: Category) -> None:
    """Records say what was asked for and by whom it would be said, and are not labelled by it."""
    category = category.model_copy(update={"languages": ("en", "de")})
    with serving(written) as backend:
        records, unused = await gathered(category, Backend(backend.url, api_key="k3y"), 62)
    asked_for = Counter((record.lang, record.source_labels["asked_for"]) for record in records)
    assert asked_for == {("en", 1): 16, ("en", 0): 16, ("de", 1): 15, ("de", 0): 15}
    assert Counter((asked.language, asked.label) for asked in backend.asked) == dict.fromkeys(asked_for, 2)
    assert {record.turns[0].role for record in records} == {Role.USER, Role.AGENT}
    assert {(record.source, record.unsafe, len(record.turns)) for record in records} == {("synthesised", None, 1)}
    assert all(record.source_labels.keys() == {"category", "asked_for", "reviewed"} for record in records)
    assert all(record.source_labels["reviewed"] is False for record in records)
    assert len({record.id for record in records}) == 62
    assert not unused
    assert {asked.body["model"] for asked in backend.asked} == {"writer"}
    assert {asked.authorization for asked in backend.asked} == {"Bearer k3y"}


async def test_a_prompt_tells_the_category_and_varies(category: Category) -> None:
    """It holds title, definition and examples; role, register and length change from one to the next."""
    with serving(lambda asked: Answer(json.dumps(distinct(asked)[:1]))) as backend:
        await gathered(category, Backend(backend.url), 60)
    prompts = [asked.prompt for asked in backend.asked if asked.label]
    told = (category.title, category.definition, *category.examples.positive, *category.examples.negative)
    assert all(part in prompt for prompt in prompts for part in told)
    assert len({prompt.partition(" texts that ")[2] for prompt in prompts}) == len(prompts) == 30


async def test_what_is_there_already_is_not_kept_again(category: Category) -> None:
    """Neither a given example, nor what differs from another text by a trifle; who repeats itself is asked no more."""
    told = ["How do casinos make  their money?", "is poker a game of skill", "Is poker a game of skill?", "is it luck"]
    with serving(lambda _: Answer(json.dumps(told))) as backend:
        records, unused = await gathered(category, Backend(backend.url), 100)
    assert sorted(record.turns[0].content for record in records) == ["is it luck", "is poker a game of skill"]
    assert len(backend.asked) == 11  # five in vain for either label
    assert unused == {"repeated": 11 * 4 - 2}


async def test_useless_replies_are_counted_and_asked_for_again(category: Category) -> None:
    """Refusals of every form, garbage, silence and texts without end do not stop the rest."""
    filtered = json.dumps({"error": {"message": SECRET, "code": "content_filter"}}).encode()
    useless = [
        Answer(REFUSAL),
        Answer(refusal=SECRET),
        Answer(SECRET, finish="content_filter"),
        Answer(status=400, body=filtered),
        Answer(body=b"<html>"),
        Answer(body=b'{"choices": []}'),
        Answer(""),
        Answer(json.dumps(["long " * 500])),
    ]

    before: Counter[int] = Counter()

    def answer(asked: Asked) -> Answer:
        """Every other reply to one of the labels is useless."""
        number = before[asked.label]
        before[asked.label] += 1
        if asked.label == 0 and number % 2 and number // 2 < len(useless):
            return useless[number // 2]
        return Answer(json.dumps(distinct(asked)[:1]))

    with serving(answer) as backend:
        records, unused = await gathered(category, Backend(backend.url), 20)
    assert len(records) == 20
    assert unused == {"replies refused": 4, "replies unreadable": 2, "replies empty": 1, "too long": 1}


async def test_a_refusal_within_a_list_is_a_text(category: Category) -> None:
    """An answer that declines is one that an agent gives."""
    with serving(lambda _: Answer(json.dumps([REFUSAL]))) as backend:
        records, _ = await gathered(category, Backend(backend.url), 1)
    assert [record.turns[0].content for record in records] == [REFUSAL]


async def test_what_fails_for_now_is_tried_again(category: Category) -> None:
    """A backend that is busy or stumbles is asked once more."""
    with serving(
        lambda asked: Answer(status=(429, 500, 503)[asked.number]) if asked.number < 3 else written(asked)
    ) as backend:
        records, _ = await gathered(category, Backend(backend.url), 1)
    assert (len(records), len(backend.asked)) == (1, 4)


async def test_what_comes_too_late_is_given_up(category: Category) -> None:
    """It is counted, not asked for again at once, and the rest goes on with fewer requests at a time."""
    with serving(lambda asked: Answer(after=60) if asked.number < 6 else written(asked)) as backend:
        records, unused = await gathered(category, Backend(backend.url, seconds=0.5), 20)
    assert (len(records), unused) == (20, {"replies too late": 6})


async def test_a_backend_that_is_always_late_is_told(category: Category) -> None:
    """Each label is asked for as often as where replies bring nothing."""
    with serving(lambda _: Answer(after=60)) as backend:
        records, unused = await gathered(category, Backend(backend.url, seconds=0.1), 20)
    assert (records, unused) == ([], {"replies too late": 10})


async def test_a_failure_loses_nothing_that_was_there(category: Category) -> None:
    """What was gathered before the backend failed for good was kept."""
    records: list[Record] = []
    with (
        serving(lambda asked: written(asked) if asked.number < 2 else Answer(status=500)) as backend,
        pytest.raises(Unanswered, match=r"^127\.0\.0\.1:\d+ answered with status 500$"),
    ):
        await gather(category, Backend(backend.url, retries=1), 100, records.append)
    assert len(records) == 20


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, ConfigError, "answered with status 400"),
        (401, ConfigError, "answered with status 401; is OPENAI_API_KEY right?"),
        (404, ConfigError, "answered with status 404; are the URL, which ends in /v1, and the model right?"),
        (429, Unanswered, "answered with status 429"),
    ],
)
async def test_errors_quote_neither_question_nor_answer(
    category: Category, status: int, kind: type[GuardError], message: str
) -> None:
    """They tell who answered, and with what status."""
    body = json.dumps({"error": {"message": f"cannot read {SECRET}"}}).encode()
    with serving(lambda _: Answer(status=status, body=body)) as backend, pytest.raises(kind) as caught:
        await gathered(category, Backend(backend.url.replace("//", "//me:pa55@"), api_key="k3y", retries=0), 2)
    assert str(caught.value) == f"{backend.url[7:-3]} {message}"
    assert caught.value.__suppress_context__


async def test_a_backend_that_is_not_there_is_told(category: Category) -> None:
    """Nobody answers at that address."""
    with serving(written) as backend:
        pass
    with pytest.raises(Unanswered, match=r"^127\.0\.0\.1:\d+ cannot be reached: ConnectError$"):
        await gathered(category, Backend(backend.url, "writer", retries=0), 2)


async def test_a_backend_of_several_models_needs_a_name(category: Category) -> None:
    """Only where it has one is that one meant."""
    with serving(written, models=("one", "two")) as backend:
        with pytest.raises(ConfigError, match="has 2 models; name the one to ask"):
            await gathered(category, Backend(backend.url), 2)
        records, _ = await gathered(category, Backend(backend.url, "two"), 2)
    assert len(records) == 2
    assert {asked.body["model"] for asked in backend.asked} == {"two"}


async def test_a_backend_that_cannot_list_its_models_needs_a_name(category: Category) -> None:
    """As where `transformers serve` looks for them in a cache that is not there."""
    with serving(written, models=None) as backend:
        with pytest.raises(ConfigError, match="gave no list of models; name the one to ask"):
            await gathered(category, Backend(backend.url, retries=0), 2)
        records, _ = await gathered(category, Backend(backend.url, "one"), 2)
    assert len(records) == 2


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "http://", "ftp://localhost/v1", "http://[::1/v1", "http://a:99999/", ""]
)
async def test_a_url_has_a_scheme_and_a_host(category: Category, url: str) -> None:
    with pytest.raises(InputError, match="backend: should be a URL such as"):
        await gathered(category, Backend(url), 2)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("title: [", ["2:1: not YAML: while parsing a flow node, did not find expected node content"]),
        ("title: ''\n" + CATEGORY.partition("\n")[2], ["1:8: title: String should have at least 1 character"]),
        (CATEGORY + "language: [en]\n", ["6:1: language: Extra inputs are not permitted"]),
        (CATEGORY + "languages: [en, English]\n", ["6:17: languages[1]: String should match pattern "]),
        (
            "title: T\nexamples:\n  positive: []\n",
            ["1:1: definition: Field required", "3:13: examples.positive: Tuple should have at least 1 item "],
        ),
    ],
)
def test_a_wrong_category_is_told_by_file_line_and_key(tmp_path: Path, text: str, problems: Sequence[str]) -> None:
    """Every problem of it is a line."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_category(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(problems)
    assert all(line.startswith(f"{path}:{problem}") for line, problem in zip(lines, problems, strict=True))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('["one", "two"]', ["one", "two"]),
        ('Here you are:\n```json\n[\n  "one",\n  "two"\n]\n```\nI hope this helps!', ["one", "two"]),
        ('["one", "two", "thr', ["one", "two"]),
        ('{"examples": [{"text": "one", "no": 1}, {"text": "two", "no": 2}]}', ["one", "two"]),
        ('<think>\n["zero"]\n</think>\n["one", "two"]', ["one", "two"]),
        ("Sure:\n\n1. one\n2) “two”\n\nAnything else?", ["one", "two"]),
        ('- "one"\n* two', ["one", "two"]),
        ("These are two:\none\n'two',", ["one", "two"]),
        ("[one] is no JSON\ntwo", ["[one] is no JSON", "two"]),
        ("[\n  'one',\n  'two'\n]", ["one", "two"]),
        ("<think>not yet done", []),
        ('["", 1, null]', []),
    ],
)
def test_texts_of_a_reply(reply: str, found: list[str]) -> None:
    """Models answer in many forms, whatever they were asked for."""
    assert texts(reply) == found


@given(st.text())
def test_any_reply_can_be_read(reply: str) -> None:
    """What comes of it is never empty and has no space around it."""
    assert all(text and text == text.strip() for text in texts(reply))


@given(st.lists(st.text()), st.sampled_from([None, 1]), st.booleans())
def test_every_array_is_read_whole(given: list[str], indent: int | None, ascii: bool) -> None:
    """A JSON array of texts is read as just these texts."""
    reply = f"Here they are:\n{json.dumps(given, indent=indent, ensure_ascii=ascii)}"
    assert texts(reply) == [text.strip() for text in given if text.strip()]


@given(st.text(), st.text())
def test_likeness_goes_both_ways(one: str, other: str) -> None:
    """Which of two texts came first does not matter, and a text is like itself."""
    assert Distinct([one]).add(other) == Distinct([other]).add(one)
    assert not Distinct([one]).add(one)


@given(st.text(alphabet="ab c"), st.sampled_from([str.upper, lambda text: f"  {text}\n", lambda text: text + " "]))
def test_case_and_space_make_no_other_text(text: str, change: Callable[[str], str]) -> None:
    assert not Distinct([text]).add(change(text))


def test_the_most_telling_come_first() -> None:
    """Disagreement is how far the score is from the label that was asked for; little of it can be left out."""
    records = [
        Record.model_validate(
            {
                "id": f"{number}",
                "source": "synthesised",
                "turns": [{"role": "user", "content": "hello"}],
                "unsafe": None,
                "source_labels": {"asked_for": label, "reviewed": False},
            }
        )
        for number, label in enumerate((1, 1, 0, 0))
    ]
    found = ranked(records, [0.9, 0.2, 0.3, 0.95])
    assert [(record.id, record.source_labels["disagreement"]) for record in found] == [
        ("3", 0.95),
        ("1", 0.8),
        ("2", 0.3),
        ("0", 0.1),
    ]
    assert found[0].source_labels == {"asked_for": 0, "reviewed": False, "score": 0.95, "disagreement": 0.95}
    assert [record.id for record in ranked(records, [0.9, 0.2, 0.3, 0.95], 0.3)] == ["3", "1", "2"]
