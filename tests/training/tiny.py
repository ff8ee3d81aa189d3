"""A Llama small enough to train in a test, a tokenizer of single bytes, and rows that a few steps can learn."""

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from guard.training.data import Recipe

RECIPE: dict[str, Any] = {
    "seed": 3,
    "max_tokens": 32,
    "validation": 0.25,
    "validation_rows": 20,
    "precision": "float32",
    "lengths": [32, 64],
    "tokens_per_step": 192,
    "augmented": 0.0,
    "blocks": 2,
    "frozen_blocks": 0,
    "steps": 60,
    "learning_rate": 0.01,
    "block_decay": 1.0,
    "head_learning_rate": 0.01,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "decay": 0.3,
    "hazard_loss": 0.3,
    "sources": {"colours": {}},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | changes)


def row(number: int, text: str, unsafe: int | None = 0, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": text}]
    return {"id": f"colours-{number}", "source": "colours", "turns": turns, "unsafe": unsafe, "categories": []} | more


def colours(count: int) -> list[dict[str, Any]]:
    """Rows of which the red ones are unsafe, and of hazard S1."""
    return [
        row(n, f"red {n}", 1, categories=["S1"]) if n % 2 else row(n, f"{('blue', 'pale green')[n % 4 // 2]} {n}")
        for n in range(count)
    ]


def write_rows(directory: Path, rows: list[dict[str, Any]], name: str = "colours") -> Path:
    directory.mkdir(exist_ok=True)
    with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return directory


def write_base(directory: Path) -> Path:
    """A random Llama of two blocks, as a Hugging Face directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
