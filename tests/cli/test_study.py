"""`guard study`, from rows to what it says."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.command import guard
from tests.training.tiny import RECIPE, colours, write_base, write_rows


@pytest.mark.parametrize(
    ("study", "options", "key"),
    [("sources", ["--folds=2"], "folds"), ("depths", ["--blocks=1", "--blocks=2"], "depths")],
)
async def test_what_was_studied_is_printed(tmp_path: Path, study: str, options: list[str], key: str) -> None:
    """Progress goes to stderr with the name of each model, what was found to stdout."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"sources": {"colours": {}, "tints": {}}}))
    for name in ("colours", "tints"):
        write_rows(
            tmp_path / "data", [row | {"id": f"{name}-{row['id']}", "source": name} for row in colours(80)], name
        )
    paths = {"recipe": tmp_path / "recipe.yaml", "data": tmp_path / "data", "base": write_base(tmp_path / "base")}
    given = [f"--{name}={path}" for name, path in (paths | {"work": tmp_path / "work"}).items()]
    found = await guard("study", study, *given, *options, "--steps=10", "--no-compile")
    assert found.code == 0
    assert len(json.loads(found.out)[key]) == 2
    assert [line.split(":")[0] for line in found.err.splitlines()] == {
        "sources": ["fold-0", "fold-1"],
        "depths": ["blocks-1", "blocks-2"],
    }[study]


async def test_a_recipe_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Before anything is written."""
    paths = {name: tmp_path / name for name in ("recipe", "data", "base", "work")}
    found = await guard("study", "sources", *(f"--{name}={path}" for name, path in paths.items()))
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"error: {paths['recipe']}")
    assert found.err.count("\n") == 1
    assert not paths["work"].exists()
