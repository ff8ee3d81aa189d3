"""A category of one's own: on a model of random weights, and with the embedded one where it counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard.engine.moderator import Moderator
from guard.errors import ConfigError
from guard.model.checkpoint import amend_checkpoint, load_tensors, read_checkpoint
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.training.data import Example
from guard.training.formats import read_examples
from guard.training.head import add_category
from guard.types import Action, Conversation, Role, Scores, Turn, Violation
from tests.training.untrained import write_model

COMPETITORS = Path(__file__).parent / "competitors.csv"
POLICY = """\
description: For a shop that speaks of its own products alone.
categories:
  rivals:
    title: Competitors' products
    hazards: [competitors]
    thresholds: {user: {block: 0.5}}
"""
RIVALS = "Is the Aurix tablet any better than the one that you make?"
ORDER = "My order came without the charging cable."


def example(text: str, belongs: bool) -> Example:
    return Example(text, "mine", "und", Conversation((Turn(Role.USER, text),), 0), belongs, None)


def fruit(belong: int, others: int) -> list[Example]:
    return [
        *(example(f"apple {n}", True) for n in range(belong)),
        *(example(f"{n} nuts", False) for n in range(others)),
    ]


def score(model: TurnClassifier, examples: list[Example]) -> list[Scores]:
    tokens = [model.tokenise(example.conversation)[0] for example in examples]
    return [scores for (scores,) in model.score(tokens)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.mark.parametrize(("belong", "others"), [(40, 40), (30, 90)])
def test_the_new_score_is_a_probability(base: Path, tmp_path: Path, belong: int, others: int) -> None:
    """Over the rows that it was fitted on it is as high in the mean as they are often of the category."""
    rows = fruit(belong, others)
    found = add_category(base, rows, "fruit", tmp_path / "out", "taught")
    assert (found["rows"], found["positives"]) == (belong + others, belong)
    model = TurnClassifier(tmp_path / "out", "cpu", "float32")
    assert (model.info.revision.name, model.info.hazards[-1]) == ("taught", "fruit")
    scores = np.array([scores.hazards["fruit"] for scores in score(model, rows)])
    assert scores.mean() == pytest.approx(belong / (belong + others), abs=1e-3)
    assert scores[:belong].mean() > scores[belong:].mean() + 0.2


def test_nothing_else_of_a_model_changes(base: Path, tmp_path: Path) -> None:
    """Weights, measurements and calibration are those of the base, its other scores too; a second category goes on."""
    amend_checkpoint(base, int8=True, documents={"evaluation.json": "{}"})
    rows = fruit(25, 30)
    add_category(base, rows, "fruit", tmp_path / "one", None)
    opposite = [replace(row, unsafe=not row.unsafe) for row in rows]
    add_category(tmp_path / "one", opposite, "nuts", tmp_path / "two", None)

    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "two")
    assert after.hazards == (*before.hazards, "fruit", "nuts")
    for role, fits in before.calibration.items():
        assert after.calibration[role] == {**fits, "fruit": (1.0, 0.0), "nuts": (1.0, 0.0)}
    assert (after.name, after.max_tokens, after.int8, after.config) == (before.name, 64, True, before.config)
    assert (tmp_path / "two/evaluation.json").read_text() == "{}"
    old, new = (load_tensors(path, torch.int8) for path in (base, tmp_path / "two"))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name][: len(tensor)], tensor) for name, tensor in old.items())
    assert {name for name in old if len(new[name]) > len(old[name])} == {"score.weight", "score.bias"}

    theirs, ours = (score(TurnClassifier(path, "cpu", "float32"), rows) for path in (base, tmp_path / "two"))
    for own, other in zip(ours, theirs, strict=True):
        assert own.unsafe == other.unsafe
        assert {code: own.hazards[code] for code in other.hazards} == other.hazards
        assert own.hazards["fruit"] == pytest.approx(1 - own.hazards["nuts"], abs=1e-3)


@pytest.mark.parametrize("category", ["Fruit", "S15", "unsafe", "fruit salad", "fruit\n", ""])
def test_a_name_that_no_policy_could_list_is_refused(base: Path, tmp_path: Path, category: str) -> None:
    """Before anything is read or written."""
    with pytest.raises(ConfigError, match=r"^category '.*': expected lower-case letters, digits and hyphens, and not"):
        add_category(base, fruit(30, 30), category, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (fruit(19, 50), "19 of the category and 50 others"),
        (fruit(0, 200), "0 of the category and 200 others"),
        (fruit(200, 0), "200 of the category and 0 others"),
        (fruit(10, 40) * 4, "10 of the category and 40 others"),
        ([], "0 of the category and 0 others"),
    ],
)
def test_too_few_rows_are_refused(base: Path, tmp_path: Path, rows: list[Example], found: str) -> None:
    """Rows that are repeated count once."""
    with pytest.raises(
        ConfigError, match=f"^fruit: expected at least 20 different rows of either label, found {found}$"
    ):
        add_category(base, rows, "fruit", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_neither_a_category_nor_a_model_is_overwritten(base: Path, tmp_path: Path) -> None:
    """A name is taken once, and the base is left as it is."""
    add_category(base, fruit(20, 20), "fruit", tmp_path / "out", None)
    with pytest.raises(ConfigError, match=r"out: scores fruit already$"):
        add_category(tmp_path / "out", fruit(20, 20), "fruit", tmp_path / "again", None)
    with pytest.raises(ConfigError, match=r"base: is the model to start from$"):
        add_category(base, fruit(20, 20), "fruit", base / "../base", None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The embedded model with the category of tests/training/competitors.csv, and what was measured of that."""
    out = tmp_path_factory.mktemp("taught")
    return out, add_category(Settings().model, read_examples(COMPETITORS), "competitors", out, None)


@contextmanager
def moderator(model: Path, policies: Path) -> Iterator[Moderator]:
    settings = Settings(model=model, policies=policies, device="cpu", max_batch_tokens=64, max_queue_seconds=3600)
    made = Moderator.load(settings, Telemetry.start("critical"))
    try:
        yield made
    finally:
        made.close()


def test_a_topic_is_learned_from_240_rows(taught: tuple[Path, dict[str, Any]]) -> None:
    """Of rows that were held out, those about competitors' products come first."""
    _, found = taught
    assert (found["rows"], found["positives"]) == (240, 120)
    assert found["auprc"] > 0.9
    low, high = found["intervals"]["auprc"]
    assert 0.85 < low < found["auprc"] < high <= 1


async def test_a_policy_blocks_by_it(taught: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It is served like any other score."""
    (tmp_path / "default.yaml").write_text(POLICY)
    with moderator(taught[0], tmp_path) as made:
        blocked, passed = [
            (await made.judge(Conversation((Turn(Role.USER, text),), 0))).verdicts[0] for text in (RIVALS, ORDER)
        ]
    assert (blocked.action, passed.action) == (Action.BLOCK, Action.ALLOW)
    assert blocked.scores
    assert blocked.violations == (Violation("rivals", Action.BLOCK, blocked.scores.hazards["competitors"], 0.5),)


def test_a_model_without_it_refuses_the_policy(tmp_path: Path) -> None:
    """Before anything is served, by name."""
    (tmp_path / "default.yaml").write_text(POLICY)
    with (
        pytest.raises(ConfigError, match=r"^policy default: .* does not score competitors$"),
        moderator(Settings().model, tmp_path),
    ):
        pass


def test_the_embedded_models_own_scores_stay(taught: tuple[Path, dict[str, Any]], classifier: TurnClassifier) -> None:
    """To the bit, also in a batch of many."""
    rows = read_examples(COMPETITORS)[:20]
    for own, other in zip(
        score(TurnClassifier(taught[0], "cpu", "float32"), rows), score(classifier, rows), strict=True
    ):
        assert own.unsafe == other.unsafe
        assert {code: own.hazards[code] for code in other.hazards} == other.hazards
