import json
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.errors import ConfigError
from guard.training.data import load_examples, read_recipe
from guard.training.distill import taught
from guard.training.evaluate import HEADS
from guard.training.pipeline import release, score, train
from tests.training.tiny import RECIPE, colours, recipe, row, write_base, write_rows
from tests.training.untrained import write_model


def test_teachers_say_what_rows_without_a_label_are(tmp_path: Path) -> None:
    """The mean of what each of them serves; labelled rows keep their word unless the recipe doubts it."""
    data = write_rows(tmp_path / "data", [*colours(8), *(row(n, f"grey {n}", None) for n in range(50, 60))])
    plan = recipe(validation=0.0, sources={"colours": {"unlabelled": 4}})
    examples = load_examples(plan, data, "train")
    teachers = [write_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    found = taught(examples, teachers, tmp_path / "kept")
    asked = [example for example in found if example.teacher is not None]
    assert len(found) == 12
    assert len(asked) == 4
    assert all("grey" in example.conversation.turns[0].text for example in asked)
    expected = np.mean([score(teacher, asked) for teacher in teachers], axis=0)
    assert np.array([example.teacher for example in asked]) == pytest.approx(expected, abs=1e-6)
    assert np.array([example.targets for example in asked]) == pytest.approx(expected, abs=1e-6)
    assert [example for example in found if example.teacher is None] == [e for e in examples if not e.taught]


def test_a_doubted_label_meets_its_teacher_part_of_the_way(tmp_path: Path) -> None:
    """Of a kind of harm that no label names, the teacher says all."""
    rows = [row(1, "red", 1, categories=["S1"]), row(2, "crimson", 1)]
    plan = recipe(validation=0.0, sources={"colours": {"taught": 0.25}})
    examples = load_examples(plan, write_rows(tmp_path / "data", rows), "train")
    known, unknown = sorted(
        taught(examples, [write_model(tmp_path / "teacher")], tmp_path / "kept"), key=lambda example: example.id
    )
    assert known.teacher is not None
    assert unknown.teacher is not None
    assert known.targets == pytest.approx(
        [label + 0.25 * (said - label) for label, said in zip(known.labels, known.teacher, strict=True)]
    )
    assert unknown.targets == pytest.approx([1 + 0.25 * (unknown.teacher[0] - 1), *unknown.teacher[1:]])


def test_teachers_are_asked_once(tmp_path: Path) -> None:
    """What they said is kept for a run that goes on, and for no other rows."""
    plan = recipe(validation=0.0, sources={"colours": {"taught": 0.5}})
    examples = load_examples(plan, write_rows(tmp_path / "data", colours(6)), "train")
    teacher, kept = write_model(tmp_path / "teacher"), tmp_path / "kept"
    found = taught(examples, [teacher], kept)
    when = kept.stat().st_mtime_ns
    assert taught(examples, [teacher], kept) == found
    assert kept.stat().st_mtime_ns == when
    assert taught(examples[:3], [teacher], kept) == found[:3]
    assert kept.stat().st_mtime_ns > when


def test_without_a_teacher_such_a_recipe_is_refused(tmp_path: Path) -> None:
    """It says how many rows are for one, and how to name it."""
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"sources": {"colours": {"unlabelled": 3}}}))
    write_rows(tmp_path / "data", [*colours(8), row(50, "grey", None)])
    with pytest.raises(ConfigError, match=r"1 rows of the recipe are for a teacher to label: .*--teacher"):
        train(tmp_path / "recipe.yaml", tmp_path / "data", write_base(tmp_path / "base"), tmp_path / "out")


def test_a_student_learns_from_its_teacher_alone(tmp_path: Path) -> None:
    """On rows without any label it comes to tell those with one apart."""
    torch.manual_seed(1)
    unlabelled = [record | {"id": f"u-{record['id']}", "unsafe": None, "categories": []} for record in colours(120)]
    for record in unlabelled:
        record["turns"][0]["content"] += " again"
    data = write_rows(tmp_path / "data", [*colours(120), *unlabelled])
    base = write_base(tmp_path / "base")
    recipes = {"teacher": {}, "student": {"safe": 0, "unsafe": 0, "unlabelled": 120}}
    for name, source in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(RECIPE | {"sources": {"colours": source}}))
    train(tmp_path / "teacher.yaml", data, base, tmp_path / "work", compiled=False)
    release(tmp_path / "teacher.yaml", data, tmp_path / "work", tmp_path / "teacher", name="teacher")
    train(tmp_path / "student.yaml", data, base, tmp_path / "learned", teachers=[tmp_path / "teacher"], compiled=False)
    released = release(tmp_path / "student.yaml", data, tmp_path / "learned", tmp_path / "student", name="student")
    assert released["held_out"]["unsafe"]["auroc"] > 0.95
    held_out = load_examples(read_recipe(tmp_path / "student.yaml"), data, "validation")
    assert score(tmp_path / "student", held_out).shape == (len(held_out), len(HEADS))
