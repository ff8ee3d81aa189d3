"""Studies of a recipe: models trained by variations of it, and what they are worth on the rows that it holds out."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import amend_checkpoint, save_checkpoint
from guard.model.turn_classifier import TurnClassifier
from guard.training.calibrate import calibrate, predict, probabilities
from guard.training.data import Example, Recipe, load_examples, read_recipe
from guard.training.evaluate import HEADS, Floats, evaluate
from guard.training.finetune import Progress
from guard.training.pipeline import MAX_TOKENS, load_model, train
from guard.types import HAZARDS, Role

_RUN = "run"  # tells of which recipe, base and data a folder is
_TIMED = 200  # rows at most, one after the other

Report = Callable[[str, Progress], None]


def leave_out(
    recipe: Path,
    data: Path,
    base: Path,
    work: Path,
    *,
    folds: int,
    steps: int | None = None,
    compiled: bool = True,
    report: Report = lambda name, progress: None,
) -> dict[str, Any]:
    """What `evaluate` finds of the held-out rows, each scored by a model that was trained without its source.

    The sources are put into so many `folds`; what trains without a fold is also calibrated without it. A run that was
    stopped goes on where it was. Raises ConfigError for a recipe, data or base that cannot be used or is not that of
    what `work` holds, and for more folds than there are sources with held-out rows.
    """
    plan = _read(recipe, steps)
    held_out = load_examples(plan, data, "validation")
    parts = split(held_out, folds)
    scores = np.empty((len(held_out), len(HEADS)))
    for number, left in enumerate(parts):
        sources = {name: source for name, source in plan.sources.items() if name not in left}
        fold = plan.model_copy(update={"sources": sources})
        theirs = np.array([row.source in left for row in held_out])
        rows = [row for row, mine in zip(held_out, theirs, strict=True) if mine]
        scores[theirs] = _scores(fold, rows, data, base, work / f"fold-{number}", compiled, report)
    return {"folds": [list(left) for left in parts], "steps": plan.steps, **evaluate(scores, held_out)}


def split(examples: Sequence[Example], folds: int) -> list[tuple[str, ...]]:
    """The sources of the examples in so many folds, each with about as many unsafe rows, then about as many rows."""
    rows = Counter(example.source for example in examples)
    if not 2 <= folds <= len(rows):
        raise ConfigError(f"{folds} folds of {len(rows)} sources: it takes 2 at least, and a source for each")
    unsafe = Counter(example.source for example in examples if example.unsafe)
    parts: list[list[str]] = [[] for _ in range(folds)]
    for name in sorted(rows, key=lambda name: (-unsafe[name], -rows[name], name)):
        least = min(parts, key=lambda part: (sum(unsafe[other] for other in part), sum(rows[other] for other in part)))
        least.append(name)
    return [tuple(part) for part in parts]


def compare_depths(
    recipe: Path,
    data: Path,
    base: Path,
    work: Path,
    *,
    blocks: Sequence[int],
    steps: int | None = None,
    compiled: bool = True,
    report: Report = lambda name, progress: None,
) -> dict[str, Any]:
    """What models of so many of the base's first `blocks` are worth on the held-out rows, and what they cost.

    As large a share of their blocks is frozen as the recipe has it. `ms` is the median for a row by itself, in int8
    where the processor has products for it, whether a gate would allow it or not.
    """
    plan = _read(recipe, steps)
    held_out = load_examples(plan, data, "validation")
    found = []
    for depth in blocks:
        frozen = plan.frozen_blocks * depth // plan.blocks
        own = plan.model_copy(update={"blocks": depth, "frozen_blocks": frozen})
        folder = work / f"blocks-{depth}"
        scores = _scores(own, held_out, data, base, folder, compiled, report)
        measured = evaluate(scores, held_out)["unsafe"]
        found.append({"blocks": depth, "frozen_blocks": frozen, "unsafe": measured, **_cost(folder, held_out)})
    return {"steps": plan.steps, "depths": found}


def _read(recipe: Path, steps: int | None) -> Recipe:
    plan = read_recipe(recipe)
    return plan.model_copy(update={"steps": steps or plan.steps})


def _scores(
    plan: Recipe, rows: Sequence[Example], data: Path, base: Path, folder: Path, compiled: bool, report: Report
) -> Floats:
    """Probabilities of the rows by a model of that plan, calibrated on what the plan holds out."""
    written = plan.model_dump_json(indent=1, exclude_unset=True)
    run = sha256("\n".join([written, *_state(base), *_state(data), *(row.id for row in rows)]).encode()).hexdigest()
    kept, recipe, trained = folder / "scores.safetensors", folder / "recipe.yaml", folder / "trained"
    if trained.exists() and (folder / _RUN).read_text(encoding="utf-8") != run:
        raise ConfigError(f"{folder}: is of another recipe, base or data; take another directory, or remove it")
    if kept.exists():
        there: Floats = load_file(kept)["probabilities"].numpy()
        return there
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RUN).write_text(run, encoding="utf-8")
    recipe.write_text(written, encoding="utf-8")  # JSON is YAML
    train(recipe, data, base, trained, compiled=compiled, report=lambda progress: report(folder.name, progress))
    model = load_model(trained).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = ChatTokenizer(trained / "tokenizer.json", MAX_TOKENS)
    own = load_examples(plan, data, "validation")
    calibration = calibrate(predict(model, own, tokenizer), own)
    found = probabilities(predict(model, rows, tokenizer), calibration, rows)
    save_file({"probabilities": torch.from_numpy(found)}, kept)
    return found


def _state(path: Path) -> list[str]:
    """What shows that a file, or one of a directory, is another than before."""
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.exists() else []
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def _cost(folder: Path, rows: Sequence[Example]) -> Mapping[str, Any]:
    """Size and speed of a trained model as it would be served; its scores are not looked at."""
    trained, served = folder / "trained", folder / "served"
    save_checkpoint(
        served,
        tensors=load_model(trained).state_dict(),
        config=json.loads((trained / "config.json").read_text(encoding="utf-8")),
        tokenizer_json=(trained / "tokenizer.json").read_text(encoding="utf-8"),
        name=folder.name,
        max_tokens=MAX_TOKENS,
        hazards=tuple(HAZARDS),
        calibration={role: dict.fromkeys(HEADS, (1.0, 0.0)) for role in (Role.USER, Role.AGENT)},
    )
    amend_checkpoint(served, int8=True)
    classifier = TurnClassifier(served)
    some = rows[:: -(-len(rows) // _TIMED)]
    seconds = list(_timed(classifier, some))
    info = classifier.info
    return {
        "bytes": sum(path.stat().st_size for path in served.glob("*.safetensors")),
        "ms": round(1000 * statistics.median(seconds), 2),
        "computed": f"{info.device}, {info.dtype}, {info.kernels}",
    }


def _timed(classifier: TurnClassifier, rows: Sequence[Example]) -> Iterator[float]:
    for place, row in enumerate([*rows[:5], *rows]):
        windows = classifier.tokenise(row.conversation)
        started = time.perf_counter()
        classifier.score(windows)
        if place >= 5:  # the first ones warm up
            yield time.perf_counter() - started
