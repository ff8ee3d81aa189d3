"""Serves the same weights and the same requests through Guard and through other engines, each in a process of its own.

    python -m loadtest.bench                  every engine that is installed
    python -m loadtest.bench --engines guard  one of them

Prints a table: requests and tokens a second with all requests at hand, one request at a time, memory, the ratio to
transformers, and the share of what this machine's matrix products alone would allow.
"""

import argparse
import asyncio
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import Checkpoint, load_tensors, read_checkpoint
from guard.types import Conversation, Role, Turn
from loadtest.workload import texts, texts_of

Ids = list[int]
Run = Callable[[Sequence[Ids]], list[float]]  # token ids of requests to the logit `unsafe` of each


@dataclass
class Result:
    """One row of the table; seconds, MiB."""

    seconds: float
    single: dict[int, list[float]]  # tokens of a request to the seconds of each try
    memory: float
    logits: list[float]


def _ids(checkpoint: Checkpoint, some: Sequence[str]) -> list[Ids]:
    tokenizer = ChatTokenizer(checkpoint.path / "tokenizer.json", checkpoint.max_tokens)
    return [list(tokenizer.tokenise(Conversation((Turn(Role.USER, text),), 0))[0].ids) for text in some]


def _guard(checkpoint: Checkpoint, dtype: str) -> Run:
    """Guard's own engine: its batcher and its forward pass, without the network."""
    from guard.engine.batcher import Batcher
    from guard.engine.moderator import model_thread
    from guard.model.turn_classifier import TurnClassifier
    from guard.telemetry import Telemetry
    from guard.types import Coverage, Lane, Span, Tokens

    thread = model_thread()
    classifier = thread.submit(TurnClassifier, checkpoint.path, dtype=dtype).result()
    slope, offset = checkpoint.calibration["unsafe"]

    async def start() -> Batcher:
        telemetry = Telemetry.start("error")
        return Batcher(
            classifier.score, thread, max_batch_tokens=512, max_queue_seconds=1e9, rate=1.0, telemetry=telemetry
        )

    async def serve(requests: Sequence[Ids]) -> list[float]:
        tokens = [Tokens(tuple(ids), (Span(0, 0, len(ids), Coverage(len(ids), len(ids))),)) for ids in requests]
        done = await asyncio.gather(*(batcher.score(each, Lane.INTERACTIVE, None) for each in tokens))
        unsafe = torch.tensor([scored.scores[0].unsafe for scored in done], dtype=torch.float64)
        logits: list[float] = ((torch.logit(unsafe) - offset) / slope).tolist()
        return logits

    loop = asyncio.Runner()  # one loop and one model thread for all calls, as a server has
    batcher = loop.run(start())
    return lambda requests: loop.run(serve(requests))


def _transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> Run:
    """transformers in eager mode, batches sorted by length and padded."""
    from transformers import LlamaConfig, LlamaModel

    tensors = load_tensors(checkpoint.path, torch.float32)
    head, bias = tensors.pop("score.weight")[0], tensors.pop("score.bias")[0]
    model = LlamaModel(LlamaConfig(**checkpoint.config))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    model.eval()
    torch.nn.Module.to(model, dtype)

    @torch.inference_mode()
    def run(requests: Sequence[Ids]) -> list[float]:
        logits = [0.0] * len(requests)
        for batch in _by_length(requests, 2048):
            longest = max(len(requests[i]) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(requests[i])] = torch.tensor(requests[i])
                mask[row, : len(requests[i])] = 1
            whole = bool(mask.all())
            hidden: Tensor = model(ids, attention_mask=None if whole else mask, use_cache=False).last_hidden_state
            ends = torch.tensor([len(requests[i]) - 1 for i in batch])
            found = hidden[torch.arange(len(batch)), ends].float() @ head + bias
            for i, logit in zip(batch, found.tolist(), strict=True):
                logits[i] = logit
        return logits

    return run


def _openvino(checkpoint: Checkpoint) -> Run:
    """OpenVINO's CPU plug-in on a graph converted from transformers, at its own choice of precision."""
    import openvino
    from transformers import LlamaConfig, LlamaModel

    tensors = load_tensors(checkpoint.path, torch.float32)
    head, bias = tensors.pop("score.weight")[0], tensors.pop("score.bias")[0]

    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaModel(LlamaConfig(**checkpoint.config)).eval()
            self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})

        def forward(self, ids: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
            hidden: Tensor = self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden[torch.arange(ids.shape[0]), ends] @ head + bias

    example = (torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), torch.tensor([3, 7]))
    with torch.no_grad():
        compiled = openvino.compile_model(openvino.convert_model(Scorer(), example_input=example), "CPU")

    def run(requests: Sequence[Ids]) -> list[float]:
        logits = [0.0] * len(requests)
        for batch in _by_length(requests, 2048):
            longest = max(len(requests[i]) for i in batch)
            ids = [requests[i] + [0] * (longest - len(requests[i])) for i in batch]
            mask = [[1] * len(requests[i]) + [0] * (longest - len(requests[i])) for i in batch]
            ends = [len(requests[i]) - 1 for i in batch]
            found = compiled([torch.tensor(each).numpy() for each in (ids, mask, ends)])[0]
            for i, logit in zip(batch, found.tolist(), strict=True):
                logits[i] = logit
        return logits

    return run


def _by_length(requests: Sequence[Ids], tokens: int) -> list[list[int]]:
    """Indices of requests in batches of at most `tokens` with padding, longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i])):
        if batches and len(requests[batches[-1][0]]) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(frozen=True)
class Engine:
    load: Callable[[Checkpoint], Run]
    needs: str = "torch"


ENGINES = {
    "guard": Engine(partial(_guard, dtype="auto")),
    "guard bfloat16": Engine(partial(_guard, dtype="bfloat16")),
    "transformers bfloat16": Engine(partial(_transformers, dtype=torch.bfloat16), "transformers"),
    "transformers float32": Engine(partial(_transformers, dtype=torch.float32), "transformers"),
    "openvino": Engine(_openvino, "openvino"),
}
_BASELINE = "transformers bfloat16"
_SINGLE = {32: 12, 60: 40, 128: 12, 512: 6}  # tokens of a request to how many are sent, one after the other


def measure(name: str, checkpoint: Checkpoint, count: int) -> Result:
    """Runs one engine in this process."""
    tokenizer_json = checkpoint.path / "tokenizer.json"
    requests = _ids(checkpoint, texts(count, tokenizer_json))
    run = ENGINES[name].load(checkpoint)
    run(requests[: max(4, count // 10)])
    started = time.perf_counter()
    logits = run(requests)
    seconds = time.perf_counter() - started
    single = {}
    for tokens, tries in _SINGLE.items():
        each = _ids(checkpoint, texts_of(tokens, tries + 3, tokenizer_json))
        times = [_timed(run, [ids]) for ids in each]
        single[tokens] = times[3:]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Result(seconds, single, memory, logits)


def _timed(run: Callable[..., object], *arguments: Any) -> float:
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def product_rate(config: dict[str, Any], dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """FLOP/s of all matrix products of the blocks at `rows` tokens, the better of two forms; and FLOP a token."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    shapes = [(hidden, qkv), (heads * dim, hidden), (hidden, 2 * inner), (inner, hidden)] * config["num_hidden_layers"]
    inputs = {width: torch.randn(rows, width, dtype=dtype) for width in {width for width, _ in shapes}}
    weights = [torch.randn(out, width, dtype=dtype) for width, out in shapes]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]

    def plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    def reordered() -> None:
        for (width, _), weight in zip(shapes, packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "")

    flop = 2.0 * sum(width * out for width, out in shapes)
    with torch.inference_mode():
        best = min(min(_timed(form) for _ in range(4)) for form in (plain, reordered))
    return flop * rows / best, flop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "guard" / "model" / "default")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--measure", choices=ENGINES, help=argparse.SUPPRESS)  # how a row's own process is called
    options = parser.parse_args()
    checkpoint = read_checkpoint(options.model)
    if options.measure:
        json.dump(asdict(measure(options.measure, checkpoint, options.requests)), sys.stdout)
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    lengths = sorted(len(ids) for ids in _ids(checkpoint, texts(options.requests, options.model / "tokenizer.json")))
    tokens = sum(lengths)
    console.print(
        f"{options.requests} requests, {tokens:,} tokens: median {median(lengths):.0f}, "
        f"p95 {lengths[int(len(lengths) * 0.95)]}, longest {lengths[-1]}; {torch.get_num_threads()} threads"
    )
    limit = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (512, 2048):
            rate, flop = product_rate(dict(checkpoint.config), dtype, rows)
            limit = max(limit, rate / flop)
            console.print(
                f"matrix products alone, {dtype}, {rows} tokens: {rate / 1e12:.3f} TFLOP/s, {rate / flop:,.0f} tokens/s"
            )
    results = {}
    for name in options.engines:
        if importlib.util.find_spec(ENGINES[name].needs):
            command = [sys.executable, "-m", "loadtest.bench", "--measure", name, "--model", str(options.model)]
            done = subprocess.run([*command, "--requests", str(options.requests)], capture_output=True, text=True)
            if done.returncode:
                console.print(f"{name}: failed\n{done.stderr[-2000:]}", style="red", markup=False)
                continue
            results[name] = Result(**json.loads(done.stdout))
            console.print(f"{name}: {results[name].seconds:.1f} s", style="dim")
    console.print(_table(results, options.requests, tokens, limit))


def _table(results: dict[str, Result], requests: int, tokens: int, limit: float) -> Table:
    table = Table("engine", title="the same weights, the same requests, one run")
    columns = (
        "requests/s",
        "tokens/s",
        f"x {_BASELINE}",
        "of the limit",
        "60 tokens p50 / p99 ms",
        "32 / 128 / 512 ms",
    )
    for column in (*columns, "memory MiB", "largest difference of a logit"):
        table.add_column(column, justify="right")
    baseline = results.get(_BASELINE)
    reference = results.get("transformers float32") or baseline
    for name, result in results.items():
        single = {int(length): times for length, times in result.single.items()}
        percentiles = quantiles(single[60], n=100, method="inclusive")
        apart = (
            max(abs(a - b) for a, b in zip(result.logits, reference.logits, strict=True)) if reference else float("nan")
        )
        table.add_row(
            name,
            f"{requests / result.seconds:.1f}",
            f"{tokens / result.seconds:,.0f}",
            f"{baseline.seconds / result.seconds:.2f}" if baseline else "-",
            f"{tokens / result.seconds / limit:.0%}",
            f"{percentiles[49] * 1000:.1f} / {percentiles[98] * 1000:.1f}",
            " / ".join(f"{median(single[length]) * 1000:.1f}" for length in (32, 128, 512)),
            f"{result.memory:,.0f}",
            f"{apart:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
