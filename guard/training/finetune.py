"""Fine-tunes a Llama with one linear head, read at the end token of the judged turn; resumable to the step."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch._dynamo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.training.data import Example, Recipe
from guard.types import HAZARDS

_BETAS = (0.9, 0.98)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to one length; rows of weight 0 fill the batch up."""

    ids: Tensor  # [rows, length]
    last: Tensor  # [rows], where the judged turn's end token stands
    targets: Tensor  # [rows, 1 + hazards], 0 or 1
    mask: Tensor  # [rows, 1 + hazards], 0 where the label is unknown
    weights: Tensor  # [rows]
    places: tuple[int, ...]  # where the rows stand among the examples; none for rows that fill up


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step came to; `loss` and `tokens_per_second` are means since the last report, `seconds_left` a guess."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


class TurnModel(nn.Module):
    """A Llama and a linear head: logits of `unsafe` and each hazard, [rows, 1 + hazards], at one position of a row."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1 + len(HAZARDS))
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, -3.0)  # most hazards are absent most of the time
        nn.init.constant_(self.score.bias[:1], -0.5)

    def freeze(self, blocks: int) -> None:
        """Embeddings and the first `blocks` blocks stay as they are."""
        for module in (self.model.embed_tokens, *self.model.layers[:blocks]):
            module.requires_grad_(False)

    def compile_blocks(self) -> None:
        """Each length of a batch is compiled once; the blocks share the code."""
        torch._dynamo.config.recompile_limit = 64
        for block in self.model.layers:
            block.compile(dynamic=False)

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        # Padding is on the right, and attention causal: no row needs a mask.
        hidden = self.model.embed_tokens(ids)  # [rows, length, hidden]
        rotary = self.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        for block in self.model.layers:
            trains = torch.is_grad_enabled() and next(block.parameters()).requires_grad
            with torch.set_grad_enabled(trains):
                hidden = block(hidden, position_embeddings=rotary)
        judged = self.model.norm(hidden[torch.arange(len(ids)), last])
        logits: Tensor = self.score(judged)
        return logits


def batches(examples: Sequence[Example], tokenizer: ChatTokenizer, lengths: Sequence[int], tokens: int) -> list[Batch]:
    """Examples, in their order, in batches of at most `tokens`; each row in the shortest of `lengths` that holds it."""
    of_length: dict[int, list[tuple[int, tuple[int, ...]]]] = {length: [] for length in sorted(lengths)}
    for place, example in enumerate(examples):
        ids = tokenizer.tokenise(example.conversation)[0].ids
        of_length[next(length for length in of_length if length >= len(ids))].append((place, ids))
    return [
        _batch(examples, rows[start : start + tokens // length], length, tokens // length)
        for length, rows in of_length.items()
        for start in range(0, len(rows), tokens // length)
    ]


def _batch(examples: Sequence[Example], rows: Sequence[tuple[int, tuple[int, ...]]], length: int, size: int) -> Batch:
    heads = 1 + len(HAZARDS)
    ids, last = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    targets, mask, weights = torch.zeros(size, heads), torch.zeros(size, heads), torch.zeros(size)
    for row, (place, tokens) in enumerate(rows):
        example = examples[place]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        last[row] = len(tokens) - 1
        targets[row] = torch.tensor([float(label) for label in example.labels])
        mask[row, 0], mask[row, 1:] = 1.0, float(example.hazards is not None)
        weights[row] = example.weight
    return Batch(ids, last, targets, mask, weights, tuple(place for place, _ in rows))


def loss_sum(logits: Tensor, batch: Batch, hazard_loss: float) -> Tensor:
    """The rows' weighted losses added up: cross-entropy of `unsafe`, and `hazard_loss` times that of all hazards."""
    entropy = functional.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none") * batch.mask
    return ((entropy[:, 0] + hazard_loss * entropy[:, 1:].sum(1)) * batch.weights).sum()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Share of the full rate at a step: it rises, stays, and falls to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.decay * recipe.steps))


def epoch(examples: Sequence[Example], tokenizer: ChatTokenizer, recipe: Recipe, number: int) -> list[Batch]:
    """All batches of an epoch, one a step, shuffled as the recipe's seed and the epoch's number decide."""
    shuffle = random.Random(f"{recipe.seed}:{number}")
    shuffled = shuffle.sample(examples, len(examples))
    plan = batches(shuffled, tokenizer, recipe.lengths, recipe.tokens_per_step)
    shuffle.shuffle(plan)
    return plan


def finetune(
    model: TurnModel,
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    recipe: Recipe,
    out: Path,
    *,
    save_every: int,
    report_every: int = 10,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Trains for the recipe's steps and leaves `out/state.safetensors`; goes on from there if the file exists.

    The steps, and the share of them over which the learning rate falls, may differ from those of the run that goes on.
    Raises ConfigError where the file is of another recipe or of other rows.
    """
    model.freeze(recipe.frozen_blocks)
    head = list(model.score.parameters())
    body = [p for p in model.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": body, "full": recipe.learning_rate}, {"params": head, "full": recipe.head_learning_rate}],
        betas=_BETAS,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    state = out / "state.safetensors"
    run = fingerprint(recipe, examples)
    steps = recipe.steps
    step = restore(model, optimizer, state, run) if state.exists() else 0
    plan, number = epoch(examples, tokenizer, recipe, 0), 0
    # A row counts the same in a batch of many short rows as in one of few long ones.
    usual = sum(example.weight for example in examples) / len(plan)
    model.train()
    losses: list[float] = []
    tokens, since = 0, time.monotonic()
    while step < steps:
        if step // len(plan) != number:
            number = step // len(plan)
            plan = epoch(examples, tokenizer, recipe, number)
        batch = plan[step % len(plan)]
        rate = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate
        losses.append(_step(model, optimizer, batch, recipe.hazard_loss, usual))
        tokens += batch.ids.numel()
        step += 1
        if step % report_every == 0 or step == steps:
            speed = tokens / (time.monotonic() - since)
            left = (steps - step) * recipe.tokens_per_step / speed
            report(Progress(step, steps, sum(losses) / len(losses), rate, speed, left))
            losses, tokens, since = [], 0, time.monotonic()
        if step % save_every == 0 or step == steps:
            save(model, optimizer, state, step, run)


def _step(model: TurnModel, optimizer: torch.optim.Optimizer, batch: Batch, hazard_loss: float, usual: float) -> float:
    """One update; returns the mean loss of a row, weighted."""
    optimizer.zero_grad()
    total = loss_sum(model(batch.ids, batch.last), batch, hazard_loss)
    torch.autograd.backward(total / usual)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total.item() / float(batch.weights.sum())


def fingerprint(recipe: Recipe, examples: Sequence[Example]) -> str:
    """What must not change while a run is interrupted: the recipe, but for how long it goes on, and its rows."""
    digest = sha256(recipe.model_dump_json(exclude={"steps", "decay"}).encode())
    digest.update("\n".join(example.id for example in examples).encode())
    return digest.hexdigest()


def save(model: TurnModel, optimizer: torch.optim.Optimizer, path: Path, step: int, run: str) -> None:
    """Weights, the optimizer's moments and the step, in one file that appears whole or not at all."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "run": run})
    partial.replace(path)


def restore(model: TurnModel, optimizer: torch.optim.Optimizer, path: Path, run: str) -> int:
    """Puts weights and moments back, and says which step they had reached; raises ConfigError for another run's."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["run"] != run:
            raise ConfigError(f"{path}: is of a run by another recipe or on other rows")
        step = int(metadata["step"])
        model.load_state_dict({name: file.get_tensor(name) for name in model.state_dict()})
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                moments = {moment: file.get_tensor(f"{moment}:{name}") for moment in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step
