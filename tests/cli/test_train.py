"""`guard train`, from rows to a model that can be asked."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.command import guard
from tests.model.llama_guards import Shape
from tests.training.tiny import RECIPE, colours, write_base, write_rows
from tests.training.untrained import write_model


async def test_what_was_trained_can_be_served(tmp_path: Path) -> None:
    """Progress goes to stderr, a summary to stdout, and `guard check` takes the directory as its model."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    data, base = write_rows(tmp_path / "data", colours(120)), write_base(tmp_path / "base")
    write_rows(tmp_path / "unseen", colours(40), "tints")
    write_rows(tmp_path / "unseen", colours(24)[1::2], "reds")
    paths = {"data": data, "base": base, "work": tmp_path / "work", "out": tmp_path / "out"}
    paths |= {"benchmarks": tmp_path / "unseen"}
    options = [f"--{name}={path}" for name, path in (paths | {"recipe": tmp_path / "recipe.yaml"}).items()]
    trained = await guard("train", *options, "--steps=40", "--name=colours", "--no-compile")
    assert trained.code == 0
    assert trained.err.splitlines()[-1].startswith("step 40 of 40, loss ")
    assert json.loads(trained.out)["auroc"] > 0.9
    card = (tmp_path / "out/README.md").read_text()
    assert "| tints | 40 | 20 |" in card
    assert "| reds | 12 | 12 |" in card

    answers = [await guard("check", "--json", "--model", paths["out"], text) for text in ("red 7", "blue 8")]
    red, blue = (json.loads(answer.out) for answer in answers)
    assert red["provenance"]["model"] == "colours"
    assert red["verdict"]["scores"]["unsafe"] > blue["verdict"]["scores"]["unsafe"]


async def test_several_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Under torchrun each computes a share of every step, and the first writes the model."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    data, base = write_rows(tmp_path / "data", colours(120)), write_base(tmp_path / "base")

    def train(work: Path) -> tuple[str, ...]:
        paths = {"recipe": tmp_path / "recipe.yaml", "data": data, "base": base, "work": work, "out": f"{work}-out"}
        return ("train", *(f"--{name}={path}" for name, path in paths.items()), "--steps=8", "--no-compile")

    assert (await guard(*train(tmp_path / "one"))).code == 0
    torchrun = ("torchrun", "--standalone", "--no-python", "--nproc-per-node=2", "guard")
    scripts = Path(sys.executable).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{scripts}:{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(*torchrun, *train(tmp_path / "two"), env=environment)
    assert await process.wait() == 0
    assert (tmp_path / "two-out/guard.json").is_file()
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 1
    alone, together = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-4)


async def test_data_that_are_not_there_are_an_error_of_one_line(tmp_path: Path) -> None:
    """Nothing is written before everything needed was found."""
    paths = {name: tmp_path / name for name in ("data", "base", "work", "out")}
    result = await guard("train", *(f"--{name}={path}" for name, path in paths.items()), "--steps=1")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {paths['data']}")
    assert result.err.count("\n") == 1
    assert not paths["work"].exists()


async def test_a_category_that_was_added_is_scored(tmp_path: Path) -> None:
    """From a table of rows; what was measured of it goes to stdout, and `guard check` gives its score."""
    model, rows, out = write_model(tmp_path / "model"), tmp_path / "rows.csv", tmp_path / "out"
    lines = [f"{text} {n},{label}" for n in range(25) for text, label in (("apple", 1), ("nuts", 0))]
    rows.write_text("text,label\n" + "\n".join(lines) + "\n")
    options = (f"--from={model}", "--head-only", "--category=fruit", f"--data={rows}", f"--out={out}", "--name=taught")
    trained = await guard("train", *options)
    assert (trained.code, trained.err) == (0, "")
    found = json.loads(trained.out)
    low, high = found["intervals"]["auprc"]
    assert (found["rows"], found["positives"]) == (50, 25)
    assert low <= found["auprc"] <= high

    answer = json.loads((await guard("check", "--json", "--model", out, "apple 7")).out)
    assert answer["provenance"]["model"] == "taught"
    assert list(answer["verdict"]["scores"]["hazards"])[-1] == "fruit"


async def test_a_llama_guard_is_fine_tuned(tmp_path: Path, llama_guards: Mapping[Shape, Path]) -> None:
    """What comes of it is a checkpoint as its base is, which can be served; the run may be asked for again."""
    base, rows, out = llama_guards["1b"], tmp_path / "rows.csv", tmp_path / "out"
    rows.write_text("text,label,categories\nHow do I bake bread?,0,\nI will kill him.,1,S1 X1\n")
    options = ("--lora", f"--base={base}", f"--data={rows}", f"--out={out}", f"--work={tmp_path / 'work'}", "--steps=2")
    trained = await guard("train", *options, "--rank=4")
    assert trained.code == 0
    assert trained.err.startswith("step 2 of 2, loss ")
    found = json.loads(trained.out)
    assert (found["rows"], found["unsafe"], found["steps"]) == (2, 1, 2)
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()}
    for file in (file for file in base.iterdir() if file.suffix != ".safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    answer = json.loads((await guard("check", "--json", "--model", out, "--", "I will kill him.")).out)
    assert answer["provenance"]["model"] == "out"

    again = await guard("train", *options, "--rank=4")
    assert (again.code, again.err, json.loads(again.out)["loss"]) == (0, "", None)
    other = await guard("train", *options, "--rank=8")
    problem = "is of a run by another recipe or on other rows"
    assert (other.code, other.err) == (2, f"error: {tmp_path / 'work/lora.safetensors'}: {problem}\n")


NEEDED = "needs --base and --work, --lora with --base, or --head-only with --from and --category"
WHOLE, ADDED = ("--base=b", "--work=w"), ("--head-only", "--from=default", "--category=fruit")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), NEEDED),
        (("--work=w",), NEEDED),
        (ADDED[:2], NEEDED),
        ((*WHOLE, *ADDED[1:]), "--from, --category: not without --head-only"),
        ((*WHOLE, "--steps=1", "--no-compile", *ADDED), "--base, --work, --steps, --no-compile: not with --head-only"),
        (ADDED, "none.csv: cannot be read: FileNotFoundError"),
        (("--lora", "--base=b", "--work=w"), "none.csv: cannot be read: FileNotFoundError"),
        (("--lora", "--steps=1"), "--lora needs --base"),
        (("--lora", *WHOLE, *ADDED), "--head-only, --from, --category: not with --lora"),
        (("--lora", "--recipe=r", "--no-compile", "--name=n"), "--recipe, --no-compile, --name: not with --lora"),
        ((*WHOLE, "--rank=4", "--learning-rate=0.1"), "--rank, --learning-rate: not without --lora"),
        ((*ADDED, "--rank=4"), "--rank: not without --lora"),
    ],
)
async def test_options_that_do_not_go_together_are_an_error_of_one_line(options: tuple[str, ...], problem: str) -> None:
    """None is passed over in silence."""
    result = await guard("train", "--data=none.csv", "--out=out", *options)
    assert (result.code, result.out, result.err) == (2, "", f"error: {problem}\n")
