"""The JSON Schema of policies: as shipped it is fresh, and it takes what Guard takes."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from guard.policy.document import Document
from guard.policy.schema import json_schema
from guard.policy.store import policy_files
from tests.policy.files import WHOLE

POLICIES = Path(__file__).parents[2] / "policies"
VALIDATOR = Draft202012Validator(json.loads(json_schema()))


def plain(path: Path) -> Any:
    """As JSON has it: lists are no tuples."""
    return json.loads(json.dumps(Document(path).data))


def test_the_shipped_schema_is_fresh() -> None:
    """`guard policy schema > policies/policy.schema.json` writes it anew."""
    assert (POLICIES / "policy.schema.json").read_text(encoding="utf-8") == json_schema()
    Draft202012Validator.check_schema(json.loads(json_schema()))


@pytest.mark.parametrize("path", policy_files(POLICIES), ids=lambda path: path.name)
def test_shipped_policies_name_the_schema_and_keep_to_it(path: Path) -> None:
    """Their first line is where editors look for it."""
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=policy.schema.json\n")
    VALIDATOR.validate(plain(path))


@pytest.mark.parametrize(
    ("piece", "mistake"),
    [
        ("description:", "descripton:"),
        ("{app: kids}", "{}"),
        ("{max_fpr: 0.03}", "{max_fpr: 2}"),
        ("{max_fpr: 0.03}", "{fpr: 0.1}"),
        ("action: block", "action: blok"),
        ("S10, X1", "S10, S15"),
        ("user: {flag: 0.5", "usr: {flag: 0.5"),
        ("block: 0.9", "block: 9"),
    ],
)
def test_the_schema_takes_the_language_and_no_mistake(tmp_path: Path, piece: str, mistake: str) -> None:
    """All of the language is valid, and what is misspelled or out of range is not."""
    path = tmp_path / "whole.yaml"
    path.write_text(WHOLE)
    VALIDATOR.validate(plain(path))
    assert piece in WHOLE
    path.write_text(WHOLE.replace(piece, mistake, 1))
    assert not VALIDATOR.is_valid(plain(path))


@pytest.mark.parametrize(
    ("piece", "mistake"),
    [
        ("long_input: window", "long_input: windows"),
        ("examples: own.csv", "examples: ../own.csv"),
        ("examples: own.csv", "examples: own.xlsx"),
        ("examples: own.csv", "examples: "),
    ],
)
def test_the_schema_takes_what_one_is_taught(tmp_path: Path, piece: str, mistake: str) -> None:
    """A category with examples, and the two ways to read what is long."""
    own = "description: D\nlong_input: window\ncategories:\n  own:\n    title: Own\n    examples: own.csv\n"
    own += "    thresholds: {user: {block: 0.5}}\n"
    path = tmp_path / "own.yaml"
    path.write_text(own)
    VALIDATOR.validate(plain(path))
    path.write_text(own.replace(piece, mistake))
    assert not VALIDATOR.is_valid(plain(path))
