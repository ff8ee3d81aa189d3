"""What makes a model: `train` one by a recipe, then `release` it calibrated, in int8 and measured."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import load_tensors, read_checkpoint, save_checkpoint
from guard.training.base import load_base
from guard.training.calibrate import calibrate, predict, probabilities
from guard.training.data import Example, load_examples, read_recipe, repeated
from guard.training.evaluate import Floats, evaluate, thresholds
from guard.training.finetune import Progress, TurnModel, finetune
from guard.types import HAZARDS

MAX_TOKENS = 2048
_AGREEMENT_ROWS = 300


def train(
    recipe: Path,
    data: Path,
    base: Path,
    out: Path,
    *,
    steps: int | None = None,
    save_every: int = 50,
    compiled: bool = True,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Fine-tunes `base` on a directory of JSON Lines files, and leaves a float32 Hugging Face directory in `out`.

    A run that was stopped goes on from its last save; `out/log.jsonl` has a line for every report. `steps` stands in
    for the recipe's, and may change when a run goes on. Unless `compiled` is off, a C++ compiler is needed.
    Raises ConfigError for a recipe, data or base that cannot be used.
    """
    plan = read_recipe(recipe)
    plan = plan.model_copy(update={"steps": steps or plan.steps})
    examples = repeated(plan, load_examples(plan, data, "train"))
    origin = load_base(base)
    origin.config.num_hidden_layers = plan.blocks
    out.mkdir(parents=True, exist_ok=True)
    origin.config.save_pretrained(out)
    (out / "tokenizer.json").write_text(origin.tokenizer_json, encoding="utf-8")
    torch.manual_seed(plan.seed)
    model = TurnModel(origin.config)
    loaded = model.load_state_dict(origin.tensors, strict=False)  # of a deeper base the upper blocks are left out
    if lacking := {name for name in loaded.missing_keys if not name.startswith("score.")}:
        raise ConfigError(f"{base}: lacks {', '.join(sorted(lacking))}")
    if compiled:
        model.compile_blocks()
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:

        def reported(progress: Progress) -> None:
            log.write(json.dumps(asdict(progress)) + "\n")
            log.flush()
            report(progress)

        tokenizer = ChatTokenizer(out / "tokenizer.json", plan.max_tokens)
        finetune(model, examples, tokenizer, plan, out, save_every=save_every, report=reported)
    save_file(model.state_dict(), out / "model.safetensors")


def load_model(path: Path) -> TurnModel:
    """A trained model, float32, from its Hugging Face directory or from a Guard model directory."""
    model = TurnModel(LlamaConfig.from_pretrained(path))
    model.load_state_dict(load_tensors(path, torch.float32))
    return model


def score(path: Path, examples: Sequence[Example]) -> Floats:
    """Calibrated probabilities [rows, 1 + hazards] by a Guard model directory, computed in float32."""
    checkpoint = read_checkpoint(path)
    tokenizer = ChatTokenizer(path / "tokenizer.json", checkpoint.max_tokens)
    return probabilities(predict(load_model(path), examples, tokenizer), checkpoint.calibration)


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

    Returns what `out/evaluation.json` holds: metrics on the held-out rows and the benchmarks, thresholds by role and
    hazard, and how far the int8 weights' scores are from the float32 ones.
    """
    held_out = load_examples(read_recipe(recipe), data, "validation")
    tokenizer = ChatTokenizer(trained / "tokenizer.json", MAX_TOKENS)
    model = load_model(trained)
    logits = predict(model, held_out, tokenizer)
    calibration = calibrate(logits, held_out)
    save_checkpoint(
        out,
        tensors=model.state_dict(),
        config=json.loads((trained / "config.json").read_text(encoding="utf-8")),
        tokenizer_json=(trained / "tokenizer.json").read_text(encoding="utf-8"),
        name=name,
        max_tokens=MAX_TOKENS,
        hazards=tuple(HAZARDS),
        calibration=calibration,
    )
    scores = probabilities(logits, calibration)
    sample = slice(None, None, max(1, len(held_out) // _AGREEMENT_ROWS))
    difference = abs(scores[sample] - score(out, held_out[sample]))
    evaluation = {
        "held_out": evaluate(scores, held_out),
        "benchmarks": {title: evaluate(score(out, rows), rows) for title, rows in (benchmarks or {}).items()},
        "thresholds": thresholds(scores, held_out),
        "int8": {
            "rows": len(difference),
            "unsafe_max_difference": float(difference[:, 0].max()),
            "unsafe_mean_difference": float(difference[:, 0].mean()),
            "hazards_max_difference": float(difference[:, 1:].max()),
        },
    }
    (out / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    return evaluation
