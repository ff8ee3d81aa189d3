"""What makes a model: `train` one by a recipe, then `release` it calibrated, in int8 and measured."""

import json
import random
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import (
    amend_checkpoint,
    copy_checkpoint,
    load_tensors,
    read_checkpoint,
    read_config,
    save_checkpoint,
)
from guard.model.kinds import kind_of
from guard.model.llama_guard import LlamaGuard
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.training.augment import Augmenter
from guard.training.base import load_base, load_language_model
from guard.training.calibrate import calibrate, check, predict, probabilities
from guard.training.card import write_card
from guard.training.data import Example, load_examples, read_recipe, repeated
from guard.training.distill import taught
from guard.training.evaluate import HEADS, Floats, evaluate, thresholds, under
from guard.training.finetune import Progress, TurnModel, batches, finetune
from guard.training.processes import first, joined, wait
from guard.training.quantise import acceptable, agreement, even
from guard.training.served import served
from guard.types import HAZARDS

MAX_TOKENS = 2048
_SMOOTHING_ROWS = 256
_SMOOTHING_PROMPTS = 32  # of a Llama Guard, each some 700 tokens
_READ_WITH = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_BATCH_ROWS = 8
_EVERY = 9  # of the rows measures int8 weights alone, in float32, which takes long and decides nothing
_DISGUISED_ROWS = 1000  # of either label, so that a difference of five points is told from one of three
_THRESHOLDS = "thresholds.json"
_TEACHERS = "teachers.safetensors"
_LOG = "log.jsonl"


def train(
    recipe: Path,
    data: Path,
    base: Path,
    out: Path,
    *,
    teachers: Sequence[Path] = (),
    steps: int | None = None,
    save_every: int = 50,
    compiled: bool = True,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Fine-tunes `base` on a directory of JSON Lines files, and leaves a float32 Hugging Face directory in `out`.

    `teachers` are Guard model directories, for the rows that the recipe has taught. A base that is one itself goes on
    from its own outputs. Under torchrun every process computes a share of each step, on a GPU of its own where there
    are GPUs.
    A run that was stopped goes on from its last save; `out/log.jsonl` has a line for every report. `steps` stands in
    for the recipe's, and may change when a run goes on. On the CPU a C++ compiler is needed, unless
    `compiled` is off.
    Raises ConfigError for a recipe, data or base that cannot be used.
    """
    plan = read_recipe(recipe)
    plan = plan.model_copy(update={"steps": steps or plan.steps})
    rows = load_examples(plan, data, "train")
    origin = load_base(base)
    origin.config.num_hidden_layers = plan.blocks
    torch.manual_seed(plan.seed)
    model = TurnModel(origin.config, rounded=plan.rounded)
    # Of a deeper base the upper blocks are left out.
    loaded = model.load_state_dict(_of_taxonomy(origin.tensors), strict=False)
    if lacking := {name for name in loaded.missing_keys if not name.startswith("score.")}:
        raise ConfigError(f"{base}: lacks {', '.join(sorted(lacking))}")
    with joined() as device:
        if first():
            out.mkdir(parents=True, exist_ok=True)
            origin.config.save_pretrained(out)
            (out / "tokenizer.json").write_text(origin.tokenizer_json, encoding="utf-8")
            taught(rows, teachers, out / _TEACHERS)
        wait()
        examples = repeated(plan, taught(rows, teachers, out / _TEACHERS))
        model.to(device)
        if compiled and device.type == "cpu":  # on CUDA, torch.compile once changed what this Llama computes
            model.compile_blocks()

        def reported(progress: Progress) -> None:
            if first():
                with (out / _LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(asdict(progress)) + "\n")
                report(progress)

        tokenizer = ChatTokenizer(out / "tokenizer.json", plan.max_tokens)
        finetune(model, examples, tokenizer, plan, out, save_every=save_every, report=reported)
        if first():
            save_file(model.state_dict(), out / "model.safetensors")


def load_model(path: Path) -> TurnModel:
    """A trained model, float32, from its Hugging Face directory or from a Guard model directory.

    Outputs beyond those of the taxonomy are left out.
    """
    model = TurnModel(LlamaConfig.from_pretrained(path))
    model.load_state_dict(_of_taxonomy(load_tensors(path, torch.float32)))
    return model


def _of_taxonomy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without outputs beyond those of the taxonomy, which come last."""
    return {name: tensor[: len(HEADS)] if name.startswith("score.") else tensor for name, tensor in tensors.items()}


def score(path: Path, examples: Sequence[Example], dtype: str = "auto") -> Floats:
    """Calibrated probabilities [rows, 1 + hazards] by a model directory, each conversation read as it is.

    The hazards are those of the taxonomy; for a Llama Guard its own.
    """
    if kind_of(path) == "llama-guard":
        guard = LlamaGuard(path, device="cpu", dtype=dtype)
        return _score(guard, examples, guard.info.hazards)
    return _score(TurnClassifier(path, device="cpu", dtype=dtype), examples, HAZARDS)


def _score(classifier: TurnClassifier | LlamaGuard, examples: Sequence[Example], hazards: Collection[str]) -> Floats:
    windows = [classifier.tokenise(example.conversation)[0] for example in examples]
    starts = range(0, len(windows), _BATCH_ROWS)
    found = [scores for start in starts for (scores,) in classifier.score(windows[start : start + _BATCH_ROWS])]
    return np.array([[scores.unsafe, *(scores.hazards[code] for code in hazards)] for scores in found])


def release(
    recipe: Path,
    data: Path,
    trained: Path,
    out: Path,
    *,
    name: str,
    benchmarks: Mapping[str, Sequence[Example]] | None = None,
) -> dict[str, Any]:
    """Calibrates a trained model on the rows its recipe holds out, writes the Guard model directory `out`, measures it.

    `out` may compute in int8 if that hardly changes a verdict. Returns what `out/evaluation.json` holds: metrics, as
    served, on the held-out rows and the benchmarks, thresholds by role and hazard, and how far scores of int8 weights,
    and of int8 products, are from those of the trained model. The model card is written from it.
    """
    plan = read_recipe(recipe)
    held_out = load_examples(plan, data, "validation")
    seen = load_examples(plan, data, "train")
    model = load_model(trained)
    tokenizer = ChatTokenizer(trained / "tokenizer.json", MAX_TOKENS)
    logits = predict(model, held_out, tokenizer)
    calibration = calibrate(logits, held_out)
    sample = seen[:: max(1, len(seen) // _SMOOTHING_ROWS)]
    save_checkpoint(
        out,
        tensors=even(model, batches(sample, tokenizer, [MAX_TOKENS], MAX_TOKENS)),
        config=json.loads((trained / "config.json").read_text(encoding="utf-8")),
        tokenizer_json=(trained / "tokenizer.json").read_text(encoding="utf-8"),
        name=name,
        max_tokens=MAX_TOKENS,
        hazards=tuple(HAZARDS),
        calibration=calibration,
    )
    rounded = _allow_int8(out, probabilities(logits, calibration, held_out), held_out)
    evaluation = {"held_out": _measure(out, held_out), "int8": rounded}
    evaluation["thresholds"] = json.loads((out / _THRESHOLDS).read_text(encoding="utf-8"))
    evaluation["benchmarks"] = _on(out, benchmarks) if benchmarks else {}
    evaluation["disguised"] = _disguised(out, held_out, plan.seed)
    (out / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    shutil.copy(recipe, out / "recipe.yaml")
    shutil.copy(trained / _LOG, out / "training.jsonl")
    write_card(out)
    return evaluation


def recalibrate(model: Path, examples: Sequence[Example], out: Path, prior: float | None = None) -> dict[str, Any]:
    """Writes the model directory `out`: `model`, its probabilities and thresholds fitted to other labelled rows.

    Probabilities are for where a share `prior` of turns is unsafe, by default as many as are among the rows. Returns
    the metrics on those rows, each of which counts once, while fits and thresholds count its weight. Outputs beyond the
    taxonomy keep their fit, and so do hazards where hardly any row is known to be of one. Raises ConfigError for rows
    that are all safe or all unsafe.
    """
    if kind_of(model) == "llama-guard":
        raise ConfigError(f"{model}: is a Llama Guard checkpoint, whose probabilities are not fitted")
    checkpoint = read_checkpoint(model)
    tokenizer = ChatTokenizer(model / "tokenizer.json", checkpoint.max_tokens)
    check(examples)
    fits = calibrate(predict(load_model(model), examples, tokenizer), examples, prior, checkpoint.calibration)
    copy_checkpoint(model, out)
    amend_checkpoint(out, calibration={role: {**own, **fits[role]} for role, own in checkpoint.calibration.items()})
    return _measure(out, examples, weighted=True)


def quantise(model: Path, examples: Sequence[Example], out: Path) -> dict[str, Any]:
    """Writes the model directory `out`: `model` made fit for products of int8, if on these labelled rows that will do.

    It may be a Llama Guard checkpoint as Hugging Face has it. Returns how far scores of int8 weights and of int8
    products are from those of `model` in float32. Raises ConfigError for rows that are all safe or all unsafe, on which
    nothing would show.
    """
    if not 0 < sum(example.unsafe for example in examples) < len(examples):
        raise ConfigError(f"needs both safe and unsafe rows to measure on; there are {len(examples):,} rows")
    if kind_of(model) == "llama-guard":
        return _quantise_llama_guard(model, examples, out)
    checkpoint = read_checkpoint(model)
    tokenizer = ChatTokenizer(model / "tokenizer.json", checkpoint.max_tokens)
    source = load_model(model)
    reference = probabilities(predict(source, examples, tokenizer), checkpoint.calibration, examples)
    sample = examples[:: max(1, len(examples) // _SMOOTHING_ROWS)]
    whole = load_tensors(model, torch.float32)  # with outputs beyond the taxonomy
    head = {name: whole[name] for name in ("score.weight", "score.bias")}
    longest = checkpoint.max_tokens
    save_checkpoint(
        out,
        tensors=even(source, batches(sample, tokenizer, [longest], longest), head),
        config=checkpoint.config,
        tokenizer_json=(model / "tokenizer.json").read_text(encoding="utf-8"),
        name=checkpoint.name,
        max_tokens=checkpoint.max_tokens,
        hazards=checkpoint.hazards,
        calibration=checkpoint.calibration,
    )
    return _allow_int8(out, reference, examples)


def _quantise_llama_guard(model: Path, examples: Sequence[Example], out: Path) -> dict[str, Any]:
    guard = LlamaGuard(model, device="cpu", dtype="float32")
    info = guard.info
    reference = _score(guard, examples, info.hazards)
    sample = examples[:: max(1, len(examples) // _SMOOTHING_PROMPTS)]
    prompts = [torch.tensor([guard.tokenise(example.conversation)[0].ids]) for example in sample]
    del guard  # of some of these checkpoints, few processors hold two in float32
    tensors = even(load_language_model(model, torch.float32), prompts)
    save_checkpoint(
        out,
        tensors=tensors,
        config={**read_config(model), "tie_word_embeddings": False},
        tokenizer_json=(model / "tokenizer.json").read_text(encoding="utf-8"),
        name=info.revision.name,
        max_tokens=info.max_tokens,
        hazards=(),
        calibration={},
        kind="llama-guard",
        documents={name: (model / name).read_text(encoding="utf-8") for name in _READ_WITH if (model / name).exists()},
    )
    del tensors
    return _allow_int8(out, reference, examples)


def _allow_int8(model: Path, reference: Floats, examples: Sequence[Example]) -> dict[str, Any]:
    """Measures int8 against the probabilities of the model as it was, and lets it be chosen where it agrees."""
    some = examples[::_EVERY]
    weights = agreement(reference[::_EVERY], score(model, some, "float32"), some)
    products = agreement(reference, score(model, examples, "int8"), examples)
    amend_checkpoint(model, int8=acceptable(products))
    return {"weights": weights, "products": products}


def _measure(model: Path, examples: Sequence[Example], *, weighted: bool = False) -> dict[str, Any]:
    """Metrics as served; leaves the thresholds in the model directory."""
    _, scores = served(_serving(model), examples)
    amend_checkpoint(model, {_THRESHOLDS: json.dumps(thresholds(scores, examples, weighted=weighted), indent=1) + "\n"})
    return evaluate(scores, examples)


def _on(model: Path, benchmarks: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """Metrics as served, by benchmark; the model is loaded once for all."""
    _, scores = served(_serving(model), [row for rows in benchmarks.values() for row in rows])
    ends = np.cumsum([len(rows) for rows in benchmarks.values()])
    parts = np.split(scores, ends[:-1])
    return {title: evaluate(part, rows) for (title, rows), part in zip(benchmarks.items(), parts, strict=True)}


def _disguised(model: Path, examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """What is left of recall and false positives, as served, where judged turns are disguised."""
    rng = random.Random(seed)
    rows = [
        row
        for unsafe in (True, False)
        for own in ([example for example in examples if example.unsafe == unsafe],)
        for row in rng.sample(own, min(_DISGUISED_ROWS, len(own)))
    ]
    augment = Augmenter(examples)
    names = ("plain", *augment.names)
    changed = [row if name == "plain" else augment.change(name, row, rng) for name in names for row in rows]
    _, scores = served(_serving(model), changed)
    return under(dict(zip(names, scores[:, 0].reshape(len(names), -1), strict=True)), rows)


def _serving(model: Path) -> Settings:
    return Settings.load({"model": model, "device": "cpu"}, {})
