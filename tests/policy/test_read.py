"""What a policy file may hold, and what is said of one that holds something else."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import PolicyError
from guard.policy.read import read_policy
from tests.policy.files import CALIBRATION, WHOLE, write

GOOD = """\
description: For tests.
on_error: {user: block}
categories:
  hate:
    title: Hate
    hazards: [S10, X1]
    thresholds:
      user: {flag: 0.5, block: 0.9}
      agent: {block: 1}
"""


def refusal(path: Path, content: str | bytes) -> str:
    """The message that refuses a file of this content, without the folder."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PolicyError) as caught:
        read_policy(path)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_good_file_is_read_as_written(tmp_path: Path) -> None:
    """What stands in the file is what is read; whole numbers are numbers too."""
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    hate = read_policy(path).spec.categories["hate"]
    assert hate.hazards == ("S10", "X1")
    steps = {role: thresholds.steps() for role, thresholds in hate.thresholds.items()}
    assert steps == {"user": (("flag", 0.5, None), ("block", 0.9, None)), "agent": (("block", 1.0, None),)}


TOP = "description, include, mode, history, long_input, on_error, stream, refusal, replies, rules, categories, overlays"

# Each replaces one piece of the good file by one mistake.
MISTAKES = {
    "unknown key": (
        "description:",
        "descripton:",
        "p.yaml:1:1: description: expected a value, found nothing\n"
        f"p.yaml:1:1: descripton: expected one of {TOP}, found 'descripton'"
        "; did you mean description?",
    ),
    "unknown key of a category": (
        "    title: Hate",
        "    titel: Hate",
        "p.yaml:4:3: categories.hate.title: expected a value, found nothing\n"
        "p.yaml:5:5: categories.hate.titel: expected one of title, definition, score, examples, hazards, thresholds, "
        "found 'titel'; did you mean title?",
    ),
    "unknown hazard": (
        "X1]",
        "S15]",
        "p.yaml:6:20: categories.hate.hazards[1]: expected one of S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, S12, "
        "S13, S14, X1, X2, X3, X4, X5, X6, the name of a category of the model's own, found 'S15'; did you mean S5?",
    ),
    "the overall score among hazards": (
        "X1]",
        "unsafe]",
        "p.yaml:6:20: categories.hate.hazards[1]: expected one of S1, S2, S3, S4, S5, S6, S7, S8, S9, S10, S11, S12, "
        "S13, S14, X1, X2, X3, X4, X5, X6, the name of a category of the model's own, found 'unsafe'",
    ),
    "unknown role": (
        "agent:",
        "agnet:",
        "p.yaml:9:7: categories.hate.thresholds.agnet: expected one of user, agent, system, tool, found 'agnet'"
        "; did you mean agent?",
    ),
    "unknown action": (
        "{block: 1}",
        "{blok: 1}",
        "p.yaml:9:15: categories.hate.thresholds.agent.blok: expected one of flag, redirect, block, found 'blok'"
        "; did you mean block?",
    ),
    "no answer to an error": (
        "{user: block}",
        "{user: flag}",
        "p.yaml:2:18: on_error.user: expected one of allow, block, found 'flag'",
    ),
    "unknown score": (
        "    hazards: [S10, X1]",
        "    score: safe",
        "p.yaml:6:12: categories.hate.score: expected one of max, weighted, any, unsafe, asked, found 'safe'"
        "; did you mean unsafe?",
    ),
    "threshold above 1": (
        "0.9",
        "90",
        "p.yaml:8:32: categories.hate.thresholds.user.block: expected a number from 0 to 1, found 90",
    ),
    "threshold below 0": (
        "0.5",
        "-0.5",
        "p.yaml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found -0.5",
    ),
    "threshold is not a number": (
        "0.5",
        ".nan",
        "p.yaml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found nan",
    ),
    "threshold is a truth value": (
        "0.5",
        "true",
        "p.yaml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found true",
    ),
    "threshold is text": (
        "0.5",
        "50%",
        "p.yaml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found '50%'",
    ),
    "threshold is missing": (
        "{block: 1}",
        "{block: }",
        "p.yaml:9:15: categories.hate.thresholds.agent.block: expected a value, found nothing",
    ),
    "thresholds descend": (
        "0.5",
        "0.95",
        "p.yaml:8:13: categories.hate.thresholds.user: expected flag to be at most block, "
        "found flag 0.95 and block 0.9",
    ),
    "no thresholds for a role": (
        "{block: 1}",
        "{}",
        "p.yaml:9:14: categories.hate.thresholds.agent: expected at least one entry, found an empty mapping",
    ),
    "no roles": (
        "    thresholds:\n      user: {flag: 0.5, block: 0.9}\n      agent: {block: 1}\n",
        "",
        "p.yaml:4:3: categories.hate.thresholds: expected a value, found nothing",
    ),
    "nothing feeds a category": (
        "    hazards: [S10, X1]\n",
        "",
        "p.yaml:4:3: categories.hate.hazards: expected hazard codes, or `examples` or `score: unsafe` in their place, "
        "found an empty list",
    ),
    "two things feed a category": (
        "    title: Hate",
        "    title: Hate\n    score: unsafe",
        "p.yaml:7:14: categories.hate.hazards: expected no hazards beside `score: unsafe`, found a list",
    ),
    "repeated hazard": (
        "[S10, X1]",
        "[S10, S10]",
        "p.yaml:6:14: categories.hate.hazards: expected each hazard once, found S10, S10",
    ),
    "hazard without a list": (
        "[S10, X1]",
        "S10",
        "p.yaml:6:14: categories.hate.hazards: expected a list, found 'S10'",
    ),
    "list for a mapping": (
        "{user: block}",
        "[user, block]",
        "p.yaml:2:11: on_error: expected a mapping, found a list",
    ),
    "mapping for text": (
        "For tests.",
        "{for: tests}",
        "p.yaml:1:14: description: expected text, found a mapping",
    ),
    "number for text": ("For tests.", "1", "p.yaml:1:14: description: expected text, found 1"),
    "blank text": ("For tests.", "'  '", "p.yaml:1:14: description: expected text, found '  '"),
    "name of a category": (
        "  hate:",
        "  Hate Speech:",
        "p.yaml:4:3: categories.Hate Speech: expected a name of lower-case letters, digits and hyphens that starts "
        "with a letter, found 'Hate Speech'",
    ),
    "duplicate key": (
        "agent: {block: 1}",
        "user: {block: 1}",
        "p.yaml:9:7: categories.hate.thresholds.user: expected each key once, found it again",
    ),
    "key that is no text": (
        "  hate:",
        "  ? [hate]\n  :",
        "p.yaml:4:3: categories: expected categories or rules, found neither\n"
        "p.yaml:4:5: categories: expected a key of text, found a list or a mapping",
    ),
    "anchor": (
        "{flag: 0.5, block: 0.9}",
        "&base {flag: 0.5, block: 0.9}",
        "p.yaml:8:13: categories.hate.thresholds.user: expected no anchors or aliases, found base",
    ),
    "tag": (
        "{user: block}",
        "!!python/object:os.system {}",
        "p.yaml:2:11: on_error: expected no tags, found tag:yaml.org,2002:python/object:os.system",
    ),
    "more digits than a number can have": (
        "0.5",
        "9" * 5000,
        f"p.yaml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found '{'9' * 80}…'",
    ),
    "line breaks in a key": (
        "on_error:",
        '"on\\nerror":',
        f"p.yaml:2:1: on\\nerror: expected one of {TOP}, found 'on\\nerror'; did you mean on_error?",
    ),
}


@pytest.mark.parametrize(("piece", "mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_placed_and_named(tmp_path: Path, piece: str, mistake: str, message: str) -> None:
    """The message says where the mistake is, what was expected there and what was found."""
    assert piece in GOOD
    assert refusal(tmp_path / "p.yaml", GOOD.replace(piece, mistake, 1)) == message


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    """Mistakes of every kind are listed in the order of the file, none hides another."""
    content = GOOD.replace("0.5", "2").replace("[S10", "&x [S1").replace("title: Hate", "title:").replace("on_", "no_")
    assert refusal(tmp_path / "My Policy.yml", content + "description: Again.\n").splitlines() == [
        "My Policy.yml:1:1: expected a file name such as my-policy.yaml, found 'My Policy.yml'",
        f"My Policy.yml:2:1: no_error: expected one of {TOP}, found 'no_error'; did you mean on_error?",
        "My Policy.yml:5:5: categories.hate.title: expected text, found nothing",
        "My Policy.yml:6:14: categories.hate.hazards: expected no anchors or aliases, found x",
        "My Policy.yml:8:20: categories.hate.thresholds.user.flag: expected a number from 0 to 1, found 2",
        "My Policy.yml:10:1: description: expected each key once, found it again",
    ]


LAUGHS = "a: &a [ha, ha]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)

UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("# nothing\n", "p.yaml:1:1: expected a mapping, found an empty file"),
    "list": ("- a\n", "p.yaml:1:1: expected a mapping, found a list"),
    "text": ("hello", "p.yaml:1:1: expected a mapping, found 'hello'"),
    "syntax": (
        "description: Strict: no harm.\n",
        "p.yaml:1:20: not YAML: mapping values are not allowed in this context",
    ),
    "open quote": (
        "description: 'x\n",
        "p.yaml:2:1: not YAML: while scanning a quoted scalar, found unexpected end of stream",
    ),
    "two documents": (
        "a: 1\n---\nb: 1\n",
        "p.yaml:2:1: expected a single document, found another",
    ),
    "alias": (
        "description: *x\n",
        "p.yaml:1:1: categories: expected categories or rules, found neither\n"
        "p.yaml:1:14: description: expected no anchors or aliases, found x",
    ),
    "no UTF-8": (b"a: 1\nb: \xff\n", "p.yaml:2:4: expected UTF-8, found the byte 0xff"),
    "control character": ("a: 1\nb: x\x07\n", "p.yaml:2:5: expected text, found the control character U+0007"),
    "escape": (
        'a: "\\UFFFFFFFF"\n',
        "p.yaml:1:7: not YAML: while parsing a quoted scalar, found invalid Unicode character escape code",
    ),
    "half a character": (
        'a: "\\uD800"\n',
        "p.yaml:1:7: not YAML: while parsing a quoted scalar, found invalid Unicode character escape code",
    ),
    "deep flow": ("description: " + "[" * 50_000, "p.yaml:1:29: expected at most 16 levels, found more"),
    "deep block": ("- " * 30_000, "p.yaml:1:33: expected at most 16 levels, found more"),
    "large": ("#" * 100_001, "p.yaml:1:1: expected at most 100000 bytes, found more"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_policy_at_all_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    """A file that cannot be read as a small YAML mapping is refused at the place that shows it."""
    assert refusal(tmp_path / "p.yaml", content) == message


def test_a_billion_laughs_are_not_expanded(tmp_path: Path) -> None:
    """Aliases upon aliases are refused where the anchors stand, without reading what they multiply."""
    message = refusal(tmp_path / "p.yaml", LAUGHS)
    assert "p.yaml:10:4: j: expected no anchors or aliases, found j\n" in message + "\n"
    assert len(message) < 10_000


def test_a_flood_of_problems_is_cut(tmp_path: Path) -> None:
    """Of thousands of problems the first hundred are told, and how many more there are."""
    lines = refusal(tmp_path / "p.yaml", GOOD.replace("X1", "Z," * 5_000)).split("\n")
    assert len(lines) == 101
    assert lines[-1] == "p.yaml: and 4900 more"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that cannot be opened is a problem of that file."""
    with pytest.raises(PolicyError, match=r"gone\.yaml:1:1: cannot be read: No such file or directory$"):
        read_policy(tmp_path / "gone.yaml")


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A good file with some characters struck out and others put in, most of them with a meaning in YAML."""
    text = draw(st.sampled_from([GOOD, WHOLE]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        put = draw(st.text(st.sampled_from("{}[]:,&*!|>%@`'\"#?- \n\t\\<=~0.9eEx_a") | st.characters(), max_size=6))
        text = text[:start] + put + text[start + cut :]
    return text


@given(content=st.one_of(damaged(), st.text(max_size=60), st.binary(max_size=60)))
@settings(max_examples=400, deadline=None)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    """Whatever a file holds, it is a policy or a PolicyError, whose lines each name file, line and column."""
    directory = tmp_path_factory.getbasetemp()
    path = write(directory).rename(directory / "any.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    try:
        read_policy(path, CALIBRATION)
    except PolicyError as error:
        lines = str(error).split("\n")
        places = [line.removeprefix(f"{path}:").removeprefix(f"{directory}/crisis_include.yaml:") for line in lines]
        assert all(int(number) >= 1 for place in places for number in place.split(":")[:2])
