"""Llama Guard checkpoints against transformers, and against themselves in batches and on what is held."""

import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from guard.engine.prefix_cache import PrefixCache
from guard.errors import CheckpointError
from guard.model.kinds import kind_of, load_classifier
from guard.model.llama_guard import LlamaGuard
from guard.settings import Settings
from guard.telemetry import Metrics
from guard.types import PAGE, Conversation, Described, Role, Scores, Tokens, Turn
from tests.model.llama_guards import Prompts, Shape, generate, make

SHAPES: tuple[Shape, ...] = ("1b", "8b", "2")
OWN = Described("rivals", "Praise for rivals", "Praises what a competitor sells.")
WORDS = ("bread", "kill", "prime", "you", "find", "poison", "him", "bake", "it", "is", ".", ",", "?", "12", "ü", "🙂")


@cache
def loaded(path: Path, ask: str = "together") -> LlamaGuard:
    return LlamaGuard(path, "cpu", "float32", ask="each" if ask == "each" else "together")


@cache
def reference(path: Path) -> Any:
    """The model of transformers; its types know little of what it does."""
    model = transformers.LlamaForCausalLM.from_pretrained(path)
    model.eval()
    return model


def conversation(seed: int) -> Conversation:
    """Of one to four turns of random words."""
    chooser = random.Random(seed)
    turns = tuple(
        Turn(Role.AGENT if place % 2 else Role.USER, " ".join(chooser.choices(WORDS, k=chooser.randint(0, 20))))
        for place in range(chooser.randint(1, 4))
    )
    return Conversation(turns, len(turns) - 1)


def score(model: LlamaGuard, *conversations: Conversation, asked: tuple[Described, ...] = ()) -> list[Scores]:
    windows = [tokens for one in conversations for tokens in model.tokenise(one, "head-tail", asked)]
    return [own for (own,) in model.score(windows)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_prefill_says_what_generate_does(llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """The verdict is that of greedy decoding, whatever the answer begins with; the logits differ by 1e-3 at most."""
    path = llama_guards[shape]
    model, theirs, prompts = loaded(path), reference(path), Prompts(path)
    answers = []
    for seed in range(40):
        said = conversation(seed)
        ids = prompts.ids([turn.text for turn in said.turns])
        generated = generate(theirs, ids)
        answer = prompts.theirs.decode(generated.sequences[0][len(ids) :], skip_special_tokens=True).strip()
        answers.append(answer[:4])
        (found,) = score(model, said)
        assert (found.unsafe > 0.5) == answer.startswith("unsafe")
        place = 1 if shape == "1b" else 0  # where there is a lead before the verdict
        safe, unsafe = (prompts.theirs.convert_tokens_to_ids(word) for word in ("safe", "unsafe"))
        logits = generated.logits[place][0]
        assert math.log(found.unsafe / (1 - found.unsafe)) == pytest.approx(
            float(logits[unsafe] - logits[safe]), abs=1e-3
        )
        named = re.match(r"unsafe\n(S\d+)", answer)
        if named and shape != "2":  # where a code is one token, the likeliest is taken
            assert named[1] == max(found.hazards, key=lambda name: found.hazards[name])
    assert {"safe", "unsa"} <= set(answers)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_as_likely_as_transformers_says(llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """Each code's share is that of its tokens among those of all codes, after a forced beginning of the answer."""
    path = llama_guards[shape]
    model, theirs, prompts = loaded(path), reference(path), Prompts(path)
    said = conversation(7)
    (found,) = score(model, said)
    lead = "\n\n" if shape == "1b" else ""
    tokenizer = prompts.theirs
    prompt = prompts.ids([turn.text for turn in said.turns])

    def logits(answer: str) -> torch.Tensor:
        ids = prompt + tokenizer(lead + answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found: torch.Tensor = theirs(torch.tensor([ids])).logits[0, -1].double()
        return found

    codes = [str(number) for number in range(1, len(model.info.hazards) + 1)]
    first = {code: tokenizer.convert_tokens_to_ids(code if shape != "2" else code[0]) for code in codes}
    after = logits("unsafe\nS")
    alone = sorted(set(first.values()))
    shares = dict(zip(alone, after[alone].softmax(0).tolist(), strict=True))
    if shape == "2":  # a code of two digits has two tokens, and 1 is one where the answer goes on or ends
        second = [tokenizer.convert_tokens_to_ids(token) for token in ("0", "1", ",", "</s>")]
        zero, one, comma, end = logits("unsafe\nS1")[second].softmax(0).tolist()
        rest = {"1": comma + end, "10": zero, "11": one}
    else:
        rest = {}
    for code, name in zip(codes, model.info.hazards, strict=True):
        assert found.hazards[name] == pytest.approx(found.unsafe * shares[first[code]] * rest.get(code, 1.0), abs=1e-5)
    assert math.fsum(found.hazards.values()) == pytest.approx(found.unsafe, rel=1e-9)


def test_how_a_checkpoint_begins_its_answer_is_found_out(tmp_path: Path) -> None:
    """The same template with and without an empty line before the answer."""
    for name, lead in (("with", "\n\n"), ("without", "")):
        path = make(tmp_path / name, "8b", lead=lead)
        (found,) = score(loaded(path), Conversation((Turn(Role.USER, "I will find you and kill you."),), 0))
        assert found.unsafe > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_do_not_depend_on_the_batch_or_on_what_is_held(llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """To the bit: alone, together in any order, and on pages that hold the prompt and earlier turns."""
    model = loaded(llama_guards[shape])
    said = [conversation(seed) for seed in range(12)]
    alone = [score(model, one)[0] for one in said]
    assert score(model, *said) == alone
    assert score(model, *reversed(said)) == alone[::-1]
    cache = PrefixCache(model, 200 * model.page_bytes, Metrics())
    chooser = random.Random(0)
    windows = [window for one in said for window in model.tokenise(one)]
    for _ in range(4):
        order = chooser.sample(range(len(said)), len(said))
        tenants = [chooser.choice(["one", "two", "", None]) for _ in order]
        for start in range(0, len(order), 3):
            batch = [
                _of(windows[place], tenant)
                for place, tenant in list(zip(order, tenants, strict=True))[start : start + 3]
            ]
            assert [own for (own,) in cache.score(batch)] == [alone[place] for place in order[start : start + 3]]


def _of(tokens: Tokens, tenant: str | None) -> Tokens:
    return replace(tokens, tenant=tenant)


def test_a_prompt_is_read_once_for_all_and_a_turn_by_its_new_tokens(llama_guards: Mapping[Shape, Path]) -> None:
    """Other tenants, and those with none, find its whole pages; a growing text is read from where it grew."""
    model = loaded(llama_guards["8b"])
    cache = PrefixCache(model, 200 * model.page_bytes, Metrics())
    text = "It is as it is, and I will bake bread. " * 8
    first, grown = (
        model.tokenise(Conversation((Turn(Role.USER, own),), 0))[0] for own in (text, text + "How to poison him?")
    )
    assert cache.unread(_of(first, "one")) == len(first.ids)
    cache.score([_of(first, "one")])
    shared = first.shared - first.shared % PAGE
    assert shared >= PAGE
    for tenant in ("two", "", None):
        assert cache.unread(_of(grown, tenant)) == len(grown.ids) - shared
    own = cache.unread(_of(grown, "one"))
    tail = len(first.ids) - first.kept  # type: ignore[operator]  # there is one
    assert own <= tail + len(grown.ids) - len(first.ids) + 3
    assert cache.score([_of(grown, "one")]) == model.score([grown])


@pytest.mark.parametrize("shape", SHAPES)
def test_categories_in_words(llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """They are scored beside the checkpoint's own, and change what they stand for: the prompt and its hash."""
    model = loaded(llama_guards[shape])
    said = conversation(3)
    (plain,), (tokens,) = score(model, said), model.tokenise(said, "head-tail", (OWN,))
    ((found,),) = model.score([tokens])
    assert list(found.hazards) == [*model.info.hazards, "rivals"]
    assert found != plain
    assert tokens.prompt is not None
    assert tokens.prompt.revision != model.tokenise(said)[0].prompt.revision  # type: ignore[union-attr]  # there is one
    assert model.info.asks == {"1b": 51, "8b": 50, "2": 8}[shape]


def test_each_category_by_itself(llama_guards: Mapping[Shape, Path]) -> None:
    """A prompt with that category alone, beside the one with all, which says how likely unsafe is."""
    path = llama_guards["8b"]
    model, together = loaded(path, "each"), loaded(path)
    said = conversation(3)
    windows = model.tokenise(said, "head-tail", (OWN,))
    assert len(windows) == 16
    assert [tokens.beside for tokens in windows] == [False, *[True] * 15]
    found = [own for (own,) in model.score(windows)]
    ((all_of_them,),) = together.score(together.tokenise(said, "head-tail", (OWN,)))
    assert found[0].unsafe == all_of_them.unsafe
    assert set(found[0].hazards.values()) == {0.0}
    for name, own in zip((*model.info.hazards, "rivals"), found[1:], strict=True):
        assert own.unsafe == 0.0
        assert {code for code, probability in own.hazards.items() if probability} == {name}
    third = Prompts(path).theirs.decode(windows[3].ids)
    assert "S3: Sex Crimes." in third
    assert "S2: " not in third


def test_a_snapshot_of_a_cache_is_named_after_its_model(llama_guards: Mapping[Shape, Path], tmp_path: Path) -> None:
    path = tmp_path / "models--meta-llama--Llama-Guard-3-8B" / "snapshots" / "0123abcd"
    shutil.copytree(llama_guards["8b"], path)
    model = loaded(path)
    assert model.info.revision.name == "Llama-Guard-3-8B"
    assert model.info.revision.revision == loaded(llama_guards["8b"]).info.revision.revision
    (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    assert LlamaGuard(path, "cpu", "float32").info.revision.revision != model.info.revision.revision


def test_what_is_served_follows_from_the_directory(llama_guards: Mapping[Shape, Path], tmp_path: Path) -> None:
    """A Llama Guard by its chat template; a Llama without one, or something else, is refused by its name."""
    path = tmp_path / "model"
    shutil.copytree(llama_guards["8b"], path)
    assert kind_of(path) == "llama-guard"
    assert isinstance(load_classifier(Settings(model=path, device="cpu", dtype="float32")), LlamaGuard)
    (path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found LlamaForCausalLM whose chat template has no UNSAFE CONTENT"):
        kind_of(path)
    (path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(CheckpointError, match="found gemma2"):
        kind_of(path)
    (path / "guard.json").write_text('{"kind": "oracle"}')
    with pytest.raises(CheckpointError, match="kind: expected turn-classifier or llama-guard, found 'oracle'"):
        kind_of(path)


@pytest.mark.parametrize("damage", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint(llama_guards: Mapping[Shape, Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(llama_guards["8b"], path)
    (path / damage).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=str(path)):
        LlamaGuard(path, "cpu", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_types_are_close(llama_guards: Mapping[Shape, Path], dtype: str) -> None:
    model = LlamaGuard(llama_guards["8b"], "cpu", dtype)
    said = [conversation(seed) for seed in range(20)]
    exact = score(loaded(llama_guards["8b"]), *said)
    gaps = [abs(own.unsafe - other.unsafe) for own, other in zip(score(model, *said), exact, strict=True)]
    assert sum(gaps) / len(gaps) < 0.05
