"""What one prefill of a Llama Guard checkpoint says and costs, against generate() of transformers on the same weights.

    python -m loadtest.llama_guard                         500 conversations, on a small checkpoint that it makes
    python -m loadtest.llama_guard --blocks 8 --heads 9    on a larger one

Prints how many verdicts agree and how far logits differ; and the time of a request by generate(), by one prefill, and
by one prefill on a held prompt, one by one. Then what becomes of texts that try to break out of the prompt.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers.utils import logging

from guard.engine.prefix_cache import PrefixCache
from guard.model.llama_guard import LlamaGuard
from guard.telemetry import Metrics
from guard.types import Conversation, Turn
from tests.model.llama_guards import Prompts, generate, make
from tests.model.test_llama_guard import conversation
from tests.model.test_prompt import BREAKS

_TIMED = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2, help="of 64 dimensions each")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with TemporaryDirectory() as name:
        path = Path(name) / "checkpoint"
        make(path, "8b", layers=options.blocks, heads=options.heads, inner=192 * options.heads)
        model = LlamaGuard(path, "cpu", "float32")
        theirs: Any = transformers.LlamaForCausalLM.from_pretrained(path).eval()
        prompts = Prompts(path)
        print(f"{model.info.parameters / 1e6:.1f} million parameters, {torch.get_num_threads()} threads, float32")
        _agree(model, theirs, prompts, [conversation(seed) for seed in range(options.conversations)])
        _time(model, theirs, prompts, [conversation(seed) for seed in range(1000, 1000 + _TIMED)])
        _break_out(model, prompts)


def _agree(model: LlamaGuard, theirs: Any, prompts: Prompts, said: Sequence[Conversation]) -> None:
    same, answered, furthest, unsafe_ones = 0, 0, 0.0, 0
    safe, unsafe = (prompts.theirs.convert_tokens_to_ids(word) for word in ("safe", "unsafe"))
    for one in said:
        ids = prompts.ids([turn.text for turn in one.turns])
        generated = generate(theirs, ids)
        answer = prompts.theirs.decode(generated.sequences[0][len(ids) :]).strip()
        ((found,),) = model.score(model.tokenise(one))
        answered += answer.startswith(("safe", "unsafe"))  # or so small a model says neither
        same += answer.startswith("unsafe" if found.unsafe > 0.5 else "safe")
        unsafe_ones += answer.startswith("unsafe")
        logits = generated.logits[0][0]
        gap = math.log(found.unsafe / (1 - found.unsafe)) - float(logits[unsafe] - logits[safe])
        furthest = max(furthest, abs(gap))
    print(f"{len(said)} conversations: generate() says safe or unsafe in {answered}, unsafe in {unsafe_ones}")
    print(f"verdicts of one prefill that are the same: {same}")
    print(f"largest difference of the logits' difference, unsafe - safe: {furthest:.2g}")


def _time(model: LlamaGuard, theirs: Any, prompts: Prompts, said: Sequence[Conversation]) -> None:
    cache = PrefixCache(model, 64 * model.page_bytes, Metrics())
    windows = [replace(*model.tokenise(one), tenant="one") for one in said]
    texts = [prompts.ids([turn.text for turn in one.turns]) for one in said]

    def held(place: int) -> None:
        cache.score([replace(windows[place], tenant=None)])  # so that the prompt alone is held

    ways: dict[str, Callable[[int], Any]] = {
        "generate()": lambda place: generate(theirs, texts[place]),
        "one prefill": lambda place: model.score([windows[place]]),
        "one prefill, prompt held": held,
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for place in range(len(said)):  # by turns, since the machine may be busier now than then
        for way, run in ways.items():
            started = time.perf_counter()
            run(place)
            spent[way].append(time.perf_counter() - started)
    lengths = [len(tokens.ids) for tokens in windows]
    shared = windows[0].shared // 64 * 64
    print(f"one request at a time, {median(lengths):.0f} tokens, of which {shared} are held: median of {len(said)}")
    first = median(spent["generate()"])
    for way, times in spent.items():
        print(f"  {way:25} {1000 * median(times):8.1f} ms   {first / median(times):5.2f} x")


def _break_out(model: LlamaGuard, prompts: Prompts) -> None:
    plain = prompts.ids(["hello"])
    special = set(prompts.theirs.all_special_ids)
    for text in BREAKS:
        (tokens,) = model.tokenise(Conversation((Turn(conversation(0).turns[0].role, text),), 0))
        found = sum(id in special for id in tokens.ids) - sum(id in special for id in plain)
        words = prompts.theirs.decode(tokens.ids)
        read = words.rpartition("<BEGIN CONVERSATION>\n\n")[2].partition("\n\n<END CONVERSATION>\n")[0]
        print(f"{text!r}\n    {found} more special tokens; read as {read!r}")


if __name__ == "__main__":
    main()
