"""Serves the same weights and the same requests through Guard and through other engines, each in a process of its own.

    python -m loadtest.bench                                            every engine that is installed
    python -m loadtest.bench --engines guard                            one of them
    python -m loadtest.bench --python vllm=/opt/vllm/bin/python         and one that another interpreter has

Prints a table: requests and tokens a second with all requests at hand, one request at a time, memory, the ratio to
transformers, and the share of what this machine's matrix products alone would allow.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import Checkpoint, load_tensors, read_checkpoint
from guard.types import Conversation, Role, Turn
from loadtest.engines import ENGINES, NOT_INSTALLED, Ids, Result, Work, write_work
from loadtest.workload import texts, texts_of

_BASELINE = "transformers bfloat16"
_SINGLE = {32: 12, 60: 40, 128: 12, 512: 6}  # tokens of a request to how many are timed, one after the other
_UNTIMED = 3  # of each length, before them
_ROOT = Path(__file__).parents[1]


def write(directory: Path, checkpoint: Checkpoint, count: int, threads: int) -> Work:
    """Writes what the engines are given: the model as a Hugging Face checkpoint in float32, and the work."""
    tensors = load_tensors(checkpoint.path, torch.float32)
    head, bias = tensors.pop("score.weight")[0], tensors.pop("score.bias")[0]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
    tokenizer_json = checkpoint.path / "tokenizer.json"
    shutil.copy(tokenizer_json, directory)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    slope, offset = checkpoint.calibration[Role.USER]["unsafe"]
    single = {tokens: texts_of(tokens, _UNTIMED + timed, tokenizer_json) for tokens, timed in _SINGLE.items()}
    work = Work(
        checkpoint=str(checkpoint.path.resolve()),
        head=(slope * head).tolist(),
        bias=slope * bias.item() + offset,
        threads=threads,
        untimed=_UNTIMED,
        requests=_ids(checkpoint, texts(count, tokenizer_json)),
        single={str(tokens): _ids(checkpoint, some) for tokens, some in single.items()},
    )
    write_work(directory, work)
    return work


def _ids(checkpoint: Checkpoint, some: Sequence[str]) -> list[Ids]:
    tokenizer = ChatTokenizer(checkpoint.path / "tokenizer.json", checkpoint.max_tokens)
    return [list(tokenizer.tokenise(Conversation((Turn(Role.USER, text),), 0))[0].ids) for text in some]


def measure(name: str, python: str, directory: Path, threads: int) -> subprocess.CompletedProcess[str]:
    """Runs one engine in a process of its own, offline."""
    # vLLM's telemetry heeds DO_NOT_TRACK, OpenVINO's heeds CI.
    settings = {"CI": "true", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [python, "-m", "loadtest.engines", name, str(directory)]
    return subprocess.run(
        command, cwd=_ROOT, env=os.environ | settings, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def product_rate(config: dict[str, Any], dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """FLOP/s of all matrix products of the blocks at `rows` tokens, the better of two forms; and FLOP a token."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * dim
    shapes = [(hidden, qkv), (heads * dim, hidden), (hidden, 2 * inner), (inner, hidden)] * config["num_hidden_layers"]
    inputs = {width: torch.randn(rows, width, dtype=dtype) for width in {width for width, _ in shapes}}
    weights = [torch.randn(out, width, dtype=dtype) for width, out in shapes]

    def plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    forms = [plain]
    if dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]

        def reordered() -> None:
            for (width, _), weight in zip(shapes, packed, strict=True):
                torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "")

        forms.append(reordered)
    flop = 2.0 * sum(width * out for width, out in shapes)
    with torch.inference_mode():
        best = min(min(_timed(form) for _ in range(4)) for form in forms)
    return flop * rows / best, flop


def _timed(form: Callable[[], None]) -> float:
    started = time.perf_counter()
    form()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_ROOT / "guard" / "model" / "default")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[],
        metavar="PACKAGE=PATH",
        help="the interpreter that has an engine's package: vllm, llama_cpp, openvino, transformers",
    )
    options = parser.parse_args()
    interpreters = dict(options.python)
    torch.set_num_threads(options.threads)
    checkpoint = read_checkpoint(options.model)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with TemporaryDirectory() as name:
        directory = Path(name)
        work = write(directory, checkpoint, options.requests, options.threads)
        lengths = sorted(map(len, work.requests))
        console.print(
            f"{len(lengths)} requests, {sum(lengths):,} tokens: median {median(lengths):.0f}, "
            f"p95 {lengths[int(len(lengths) * 0.95)]}, longest {lengths[-1]}; {options.threads} threads"
        )
        limit = 0.0
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (512, 2048):
                rate, flop = product_rate(dict(checkpoint.config), dtype, rows)
                limit = max(limit, rate / flop)
                console.print(
                    f"matrix products alone, {dtype}, {rows} tokens: "
                    f"{rate / 1e12:.3f} TFLOP/s, {rate / flop:,.0f} tokens/s"
                )
        results = {}
        for engine in options.engines:
            package = ENGINES[engine].package
            python = interpreters.get(package, sys.executable)
            done = measure(engine, python, directory, options.threads)
            if done.returncode == NOT_INSTALLED:
                console.print(f"{engine}: left out, {python} has no {package}", style="dim", markup=False)
            elif done.returncode:
                console.print(f"{engine}: failed\n{done.stderr[-2000:]}", style="red", markup=False)
            else:
                results[engine] = Result(**json.loads(done.stdout.splitlines()[-1]))
                console.print(f"{engine}: {results[engine].seconds:.1f} s", style="dim")
    console.print(_table(results, len(lengths), sum(lengths), limit))


def _interpreter(text: str) -> tuple[str, str]:
    package, _, path = text.partition("=")
    if not path or package not in {engine.package for engine in ENGINES.values()}:
        raise argparse.ArgumentTypeError(f"{text!r} is not PACKAGE=PATH of an engine")
    return package, str(Path(path).absolute())  # not resolved: a virtual environment's is a link


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
    for column in (*columns, "memory MiB", "largest difference of P(unsafe)"):
        table.add_column(column, justify="right")
    baseline = results.get(_BASELINE)
    reference = results.get("transformers float32") or baseline
    for name, result in results.items():
        percentiles = quantiles(result.single["60"], n=100, method="inclusive")
        apart = (
            max(abs(a - b) for a, b in zip(result.unsafe, reference.unsafe, strict=True)) if reference else float("nan")
        )
        table.add_row(
            name,
            f"{requests / result.seconds:.1f}",
            f"{tokens / result.seconds:,.0f}",
            f"{baseline.seconds / result.seconds:.2f}" if baseline else "-",
            f"{tokens / result.seconds / limit:.0%}",
            f"{percentiles[49] * 1000:.1f} / {percentiles[98] * 1000:.1f}",
            " / ".join(f"{median(result.single[length]) * 1000:.1f}" for length in ("32", "128", "512")),
            f"{result.memory:,.0f}",
            f"{apart:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
