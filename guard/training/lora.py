"""Fine-tunes a Llama Guard checkpoint by LoRA, on its own prompts and answers, and merges what it learned into it.

A prompt is the checkpoint's own, the answer what it should say: `safe`, or `unsafe` and below it the codes of its
categories. Nothing is learned of the prompt. Where the kind of harm is unknown, nothing is of what follows `unsafe`.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from guard.errors import ConfigError
from guard.model.checkpoint import MANIFEST, read_config, tensor_files
from guard.model.llama_guard import (
    candidates,
    end_tokens,
    is_llama_guard,
    likeliest,
    longest_prompt,
    read_tokenizer,
    revision_of,
)
from guard.model.prompt import PromptTokenizer
from guard.training import processes
from guard.training.base import load_language_model
from guard.training.data import Example
from guard.training.finetune import Progress, restore, save

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STATE = "lora.safetensors"
_COPIED = (".json", ".jinja", ".model", ".txt")
_MAX_TOKENS = 2048  # of a prompt; of a longer one the middle is left out, as where it is served
_BATCH_TOKENS = 4096  # that go through the model at a time, padding among them
_EPOCHS = 3
_WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class Plan:
    """How it is trained: a step learns from so many `rows`. `steps` 0 are as many as read each row three times.

    Every so many steps it is saved, where there is a place for that, and reported.
    """

    steps: int = 0
    rank: int = 16
    learning_rate: float = 2e-4
    rows: int = 16
    seed: int = 0
    save_every: int = 50
    report_every: int = 10


class Row(NamedTuple):
    """A prompt and its answer; the last `answer` of the tokens are to be learned."""

    ids: tuple[int, ...]
    answer: int


def train(
    base: Path,
    examples: Sequence[Example],
    out: Path,
    plan: Plan,
    *,
    work: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Writes the directory `out`: `base` with what was learned merged into it, every other file as it is there.

    The weights are bfloat16 on a GPU, float32 on the CPU; what is written is of the type that the base's files have.
    With `work`, a run that was stopped goes on from its last save there; its `steps` may change then. Returns the
    number of rows, of steps and of parameters that were trained, and the `loss` of a row in the last steps.
    Raises ConfigError for a base that is none, rows of one label only, or a `work` of another run.
    """
    _check(base, examples, out)
    plan = replace(plan, steps=plan.steps or -(-_EPOCHS * len(examples) // plan.rows))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(base, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    rows = read_rows(base, model, examples)
    torch.manual_seed(plan.seed)
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, lora_dropout=0.0, target_modules=list(_PROJECTIONS))
    adapted = LoraModel(model, config, "default")
    model.train()
    adapter = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
    adapter.float()  # small steps are lost on bfloat16
    loss = _learn(model, adapter, rows, plan, work and work / _STATE, _fingerprint(base, rows, plan), report)
    count = sum(parameter.numel() for parameter in adapter)
    _export(base, adapted.merge_and_unload().state_dict(), out)
    unsafe = sum(example.unsafe for example in examples)
    return {"rows": len(rows), "unsafe": unsafe, "steps": plan.steps, "parameters": count, "loss": loss}


def _check(base: Path, examples: Sequence[Example], out: Path) -> None:
    if not processes.first():
        raise ConfigError("LoRA trains in one process")
    if out.resolve() == base.resolve():
        raise ConfigError(f"{out}: is the checkpoint to start from")
    if (base / MANIFEST).exists() or not is_llama_guard(base) or read_config(base).get("model_type") != "llama":
        raise ConfigError(f"{base}: expected a Llama Guard checkpoint as Hugging Face has it, of model_type llama")
    unsafe = sum(example.unsafe for example in examples)
    if not 0 < unsafe < len(examples):
        raise ConfigError(f"expected rows of either label, found {unsafe} unsafe and {len(examples) - unsafe} safe")


def read_rows(base: Path, model: LlamaForCausalLM, examples: Sequence[Example]) -> list[Row]:
    """Prompts with the answers to learn, as `model`, the checkpoint `base`, words them now."""
    config, tokenizer = read_config(base), read_tokenizer(base)

    def read(sequences: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]]) -> list[list[Mapping[int, float]]]:
        return [_logits(model, ids, own) for ids, own in zip(sequences, places, strict=True)]

    ends = end_tokens(config)
    lead = likeliest(candidates(tokenizer, ends), tokenizer, read).lead
    frame = tokenizer.frame()
    room = min(longest_prompt(config), _MAX_TOKENS)

    def prompt(example: Example, answer: tuple[int, ...]) -> tuple[int, ...]:
        return tokenizer.tokenise(example.conversation, "head-tail", frame, room - len(answer))[0].ids

    safe = tokenizer.answer(f"{lead}safe")
    harmless = next(example for example in examples if not example.unsafe)
    ((said,),) = read([(*prompt(harmless, safe), *safe)], [[-1]])
    end = (max(ends, key=said.__getitem__),) if ends else ()  # of several, the one that it uses
    rows = []
    for example in examples:
        answer = _answer(tokenizer, lead, example, end)
        rows.append(Row((*prompt(example, answer), *answer), len(answer)))
    return rows


def _answer(tokenizer: PromptTokenizer, lead: str, example: Example, end: tuple[int, ...]) -> tuple[int, ...]:
    """What it is to say, with the `end`; without what hangs on the kind of harm, where none that it knows is given."""
    if not example.unsafe:
        return *tokenizer.answer(f"{lead}safe"), *end
    names = tokenizer.names
    known = [
        code for name, code in zip(names, tokenizer.codes(len(names)), strict=True) if name in (example.hazards or ())
    ]
    if not known:
        return tokenizer.answer(f"{lead}unsafe")
    return *tokenizer.answer(f"{lead}unsafe\n{','.join(known)}"), *end


def _logits(model: LlamaForCausalLM, ids: tuple[int, ...], places: Sequence[int]) -> list[Mapping[int, float]]:
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state
        return [dict(enumerate(row)) for row in model.lm_head(hidden[0, list(places)]).float().tolist()]


def _learn(
    model: LlamaForCausalLM,
    adapter: nn.ParameterList,
    rows: Sequence[Row],
    plan: Plan,
    state: Path | None,
    run: str,
    report: Callable[[Progress], None],
) -> float | None:
    """Trains the adapter; returns the mean loss of a row in the last steps, None where none was left to take."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=plan.learning_rate, weight_decay=0.0, fused=True)
    begin = restore(adapter, optimizer, state, run)[0] if state and state.exists() else 0
    if state:
        state.parent.mkdir(parents=True, exist_ok=True)
    steps, loss = plan.steps, None
    losses, tokens, since = list[float](), 0, time.monotonic()
    for step in range(begin, steps):
        share = _share(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * share
        chosen = [rows[place] for place in drawn(len(rows), step, plan)]
        losses.append(_step(model, adapter, optimizer, chosen))
        tokens += sum(len(row.ids) for row in chosen)
        done = step + 1
        if state and (done % plan.save_every == 0 or done == steps):
            save(adapter, optimizer, state, (done, 0, 0), run)
        if done % plan.report_every == 0 or done == steps:
            loss = sum(losses) / len(losses)
            speed = tokens / (time.monotonic() - since)
            left = (steps - done) * tokens / len(losses) / speed
            report(Progress(done, steps, loss, share, speed, left))
            losses, tokens, since = [], 0, time.monotonic()
    return loss


def drawn(count: int, step: int, plan: Plan) -> list[int]:
    """Which of `count` rows a step learns from: each epoch has them all once, in an order that its number decides."""
    places = range(step * plan.rows, (step + 1) * plan.rows)
    return [_order(count, plan.seed, place // count)[place % count] for place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)


def _share(step: int, steps: int) -> float:
    """Of the full learning rate: it rises, then falls to zero."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _step(
    model: LlamaForCausalLM, adapter: nn.ParameterList, optimizer: torch.optim.Optimizer, rows: Sequence[Row]
) -> float:
    """One update; returns the mean loss of a row, which is that of its answer's tokens added up."""
    optimizer.zero_grad()
    total = 0.0
    for batch in _batches(rows):
        loss = _loss(model, batch) / len(rows)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    return total


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of alike lengths, as many as fit when they are padded to the longest of them, but one at least."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and len(row.ids) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> Tensor:
    """The cross-entropy of all tokens of all answers, added up."""
    length = max(len(row.ids) for row in rows)
    ids, learned = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for place, row in enumerate(rows):
        end = len(row.ids)
        ids[place, :end] = torch.tensor(row.ids)
        learned[place, end - row.answer : end] = 1
    ids, later = ids.to(model.device), learned[:, 1:].bool().to(model.device)
    logits = model.lm_head(_hidden(model, ids)[:, :-1][later]).float()  # [learned tokens, vocabulary]
    return functional.cross_entropy(logits, ids[:, 1:][later], reduction="sum")


def _hidden(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """What the head is given, [rows, length, hidden]; padding comes last, where no other token looks at it."""
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1], device=ids.device)[None])
    for block in model.model.layers:  # what is inside of one is computed again for the gradients, not kept
        hidden = checkpoint(block, hidden, position_embeddings=rotary, use_reentrant=False)
    normed: Tensor = model.model.norm(hidden)
    return normed


def _fingerprint(base: Path, rows: Sequence[Row], plan: Plan) -> str:
    """What must not change while a run is interrupted: all but how long it goes on."""
    kept = revision_of(base), plan.rank, plan.learning_rate, plan.rows, plan.seed, [tuple(row) for row in rows]
    return sha256(repr(kept).encode()).hexdigest()


def _export(base: Path, trained: Mapping[str, Tensor], out: Path) -> None:
    """The base's files, and in them the matrices that were trained, each in the type that it had there."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(base.iterdir()):
        if file.suffix in _COPIED:
            copyfile(file, out / file.name)
    for shard in tensor_files(base):
        stored = load_file(shard)
        for name in stored:
            if name.split(".")[-2] in _PROJECTIONS:
                stored[name] = trained[name].to("cpu", stored[name].dtype).contiguous()
        save_file(stored, out / shard.name, metadata={"format": "pt"})
