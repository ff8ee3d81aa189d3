"""The engines that are compared, each run in a process, and where it must in an interpreter, of its own.

    PYTHON -m loadtest.engines NAME DIRECTORY

DIRECTORY holds the model as a Hugging Face checkpoint (float32 safetensors) and the work, `work.json`. The last line of
the output is the result as JSON. What another interpreter needs is the engine's own packages alone: nothing of Guard.
"""

import asyncio
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Ids = list[int]
Run = Callable[[Sequence[Ids]], list[float]]  # token ids of requests to the probability `unsafe` of each

NOT_INSTALLED = 3  # exit status
_WORK = "work.json"
_BATCH_TOKENS = 2048  # of a padded batch


@dataclass(frozen=True)
class Work:
    """What every engine is given; `unsafe` is sigmoid(head @ hidden + bias), `hidden` the state at the last token."""

    checkpoint: str  # Guard's own directory of the same model
    head: list[float]
    bias: float
    threads: int
    untimed: int  # of the requests in each list of `single`, the first
    requests: list[Ids]
    single: dict[str, list[Ids]]  # tokens of a request to the requests sent one after the other

    @property
    def longest(self) -> int:
        return max(len(ids) for requests in (self.requests, *self.single.values()) for ids in requests)


@dataclass(frozen=True)
class Result:
    """What an engine did; seconds, MiB."""

    seconds: float
    single: dict[str, list[float]]  # tokens of a request to the seconds of each
    memory: float  # the most that was resident
    unsafe: list[float]


def _guard(directory: Path, work: Work, dtype: str) -> Run:
    """Guard's own engine: its batcher and its forward pass, without the network."""
    from guard.engine.batcher import Batcher
    from guard.engine.moderator import model_thread
    from guard.model.turn_classifier import TurnClassifier
    from guard.telemetry import Telemetry
    from guard.types import Coverage, Lane, Role, Span, Tokens

    thread = model_thread()
    classifier = thread.submit(TurnClassifier, Path(work.checkpoint), dtype=dtype).result()

    async def start() -> Batcher:
        telemetry = Telemetry.start("error")
        return Batcher(
            classifier.score, thread, max_batch_tokens=512, max_queue_seconds=1e9, rate=1.0, telemetry=telemetry
        )

    async def serve(requests: Sequence[Ids]) -> list[float]:
        ends = [Span(0, Role.USER, 0, len(ids), Coverage(len(ids), len(ids))) for ids in requests]
        tokens = [Tokens(tuple(ids), (end,)) for ids, end in zip(requests, ends, strict=True)]
        done = await asyncio.gather(*(batcher.score([each], Lane.INTERACTIVE, None) for each in tokens))
        return [scored.scores[0].unsafe for scored in done]

    loop = asyncio.Runner()  # one loop and one model thread for all calls, as a server has
    batcher = loop.run(start())
    return lambda requests: loop.run(serve(requests))


def _transformers(directory: Path, work: Work, dtype: str) -> Run:
    """transformers in eager mode, batches sorted by length and padded."""
    import torch
    from transformers import LlamaModel

    model = LlamaModel.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def last(ids: Any, mask: Any, ends: Any) -> Any:
        whole = bool(mask.all())
        hidden = model(
            torch.from_numpy(ids), attention_mask=None if whole else torch.from_numpy(mask), use_cache=False
        ).last_hidden_state
        return hidden[torch.arange(len(ends)), torch.from_numpy(ends)].float().numpy()

    return _padded(last, work)


def _openvino(directory: Path, work: Work, dtype: str) -> Run:
    """OpenVINO's CPU plug-in on a graph converted from transformers, batches sorted by length and padded."""
    import openvino

    graph = directory / "openvino.xml"
    _apart(_to_openvino, directory, graph)
    settings = {
        "INFERENCE_NUM_THREADS": work.threads,
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",  # all threads upon one batch
    }
    compiled = openvino.compile_model(graph, "CPU", settings)
    return _padded(lambda *inputs: compiled(inputs)[0], work)


def _to_openvino(directory: Path, graph: Path) -> None:
    import openvino
    import torch
    from transformers import LlamaModel

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaModel.from_pretrained(directory, dtype=torch.float32)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden[torch.arange(ids.shape[0]), ends]

    example = (torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), torch.tensor([3, 7]))
    with torch.no_grad():
        converted = openvino.convert_model(Last().eval(), example_input=example)
    openvino.save_model(converted, graph, compress_to_fp16=False)


def _vllm(directory: Path, work: Work, dtype: str) -> Run:
    """vLLM's pooling runner, which batches for itself, in this process."""
    # Threads are OMP_NUM_THREADS, as everywhere here: left to itself vLLM keeps one core free and binds to the rest.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM
    from vllm.config import PoolerConfig

    model = LLM(
        model=str(directory),
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(seq_pooling_type="LAST", use_activation=False),
        dtype=dtype,
        max_num_batched_tokens=_BATCH_TOKENS,
        enable_prefix_caching=False,  # requests are sent more than once
        kv_cache_memory_bytes=1 << 29,
    )

    def run(requests: Sequence[Ids]) -> list[float]:
        done = model.embed([{"prompt_token_ids": ids} for ids in requests], use_tqdm=False)
        return _unsafe([each.outputs.embedding for each in done], work)

    return run


def _llamacpp(directory: Path, work: Work, dtype: str) -> Run:
    """llama.cpp's embeddings, packed into batches by its Python binding, which are as long as the longest request."""
    import llama_cpp

    path = directory / "model.gguf"
    _apart(_to_gguf, directory, path, dtype)
    model = llama_cpp.Llama(
        str(path),
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_LAST,
        attention_type=llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL,
        n_ctx=work.longest,
        n_batch=work.longest,
        n_ubatch=work.longest,
        n_threads=work.threads,
        n_threads_batch=work.threads,
        flash_attn=True,
        tokenizer=SimpleNamespace(tokenize=lambda text, *_: [int(each) for each in text.split()]),  # ids, as text
        verbose=False,
    )
    return lambda requests: _unsafe(model.embed([" ".join(map(str, ids)) for ids in requests]), work)


def _to_gguf(directory: Path, path: Path, dtype: str) -> None:
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA_EMBED, config["num_hidden_layers"])
    # A Llama without a head over the vocabulary and without a cache, neither of which a score needs.
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA_EMBED])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbours, transformers one half by the other
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and dtype == "bfloat16":
            kind = gguf.GGMLQuantizationType.BF16
        stored = names[name.removesuffix(".weight")]
        writer.add_tensor(f"{stored}.weight", gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _apart(convert: Callable[..., None], *arguments: Any) -> None:
    """Converts in a process of its own, whose memory is not the engine's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(convert, *arguments).result()


def _padded(last: Callable[[Any, Any, Any], Any], work: Work) -> Run:
    """Runs `last`, from ids [rows, longest], mask [rows, longest] and ends [rows] to hidden states [rows, hidden]."""
    import numpy as np

    def run(requests: Sequence[Ids]) -> list[float]:
        unsafe = [0.0] * len(requests)
        for batch in _by_length(requests):
            ids = np.zeros((len(batch), len(requests[batch[0]])), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(requests[i])] = requests[i]
                mask[row, : len(requests[i])] = 1
            for i, probability in zip(batch, _unsafe(last(ids, mask, mask.sum(axis=1) - 1), work), strict=True):
                unsafe[i] = probability
        return unsafe

    return run


def _by_length(requests: Sequence[Ids]) -> list[list[int]]:
    """Indices of requests in batches of at most `_BATCH_TOKENS` with padding, longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i])):
        if batches and len(requests[batches[-1][0]]) * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _unsafe(states: Any, work: Work) -> list[float]:
    """The head upon states [rows, hidden]."""
    import numpy as np

    logits = np.asarray(states, np.float32) @ np.array(work.head, np.float32) + work.bias
    unsafe: list[float] = (1 / (1 + np.exp(-logits))).tolist()
    return unsafe


@dataclass(frozen=True)
class Engine:
    load: Callable[[Path, Work], Run]
    package: str


ENGINES = {
    "guard": Engine(partial(_guard, dtype="auto"), "guard"),
    "guard int8": Engine(partial(_guard, dtype="int8"), "guard"),
    "guard bfloat16": Engine(partial(_guard, dtype="bfloat16"), "guard"),
    "guard float32": Engine(partial(_guard, dtype="float32"), "guard"),
} | {
    f"{name} {dtype}": Engine(partial(load, dtype=dtype), package)
    for name, load, package in (
        ("transformers", _transformers, "transformers"),
        ("openvino", _openvino, "openvino"),
        ("vllm", _vllm, "vllm"),
        ("llama.cpp", _llamacpp, "llama_cpp"),
    )
    for dtype in ("bfloat16", "float32")
}


def read_work(directory: Path) -> Work:
    return Work(**json.loads((directory / _WORK).read_text(encoding="utf-8")))


def write_work(directory: Path, work: Work) -> None:
    (directory / _WORK).write_text(json.dumps(asdict(work)), encoding="utf-8")


def measure(engine: Engine, directory: Path) -> Result:
    """Runs an engine in this process."""
    work = read_work(directory)
    run = engine.load(directory, work)
    run(work.requests[: max(4, len(work.requests) // 10)])
    started = time.perf_counter()
    unsafe = run(work.requests)
    seconds = time.perf_counter() - started
    single = {
        tokens: [_timed(run, [ids]) for ids in requests][work.untimed :] for tokens, requests in work.single.items()
    }
    return Result(seconds, single, _memory(), unsafe)


def _timed(run: Run, requests: Sequence[Ids]) -> float:
    started = time.perf_counter()
    run(requests)
    return time.perf_counter() - started


def _memory() -> float:
    """The most that was resident in this process, MiB; `getrusage` would count the process that started it, too."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak
    return int(peak[1]) / 1024


def main() -> None:
    engine = ENGINES[sys.argv[1]]
    if not importlib.util.find_spec(engine.package):
        sys.exit(NOT_INSTALLED)
    print("\n" + json.dumps(asdict(measure(engine, Path(sys.argv[2])))))


if __name__ == "__main__":
    main()
