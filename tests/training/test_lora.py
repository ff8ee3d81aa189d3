"""LoRA on small Llama Guard checkpoints: what is learned, and that it goes into the weights alone."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from guard.errors import ConfigError
from guard.training.base import load_language_model
from guard.training.data import Example
from guard.training.finetune import Progress
from guard.training.lora import Plan, drawn, read_rows, train
from guard.training.pipeline import score
from guard.types import Conversation, Role, Turn
from tests.model.llama_guards import Shape
from tests.training.untrained import write_model

WORDS = ("is", "it", "a", "the", "what", "of", "tell", "me")
PLAN = Plan(steps=6, rank=4, learning_rate=0.005, rows=4, save_every=2, report_every=1)


def example(text: str, unsafe: bool, hazards: frozenset[str] | None = frozenset()) -> Example:
    return Example(text, "s", "en", Conversation((Turn(Role.USER, text),), 0), unsafe, hazards)


def secrets(count: int, seed: int) -> list[Example]:
    """Rows of which those with a certain word are unsafe, by turns of S7 and of no known hazard."""
    rng, rows = random.Random(seed), []
    for n in range(count):
        words = [*rng.choices(WORDS, k=6), "Secrets" if n % 2 else "bread"]
        rng.shuffle(words)
        kind = frozenset({"S7"}) if n % 4 == 1 else None
        rows.append(example(" ".join(words), n % 2 == 1, kind if n % 2 else frozenset()))
    return rows


def test_a_rule_is_learned(tmp_path: Path, llama_guards: Mapping[Shape, Path]) -> None:
    """Of rows that were not seen, those of the rule become more likely unsafe, of its category, and the others less."""
    base, unseen = llama_guards["8b"], secrets(20, seed=2)
    said = list[Progress]()
    train(base, secrets(40, seed=1), tmp_path / "out", Plan(30, 8, 0.005, 8, report_every=15), report=said.append)
    assert [(progress.step, progress.steps) for progress in said] == [(15, 30), (30, 30)]
    assert said[-1].loss < said[0].loss
    before, after = (score(path, unseen, "float32") for path in (base, tmp_path / "out"))
    unsafe = np.array([row.unsafe for row in unseen])
    assert after[unsafe, 0].mean() > max(0.8, before[unsafe, 0].mean())
    assert after[~unsafe, 0].mean() < min(0.2, before[~unsafe, 0].mean())
    assert after[unsafe, 7].mean() > 0.5


@pytest.mark.parametrize(("shape", "lead"), [("1b", "\n\n"), ("8b", "")])
def test_answers_are_worded_as_the_checkpoint_words_them(
    llama_guards: Mapping[Shape, Path], shape: Shape, lead: str
) -> None:
    """Codes stand in its order; where it knows none of them, there is nothing to learn after `unsafe`."""
    path = llama_guards[shape]
    kinds = (frozenset({"S10", "X1", "S2"}), frozenset({"X1"}), None)
    rows = [example("bread", False), *(example("poison", True, kind) for kind in kinds)]
    read = read_rows(path, load_language_model(path, torch.float32), rows)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    answers = [tokenizer.decode(row.ids[-row.answer :], skip_special_tokens=False) for row in read]
    assert answers == [
        f"{lead}safe<|eot_id|>", f"{lead}unsafe\nS2,S10<|eot_id|>", f"{lead}unsafe", f"{lead}unsafe",
    ]  # fmt: skip


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, llama_guards: Mapping[Shape, Path]) -> None:
    """It comes to what one does that was not; files of bfloat16 stay so, and what is not trained stays as it was."""
    base = tmp_path / "base"
    shutil.copytree(llama_guards["8b"], base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    rows = secrets(10, seed=1)
    train(base, rows, tmp_path / "whole", PLAN)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, rows, tmp_path / "parts", PLAN, work=tmp_path / "work", report=stop)
    said = list[Progress]()
    train(base, rows, tmp_path / "parts", PLAN, work=tmp_path / "work", report=said.append)
    assert [progress.step for progress in said] == [3, 4, 5, 6]
    whole, parts = (score(tmp_path / name, rows, "float32") for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-5)
    trained = load_file(tmp_path / "parts/model.safetensors")
    assert trained.keys() == weights.keys()
    for name, tensor in trained.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights[name]) is not name.endswith("_proj.weight")


def test_every_row_is_read_once_an_epoch() -> None:
    """Which rows a step reads follows from its number alone; epochs differ in their order."""
    plan = Plan(rows=4)
    first, second = ([place for step in steps for place in drawn(6, step, plan)] for steps in (range(3), range(3, 6)))
    for epochs in (first, second):
        assert sorted(epochs[:6]) == sorted(epochs[6:]) == list(range(6))
    assert first != second


def test_weights_of_bfloat16_compute_about_the_same(llama_guards: Mapping[Shape, Path]) -> None:
    """Positions are as exact as those of float32; vectors are of the type of the matrices."""
    ids = torch.arange(300)[None] % 200
    exact, near = (load_language_model(llama_guards["1b"], dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in near.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        wanted, found = (model(ids).logits.float() for model in (exact, near))
    assert (found - wanted).std() < 0.1 * wanted.std()


def test_what_cannot_be_trained_is_refused(tmp_path: Path, llama_guards: Mapping[Shape, Path]) -> None:
    """Each error says what was expected; nothing is written."""
    base, out, rows = llama_guards["8b"], tmp_path / "out", secrets(4, seed=1)
    with pytest.raises(ConfigError, match=r"^expected rows of either label, found 0 unsafe and 2 safe$"):
        train(base, rows[::2], out, PLAN)
    with pytest.raises(ConfigError, match=rf"^{base}: is the checkpoint to start from$"):
        train(base, rows, base, PLAN)
    problem = "expected a Llama Guard checkpoint as Hugging Face has it, of model_type llama"
    for other in (write_model(tmp_path / "guard"), tmp_path / "guard/base", tmp_path / "none"):
        with pytest.raises(ConfigError, match=rf"^{other}: {problem}$"):
            train(other, rows, out, PLAN)
    assert not out.exists()
