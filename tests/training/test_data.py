from pathlib import Path
from typing import Any

import pytest

from guard.errors import ConfigError
from guard.training.data import load_benchmarks, load_examples, read_recipe, repeated
from guard.types import HAZARDS, Role
from tests.training.tiny import colours, recipe, row, write_rows


def test_groups_never_straddle_the_splits(tmp_path: Path) -> None:
    """Rows that open with the same turn, or share the keys a source names, are all trained on or all held out."""
    pairs = [row(n, f"question {n // 2}", source_labels={"pair": n // 4}) for n in range(200)]
    data = write_rows(tmp_path, pairs)
    for source, size in (({}, 2), ({"group": ["pair"]}, 4)):
        plan = recipe(sources={"colours": source}, validation_rows=200)
        train, held_out = (
            {int(e.id[8:]) for e in load_examples(plan, data, split)} for split in ("train", "validation")
        )
        assert train | held_out == set(range(200))
        assert not {n // size for n in train} & {n // size for n in held_out}
        assert 20 <= len(held_out) <= 80  # about a quarter


def test_caps_weights_and_repeats(tmp_path: Path) -> None:
    """A source gives at most the rows its recipe says, of each label and the wanted role, weighted and repeated so."""
    replies = [row(n, "hi", turns=[{"role": r, "content": f"{n}"} for r in ("user", "agent")]) for n in range(200, 230)]
    data = write_rows(tmp_path, colours(200) + replies)
    source = {"safe": 7, "unsafe": 3, "repeat": 4, "weight": 0.5, "target": "user"}
    plan = recipe(sources={"colours": source}, validation_rows=2)
    examples = load_examples(plan, data, "train")
    assert sorted(example.unsafe for example in examples) == [False] * 7 + [True] * 3
    assert {(example.weight, example.role) for example in examples} == {(0.5, Role.USER)}
    assert examples == load_examples(plan, data, "train")
    assert len(repeated(plan, examples)) == 40
    assert sorted(example.unsafe for example in load_examples(plan, data, "validation")) == [False] * 2 + [True] * 2


def test_what_a_label_says_of_the_hazards(tmp_path: Path) -> None:
    """A safe row has no hazard, an unsafe one those it names or unknown ones, and a row without label is not used."""
    rows = [row(0, "a"), row(1, "b", 1, categories=["S1", "X3"]), row(2, "c", 1), row(3, "d", None)]
    found = {
        example.id: example for example in load_examples(recipe(validation=0), write_rows(tmp_path, rows), "train")
    }
    assert {id: example.hazards for id, example in found.items()} == {
        "colours-0": frozenset(),
        "colours-1": {"S1", "X3"},
        "colours-2": None,
    }
    assert found["colours-1"].labels == (True, *(code in ("S1", "X3") for code in HAZARDS))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"categories": ["S99"]}, "categories"),
        ({"turns": []}, "turns"),
        ({"turns": [{"role": "robot", "content": "secret"}]}, "turns.0.role"),
        ({"unsafe": 2}, "unsafe"),
    ],
)
def test_a_wrong_record_is_named_and_not_quoted(tmp_path: Path, change: dict[str, Any], place: str) -> None:
    """A record that cannot be read is reported by file, line and key, without its text."""
    data = write_rows(tmp_path, [row(0, "secret"), row(1, "secret") | change])
    with pytest.raises(ConfigError, match=rf"colours\.jsonl\.gz:2: {place}") as caught:
        load_examples(recipe(), data, "train")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "line 1, column 8"),
        ("seed: 1\nsources: {a: {weigth: 2}}", "sources.a.weigth: Extra inputs"),
        ("- 1", "valid dictionary"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    """A recipe that is no YAML, or has a key nobody knows, is refused with its file and the place."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_the_embedded_models_recipe_is_valid() -> None:
    """The recipe beside the embedded model names no restricted source and reads without complaint."""
    plan = read_recipe(Path(__file__).parents[2] / "guard/model/default/recipe.yaml")
    assert plan.sources
    assert not any("/" in name for name in plan.sources)


def test_a_source_is_called_what_its_file_is(tmp_path: Path) -> None:
    """Whatever its rows say, as several files may come of one tool."""
    plan = recipe(sources={"shades": {"repeat": 2}}, validation=0.0)
    rows = load_examples(plan, write_rows(tmp_path, colours(10), "shades"), "train")
    assert {row.source for row in rows} == {"shades"}
    assert len(repeated(plan, rows)) == 20


def test_a_harmless_row_is_of_no_hazard(tmp_path: Path) -> None:
    """Categories of one say what it only looks like."""
    write_rows(tmp_path, [row(0, "red wine", 0, categories=["S2"])])
    (found,) = load_examples(recipe(validation=0.0), tmp_path, "train")
    assert not any(found.labels)
    assert found.hazards is not None


def test_benchmarks_are_files_that_are_there(tmp_path: Path) -> None:
    """A folder without any is a mistake; names may have dots."""
    with pytest.raises(ConfigError, match=r"holds no \.jsonl"):
        load_benchmarks(tmp_path / "nothing", 5)
    write_rows(tmp_path, colours(10), "colours.v1")
    assert {name: len(rows) for name, rows in load_benchmarks(tmp_path, 5).items()} == {"colours.v1": 5}


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    """A recipe that names a file which is not there is refused."""
    with pytest.raises(ConfigError, match="colours"):
        load_examples(recipe(), tmp_path, "train")
