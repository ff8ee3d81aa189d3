"""Models by variations of a recipe: each row is scored by one that has not seen its source, and depths are compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.training.data import Example, load_examples, read_recipe
from guard.training.finetune import Progress
from guard.training.studies import compare_depths, leave_out, split
from guard.types import Conversation, Role, Turn
from tests.training.tiny import RECIPE, colours, write_base, write_rows

SOURCES = ("colours", "tints", "liars")
RUNS: dict[str, Any] = {"steps": 30, "compiled": False}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Sources that agree, and one that says the opposite of both."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"sources": {name: {} for name in SOURCES}}))
    for name in SOURCES:
        rows = [row | {"id": f"{name}-{row['id']}", "source": name} for row in colours(60)]
        if name == "liars":
            rows = [row | {"unsafe": 1 - row["unsafe"], "categories": []} for row in rows]
        write_rows(tmp_path / "data", rows, name)
    write_base(tmp_path / "base")
    return tmp_path


def paths(here: Path) -> tuple[Path, Path, Path, Path]:
    return here / "recipe.yaml", here / "data", here / "base", here / "work"


def test_rows_are_scored_by_models_that_have_not_seen_their_source(here: Path) -> None:
    """What another source learned is told right; what only the source itself knows is told wrong."""
    found = leave_out(*paths(here), folds=3, **RUNS)
    assert sorted(found["folds"]) == [["colours"], ["liars"], ["tints"]]
    assert found["steps"] == 30
    held_out = load_examples(read_recipe(here / "recipe.yaml"), here / "data", "validation")
    assert found["unsafe"]["rows"] == len(held_out)
    assert found["by_source"]["liars"]["auroc"] < 0.2
    for fold in range(3):
        recipe = read_recipe(here / "work" / f"fold-{fold}" / "recipe.yaml")
        assert set(recipe.sources) == set(SOURCES) - set(found["folds"][fold])


def test_a_study_goes_on_where_it_was_stopped(here: Path) -> None:
    """What is trained is not trained again, unless the recipe is another."""
    trained: list[str] = []

    def report(name: str, progress: Progress) -> None:
        trained.append(name)

    first = leave_out(*paths(here), folds=3, report=report, **RUNS)
    assert set(trained) == {"fold-0", "fold-1", "fold-2"}
    (here / "work/fold-1/scores.safetensors").unlink()
    trained.clear()
    assert leave_out(*paths(here), folds=3, report=report, **RUNS) == first
    assert set(trained) <= {"fold-1"}


def test_a_study_does_not_go_on_from_another_base(here: Path) -> None:
    """A base that could not be read leaves nothing behind; one that was trained is not taken for the other."""
    recipe, data, base, work = paths(here)
    with pytest.raises(ConfigError):
        leave_out(recipe, data, here / "nowhere", work, folds=3, **RUNS)
    first = leave_out(recipe, data, base, work, folds=3, **RUNS)
    with pytest.raises(ConfigError, match="another recipe, base or data"):
        leave_out(recipe, data, write_base(here / "other"), work, folds=3, **RUNS)
    assert leave_out(recipe, data, base, work, folds=3, **RUNS) == first


def test_depths_are_compared(here: Path) -> None:
    """The shallower model is the smaller one."""
    found = compare_depths(*paths(here), blocks=[1, 2], **RUNS)
    shallow, deep = found["depths"]
    assert (shallow["blocks"], deep["blocks"]) == (1, 2)
    assert shallow["bytes"] < deep["bytes"]
    assert min(shallow["ms"], deep["ms"]) > 0
    assert "int8" in deep["computed"]
    assert shallow["unsafe"]["rows"] == deep["unsafe"]["rows"]


def test_a_base_that_is_too_shallow_is_refused(here: Path) -> None:
    """It says which tensor there is not."""
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.2\."):
        compare_depths(*paths(here), blocks=[3], **RUNS)


def example(source: str, unsafe: bool) -> Example:
    return Example("", source, "en", Conversation((Turn(Role.USER, ""),), 0), unsafe, None)


@given(st.dictionaries(st.text(max_size=2), st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2), st.data())
def test_folds_share_out_what_is_unsafe(rows: dict[str, tuple[int, int]], data: st.DataObject) -> None:
    """Every source is in one fold; no fold has more unsafe rows than another and the largest of its own sources."""
    folds = data.draw(st.integers(2, len(rows)))
    examples = [
        example(name, kind) for name, (unsafe, safe) in rows.items() for kind in [True] * unsafe + [False] * safe
    ]
    parts = split(examples, folds)
    assert sorted(name for part in parts for name in part) == sorted(rows)
    assert len(parts) == folds
    assert all(parts)
    sums = [sum(rows[name][0] for name in part) for part in parts]
    for part, own in zip(parts, sums, strict=True):
        assert own - max(rows[name][0] for name in part) <= min(sums)


def test_there_is_a_source_for_each_fold() -> None:
    """Otherwise it says how many there are."""
    with pytest.raises(ConfigError, match="3 folds of 2 sources"):
        split([example("a", True), example("b", False)], 3)
