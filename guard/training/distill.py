"""What teachers say of rows that have no label, or one that is doubted; method: Hinton et al., arXiv:1503.02531."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from guard.errors import ConfigError
from guard.model.checkpoint import read_checkpoint
from guard.settings import Settings
from guard.training.data import Example
from guard.training.evaluate import HEADS, Floats
from guard.training.served import served


def taught(examples: Sequence[Example], teachers: Sequence[Path], kept: Path) -> list[Example]:
    """The examples, and the mean of what the teachers say of those whose recipe asks for it.

    Teachers are Guard model directories that score every hazard. Their probabilities are left in the file `kept` and
    read from there when the same teachers are asked of the same rows again. Raises ConfigError where a teacher is
    needed and there is none, and where one does not fit.
    """
    asked = [example for example in examples if example.taught > 0]
    if not asked:
        return list(examples)
    if not teachers:
        raise ConfigError(f"{len(asked):,} rows of the recipe are for a teacher to label: name one with --teacher")
    revisions = [read_checkpoint(teacher).revision for teacher in teachers]
    said_before = (repr(example.conversation) for example in asked)
    run = sha256("\n".join([*revisions, *said_before]).encode("utf-8", "surrogatepass")).hexdigest()
    said = _read(kept, run)
    if said is None:
        said = np.mean([_answers(teacher, asked) for teacher in teachers], axis=0)
        save_file({"probabilities": torch.from_numpy(said)}, kept, metadata={"run": run})
    answers = iter(said.tolist())
    return [replace(row, teacher=tuple(next(answers))) if row.taught > 0 else row for row in examples]


def _read(kept: Path, run: str) -> Floats | None:
    if not kept.exists():
        return None
    with safe_open(kept, framework="pt") as file:
        if file.metadata()["run"] != run:
            return None
        found: Floats = file.get_tensor("probabilities").numpy()
        return found


def _answers(teacher: Path, examples: Sequence[Example]) -> Floats:
    settings = Settings.load({"model": teacher, "device": "cpu"}, {})
    _, found = served(settings, examples)
    if np.isnan(found).any():
        raise ConfigError(f"{teacher}: does not score each of {', '.join(HEADS)}")
    return found
