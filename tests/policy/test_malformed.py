"""Hundreds of malformed policies: each is told what is wrong with it, line by line, and none is served."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.errors import PolicyError
from guard.policy.compile import compile_policy
from guard.policy.document import Document
from guard.policy.read import read_policy
from guard.policy.store import policy_files
from tests.cli.command import guard
from tests.policy.files import CALIBRATION, WHOLE, write

POLICIES = Path(__file__).parents[2] / "policies"
KEPT = 2  # entries of each section of a shipped policy
# What may be written where something else belongs: of the wrong kind, out of range, or nothing.
WRONG: tuple[Any, ...] = (
    None,
    True,
    "",
    "no such name",
    "\u202e\ud800\0",
    "9" * 5000,
    "2026-01-01",
    -1,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    ["S10", "S10", None],
    {"": ""},
    {"flag": {"max_fpr": 2, "min_recall": "x"}},
)


def shipped(path: Path) -> dict[str, Any]:
    """A policy as plain data, cut down to what is read in no time."""
    return {
        key: dict(list(value.items())[:KEPT]) if isinstance(value, dict) else value
        for key, value in json.loads(json.dumps(Document(path).data)).items()
    }


def places(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in it."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*way, key)
        yield from places(data[key], (*way, key))


def mutated(data: Any, way: tuple[Any, ...], chooser: random.Random) -> None:
    """Makes one mistake at one place: a wrong value, a wrong name, something missing, something there twice."""
    *outer, key = way
    for part in outer:
        data = data[part]
    match chooser.choice(["value", "value", "value", "name", "gone", "twice"]):
        case "value":
            data[key] = chooser.choice(WRONG)
        case "name" if isinstance(data, dict):
            data[chooser.choice([key[:-1], f"{key}s", key.upper(), f" {key}", "no_such_key"])] = data.pop(key)
        case "gone":
            del data[key]
        case _:
            data[key] = [data[key], data[key]]


def corpus(directory: Path) -> list[Path]:
    """Policies with one to three mistakes each, made of those that are shipped and of one that uses everything."""
    chooser = random.Random(0)
    seeds = [shipped(path) for path in [*policy_files(POLICIES), write(directory)]]
    (directory / "whole.yaml").unlink()
    paths = []
    for number in range(240):
        data = json.loads(json.dumps(seeds[number % len(seeds)]))
        for _ in range(chooser.randint(1, 3)):
            if found := list(places(data)):
                mutated(data, chooser.choice(found), chooser)
        paths.append(directory / f"p{number}.yaml")
        paths[-1].write_text(json.dumps(data, indent=1), encoding="utf-8")  # JSON is YAML
    return paths


def test_each_is_refused_line_by_line_or_good(tmp_path: Path) -> None:
    """Every line of an error names a file, a line and a column of it, and says what was expected or is wrong."""
    good = []
    for path in corpus(tmp_path):
        try:
            reading = read_policy(path, CALIBRATION)
        except PolicyError as error:
            for line in str(error).split("\n"):
                place = re.fullmatch(
                    rf"(?P<file>{tmp_path}/(?:{path.name}|crisis_include\.yaml)):(?P<line>\d+):\d+: (?P<said>.+)", line
                )
                assert place, line
                assert 1 <= int(place["line"]) <= len(Path(place["file"]).read_text().splitlines())
                assert re.search("expected |cannot be |not YAML: ", place["said"]), line
                assert line.isprintable()
                assert len(line) < 500
        else:
            assert compile_policy(path.stem, reading.spec, CALIBRATION).revision
            good.append(path)
    assert len(good) < 40


async def test_the_command_refuses_them_all_at_once(tmp_path: Path) -> None:
    """Each bad file is named on standard error, there is no traceback, and the exit code is 2."""
    paths = corpus(tmp_path)[:40]
    result = await guard("policy", "lint", *paths)
    lines = result.err.splitlines()
    assert result.code == 2
    assert all(re.match(rf"error: {tmp_path}/[a-z0-9_]+\.yaml:\d+:\d+: ", line) for line in lines)
    assert len({line.split(":")[1] for line in lines}) > 30


def nested(levels: int) -> str:
    return "description: Deep.\ncategories:\n" + "".join(f"{' ' * level}a:\n" for level in range(1, levels))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
# Small files that some readers of YAML spend minutes or gigabytes on; each with what it is refused for.
PATHOLOGICAL = {
    "billion laughs": (BOMB, "expected no anchors or aliases, found a"),
    "billion laughs by merge keys": (BOMB.replace("[*", "{<<: [*").replace("*]", "*]}"), "not YAML"),
    "itself": ("description: x\ncategories: &a {b: *a}\n", "expected no anchors or aliases, found a"),
    "merge key": (f"{WHOLE}<<: {{mode: shadow}}\n", "expected one of description, "),
    "deep blocks": (nested(5000)[:90_000], "expected at most 16 levels, found more"),
    "deep lists": ("description: " + "[" * 90_000, "expected at most 16 levels, found more"),
    "deep mappings": ("description: " + "{a: " * 20_000, "expected at most 16 levels, found more"),
    "many keys": ("".join(f"k{number}: 1\n" for number in range(2_000)), "expected one of description, "),
    "one key over and over": ("a: 1\n" * 4_000, "expected each key once, found it again"),
    "huge integer": (f"{WHOLE}history: {'9' * 90_000}\n", "expected each key once, found it again"),
    "huge integer alone": (f"description: x\nhistory: {'9' * 90_000}\n", "history: expected a whole number, found"),
    "huge hexadecimal": (f"description: x\nhistory: 0x{'f' * 90_000}\n", "history: expected a whole number, found"),
    "huge exponent": ("description: x\nhistory: 1e999999999\n", "history: expected a whole number, found"),
    "sexagesimal": (f"description: x\nhistory: {'59:' * 30_000}59\n", "history: expected a whole number, found"),
    "long line": (f"description: x\nmode: {'a' * 95_000}\n", "mode: expected one of enforce, shadow"),
    "long key": (f"? {'a' * 95_000}\n: 1\n", "expected one of description, "),
    "many documents": ("---\na: 1\n" * 9_000, "expected a single document, found another"),
    "many tags": ("a: !!python/object/apply:os.system [x]\n", "expected no tags, found"),
    "many directives": ("%TAG ! tag:x,2000:\n" * 2, "not YAML"),
    "long pattern": (WHOLE.replace(r"card\s*\d{4}", "((a{100}){100}){100}"), "expected a pattern of RE2"),
}


@pytest.mark.parametrize(("content", "problem"), PATHOLOGICAL.values(), ids=PATHOLOGICAL)
def test_what_is_made_to_be_slow_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    """In a hundred lines at most, before it costs anything."""
    path = write(tmp_path, content)
    with pytest.raises(PolicyError) as raised:
        read_policy(path, CALIBRATION)
    assert problem in str(raised.value)
    assert len(str(raised.value).split("\n")) <= 101
    assert len(str(raised.value)) < 100_000
