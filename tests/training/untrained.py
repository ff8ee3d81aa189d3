"""A model directory of random weights, to be served and measured."""

import json
from pathlib import Path

import torch

from guard.model.checkpoint import load_tensors, save_checkpoint
from guard.training.evaluate import HEADS
from guard.types import HAZARDS, Role
from tests.training.tiny import write_base


def write_model(directory: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    base = write_base(directory / "base")
    tensors = load_tensors(base, torch.float32)
    width = tensors["model.norm.weight"].shape[0]
    save_checkpoint(
        directory,
        tensors=tensors | {"score.weight": torch.randn(len(HEADS), width), "score.bias": torch.zeros(len(HEADS))},
        config=json.loads((base / "config.json").read_text()),
        tokenizer_json=(base / "tokenizer.json").read_text(),
        name="untrained",
        max_tokens=64,
        hazards=tuple(HAZARDS),
        calibration=dict.fromkeys((Role.USER, Role.AGENT), dict.fromkeys(HEADS, (1.0, 0.0))),
    )
    return directory
