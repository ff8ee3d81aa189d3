"""Fine-tunes a Llama with one linear head, read at the end token of the judged turn; resumable to the step."""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from guard.errors import ConfigError
from guard.model.chat import ChatTokenizer
from guard.training import processes
from guard.training.augment import Augmenter
from guard.training.data import Example, Recipe
from guard.types import HAZARDS

_BETAS = (0.9, 0.98)
_OPEN_ROWS = 64  # that a sequence may still go into


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed into rows of one length, and the end tokens of judged turns in them, one for each label."""

    ids: Tensor  # [rows, length]
    positions: Tensor  # [rows, length], within the sequence
    sequence: Tensor  # [rows, length], which sequence of its row a token is of
    judged: Tensor  # [labels], where end tokens stand in the rows laid end to end
    targets: Tensor  # [labels, 1 + hazards], probabilities
    mask: Tensor  # [labels, 1 + hazards], 0 where the label is unknown
    weights: Tensor  # [labels]
    places: tuple[int, ...]  # where the labels stand among the examples

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        del tensors["places"]
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True)
class Reading:
    """A batch, and where it stands: at which place of which epoch of how many `batches`."""

    batch: Batch
    epoch: int
    place: int
    batches: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step came to; `loss` and `tokens_per_second` are means since the last report, `seconds_left` a guess."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


class _RoundedLinear(nn.Linear):
    """Rounds its inputs and weights as a product of int8 does, by a scale for each row.

    Gradients are those without rounding (the straight-through estimator: Bengio et al., arXiv:1308.3432).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(rounded(input), rounded(self.weight), self.bias)


def rounded(x: Tensor) -> Tensor:
    """Each row as the product of its scale and integers of -127..127; the gradient is that of `x`."""
    exact = x.detach().float()
    scale = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return x + ((exact / scale).round() * scale - exact).to(x.dtype)


class TurnModel(nn.Module):
    """A Llama and a linear head: logits of `unsafe` and each hazard, [rows, 1 + hazards], at one position of a row."""

    def __init__(self, config: LlamaConfig, *, rounded: bool = False) -> None:
        """A `rounded` one computes as int8 would, so that training makes up for it."""
        super().__init__()
        config._attn_implementation = "sdpa"
        self.model = LlamaModel(config)
        if rounded:
            for part in [*self.model.layers.modules()]:
                for name, layer in [*part.named_children()]:
                    if isinstance(layer, nn.Linear):
                        size = layer.in_features, layer.out_features
                        setattr(part, name, _RoundedLinear(*size, bias=layer.bias is not None))
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

    def forward(self, batch: Batch) -> Tensor:
        """Logits [labels, 1 + hazards], float32."""
        hidden = self.model.embed_tokens(batch.ids)  # [rows, length, hidden]
        rotary = self.model.rotary_emb(hidden, batch.positions)
        length = batch.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        mask = (batch.sequence[:, None, :, None] == batch.sequence[:, None, None, :]) & earlier
        for block in self.model.layers:
            trains = torch.is_grad_enabled() and next(block.parameters()).requires_grad
            with torch.set_grad_enabled(trains):
                hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
        judged = self.model.norm(hidden.flatten(0, 1)[batch.judged])
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.score(judged.float())
        return logits


def batches(examples: Sequence[Example], tokenizer: ChatTokenizer, lengths: Sequence[int], tokens: int) -> list[Batch]:
    """Examples in batches of `tokens`, each in rows of the shortest of `lengths` that holds it.

    A conversation that another one begins with is read as part of that one: a token depends on earlier ones alone.
    Where training is shared, these are the rows of this process in each batch, and possibly none.
    """
    rendered = [tokenizer.tokenise(example.conversation)[0].ids for example in examples]
    packed = []
    for length, sequences in _by_length(_folded(rendered), lengths).items():
        rows = _rows(sequences, length)
        count = max(1, tokens // length)
        rows += [[]] * (-len(rows) % count)  # batches of one length have one shape: it is compiled once
        whole = [rows[start : start + count] for start in range(0, len(rows), count)]
        for batch in whole:
            spare: list[list[_Sequence]] = [[]] * (-len(batch) % processes.count())  # all shares have one shape
            packed.append(_batch(examples, processes.share(batch + spare), length))
    return packed


# Token ids, and the places of the examples that they hold, with the number of tokens up to the end of each.
_Sequence = tuple[tuple[int, ...], list[tuple[int, int]]]


def _folded(rendered: Sequence[tuple[int, ...]]) -> list[_Sequence]:
    """One sequence for each rendered conversation that no other begins with, in the order of the first examples."""
    order = sorted(range(len(rendered)), key=lambda place: rendered[place], reverse=True)
    sequences: list[_Sequence] = []
    for place in order:  # whatever begins with this one stands right before it
        ids = rendered[place]
        # An example that is repeated is read again: it is to be met at several steps.
        if not sequences or sequences[-1][0][: len(ids)] != ids or sequences[-1][1][-1][1] == len(ids):
            sequences.append((ids, []))
        sequences[-1][1].append((place, len(ids)))
    return sorted(sequences, key=lambda sequence: min(sequence[1]))


def _by_length(sequences: Sequence[_Sequence], lengths: Sequence[int]) -> dict[int, list[_Sequence]]:
    found: dict[int, list[_Sequence]] = {length: [] for length in sorted(lengths)}
    for sequence in sequences:
        found[next(length for length in found if length >= len(sequence[0]))].append(sequence)
    return found


def _rows(sequences: Sequence[_Sequence], length: int) -> list[list[_Sequence]]:
    """Rows of at most `length` tokens, each sequence in the first of the last few rows that has room."""
    rows: list[list[_Sequence]] = []
    room: list[int] = []
    for sequence in sequences:
        size = len(sequence[0])
        row = next((row for row in range(max(0, len(rows) - _OPEN_ROWS), len(rows)) if room[row] >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(sequence)
        room[row] -= size
    return rows


def _batch(examples: Sequence[Example], rows: Sequence[Sequence[_Sequence]], length: int) -> Batch:
    ids, positions, sequence = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    labels: list[tuple[int, int]] = []  # where the end token stands, and the place of the example
    for row, members in enumerate(rows):
        start = 0
        for number, (tokens, places) in enumerate(members, 1):
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(len(tokens))
            sequence[row, start:end] = number
            labels += [(row * length + start + size - 1, place) for place, size in places]
            start = end
    known = [examples[place] for _, place in labels]
    targets = torch.tensor([example.targets for example in known]).reshape(len(known), 1 + len(HAZARDS))
    mask = torch.ones_like(targets)
    mask[[example.hazards is None and example.teacher is None for example in known], 1:] = 0.0
    return Batch(
        ids=ids,
        positions=positions,
        sequence=sequence,
        judged=torch.tensor([end for end, _ in labels], dtype=torch.long),
        targets=targets,
        mask=mask,
        weights=torch.tensor([example.weight for example in known]),
        places=tuple(place for _, place in labels),
    )


def loss_sum(logits: Tensor, batch: Batch, hazard_loss: float) -> Tensor:
    """The rows' weighted losses added up: cross-entropy of `unsafe`, and `hazard_loss` times that of all hazards."""
    entropy = functional.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none") * batch.mask
    return ((entropy[:, 0] + hazard_loss * entropy[:, 1:].sum(1)) * batch.weights).sum()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Share of the full rate at a step: it rises, stays, and falls to zero over the last `decay` of the steps."""
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.decay * recipe.steps))


def epoch(examples: Sequence[Example], tokenizer: ChatTokenizer, recipe: Recipe, number: int) -> list[Batch]:
    """All batches of an epoch, one a step; the recipe's seed and the epoch's number decide shuffling and changes."""
    rng = random.Random(f"{recipe.seed}:{number}")
    augment = Augmenter(examples, recipe.disguises)
    shuffled = rng.sample(examples, len(examples))
    changed = [augment(example, rng) if rng.random() < recipe.augmented else example for example in shuffled]
    plan = batches(changed, tokenizer, recipe.lengths, recipe.tokens_per_step)
    rng.shuffle(plan)
    return plan


def read(
    examples: Sequence[Example], tokenizer: ChatTokenizer, recipe: Recipe, number: int, place: int
) -> Iterator[Reading]:
    """One epoch after another without end, from a place within one on."""
    while True:
        plan = epoch(examples, tokenizer, recipe, number)
        for later in range(place, len(plan)):
            yield Reading(plan[later], number, later, len(plan))
        number, place = number + 1, 0


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

    The model is trained on the device where it is. Several processes take the steps that one would, each of them
    computing a share of every batch. The steps, and the share of them over which the learning rate falls, may differ
    from those of the run that goes on.
    Raises ConfigError where the file is of another recipe or of other rows.
    """
    model.freeze(recipe.frozen_blocks)
    optimizer = torch.optim.AdamW(_groups(model, recipe), betas=_BETAS, weight_decay=recipe.weight_decay, fused=True)
    state = out / "state.safetensors"
    run = fingerprint(recipe, examples, model)
    steps = recipe.steps
    step, *begin = restore(model, optimizer, state, run) if state.exists() else (0, recipe.first_epoch, 0)
    weight = sum(example.weight for example in examples)
    model.train()
    device = next(model.parameters()).device
    losses: list[float] = []
    tokens, since = 0, time.monotonic()
    for reading in islice(read(examples, tokenizer, recipe, *begin), max(0, steps - step)):
        batch = reading.batch.to(device)
        rate = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate
        # A row counts the same in a batch of many short rows as in one of few long ones.
        losses.append(_step(model, optimizer, batch, recipe, usual=weight / reading.batches))
        tokens += batch.ids.numel() * processes.count()
        step += 1
        if step % report_every == 0 or step == steps:
            speed = tokens / (time.monotonic() - since)
            left = (steps - step) * recipe.tokens_per_step / speed
            report(Progress(step, steps, sum(losses) / len(losses), rate, speed, left))
            losses, tokens, since = [], 0, time.monotonic()
        if processes.first() and (step % save_every == 0 or step == steps):
            save(model, optimizer, state, (step, reading.epoch, reading.place + 1), run)


def _groups(model: TurnModel, recipe: Recipe) -> list[dict[str, Any]]:
    """What is trained, by its full learning rate: lower blocks learn more slowly."""
    blocks = [
        {"params": list(block.parameters()), "full": recipe.learning_rate * recipe.block_decay**above}
        for above, block in enumerate(reversed(model.model.layers[recipe.frozen_blocks :]))
    ]
    norm = {"params": list(model.model.norm.parameters()), "full": recipe.learning_rate}
    return [{"params": list(model.score.parameters()), "full": recipe.head_learning_rate}, norm, *blocks]


def _step(model: TurnModel, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe, *, usual: float) -> float:
    """One update; returns the mean loss of a label, weighted."""
    optimizer.zero_grad()
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        logits = model(batch)
    total = loss_sum(logits, batch, recipe.hazard_loss)
    torch.autograd.backward(total / usual)
    processes.add_up(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    sums = torch.stack((total.detach(), batch.weights.sum()))
    processes.add_up([sums])
    return float(sums[0] / sums[1])


def fingerprint(recipe: Recipe, examples: Sequence[Example], base: nn.Module) -> str:
    """What must not change while a run is interrupted: the recipe, but for how long it goes on, its rows, its base."""
    digest = sha256(recipe.model_dump_json(exclude={"steps", "decay"}).encode())
    for example in examples:
        learned = (example.id, example.conversation, example.targets, example.hazards is None, example.weight)
        digest.update(repr(learned).encode("utf-8", "surrogatepass"))
    for name, tensor in base.state_dict().items():
        if "score." not in name:  # which begins by chance
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


# How many steps were taken, which epoch it is, and how many of its batches were read.
_At = tuple[int, int, int]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, at: _At, run: str) -> None:
    """Weights, the optimizer's moments and how far it is, in one file that appears whole or not at all."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"at": json.dumps(at), "run": run})
    partial.replace(path)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, run: str) -> _At:
    """Puts weights and moments back, and says how far they had come; raises ConfigError for another run's."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["run"] != run:
            raise ConfigError(f"{path}: is of a run by another recipe or on other rows")
        step, number, place = json.loads(metadata["at"])
        model.load_state_dict({name: file.get_tensor(name) for name in model.state_dict()})
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kept = {moment: file.get_tensor(f"{moment}:{name}") for moment in ("exp_avg", "exp_avg_sq")}
                kept["step"] = torch.tensor(float(step))
                optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in kept.items()}
    return step, number, place
