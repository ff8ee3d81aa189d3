"""`guard train`, from rows to a model that can be asked."""

import json
from pathlib import Path

import torch

from tests.cli.command import guard
from tests.training.tiny import RECIPE, colours, write_base, write_rows


async def test_what_was_trained_can_be_served(tmp_path: Path) -> None:
    """Progress goes to stderr, a summary to stdout, and `guard check` takes the directory as its model."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    data, base = write_rows(tmp_path / "data", colours(120)), write_base(tmp_path / "base")
    paths = {"data": data, "base": base, "work": tmp_path / "work", "out": tmp_path / "out"}
    options = [f"--{name}={path}" for name, path in (paths | {"recipe": tmp_path / "recipe.yaml"}).items()]
    trained = await guard("train", *options, "--steps=40", "--name=colours", "--no-compile", OMP_NUM_THREADS="1")
    assert trained.code == 0
    assert trained.err.splitlines()[-1].startswith("step 40 of 40, loss ")
    assert json.loads(trained.out)["auroc"] > 0.9

    answers = [
        await guard("check", "--json", "--model", paths["out"], text, OMP_NUM_THREADS="1")
        for text in ("red 7", "blue 8")
    ]
    red, blue = (json.loads(answer.out) for answer in answers)
    assert red["provenance"]["model"] == "colours"
    assert red["verdict"]["scores"]["unsafe"] > blue["verdict"]["scores"]["unsafe"]


async def test_data_that_are_not_there_are_an_error_of_one_line(tmp_path: Path) -> None:
    """Nothing is written before everything needed was found."""
    paths = {name: tmp_path / name for name in ("data", "base", "work", "out")}
    result = await guard("train", *(f"--{name}={path}" for name, path in paths.items()), "--steps=1")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {paths['data']}")
    assert result.err.count("\n") == 1
    assert not paths["work"].exists()
