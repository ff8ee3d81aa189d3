"""Audits labelled rows in three shapes, and tells what that costs beside the engine alone and a plain loop.

    python -m loadtest.audit DATA --rows 2000            the embedded model: speed, and what the rest of an audit costs
    python -m loadtest.audit DATA --rows 200000 --split      the same at length: a third of the rows in each shape
    python -m loadtest.audit DATA --rows 200000 --blocks 1   only its first block: how memory goes with many rows
    python -m loadtest.audit DATA --rows 3000 --kill 10  kill -9 at random moments, and whether that changed anything
    python -m loadtest.audit DATA --rows 600 --ray 1 2   on a Ray cluster of this machine, by so many workers

DATA is a folder of gzipped JSON Lines with `turns`, see docs/data.md. Rows are drawn from all of it, always the same.
"""

import argparse
import asyncio
import csv
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from guard.audit.output import part_files, read_manifest
from guard.engine.batcher import Batcher
from guard.engine.moderator import model_thread
from guard.model.checkpoint import load_tensors, read_checkpoint, save_checkpoint
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.types import Conversation, Lane, Role, Tokens, Turn

_CHATS = {"user": "user", "agent": "assistant"}
_SHAREGPT = {"user": "human", "agent": "gpt"}
_SAMPLE = 200  # rows that the plain loop is measured on
_AT_HAND = 2000  # rows, at most, that the engine alone is measured on

Rows = Sequence[dict[str, Any]]


class Audited(NamedTuple):
    """What a run did: counts, the seconds it judged for, and the most memory that was resident, in MiB."""

    conversations: int
    turns: int
    tokens: int
    seconds: float
    memory: float


def drawn(data: Path, count: int) -> Rows:
    lines = [
        line for path in sorted(data.glob("*.jsonl.gz")) for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    return [json.loads(line) for line in random.Random(0).sample(lines, min(count, len(lines)))]


def write_chats(rows: Rows, folder: Path) -> Path:
    """OpenAI's messages, as gzipped JSON Lines."""
    path = folder / "messages.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for row in rows:
            messages = [{"role": _CHATS[turn["role"]], "content": turn["content"]} for turn in row["turns"]]
            file.write(json.dumps({"id": row["id"], "lang": row["lang"], "messages": messages}) + "\n")
    return path


def write_sharegpt(rows: Rows, folder: Path) -> Path:
    """ShareGPT's conversations, as Parquet."""
    path = folder / "sharegpt.parquet"
    said = ([{"from": _SHAREGPT[one["role"]], "value": one["content"]} for one in row["turns"]] for row in rows)
    told = [{"id": row["id"], "conversations": turns} for row, turns in zip(rows, said, strict=True)]
    pq.write_table(pa.Table.from_pylist(told), path, row_group_size=5000)
    return path


def write_turns(rows: Rows, folder: Path) -> Path:
    """A turn a row, as CSV: ten conversations go on beside each other."""
    path = folder / "turns.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["conversation_id", "role", "text"])
        for start in range(0, len(rows), 10):
            some = rows[start : start + 10]
            beside = [[(row["id"], one["role"], one["content"]) for one in row["turns"]] for row in some]
            while any(beside):
                writer.writerows(turns.pop(0) for turns in beside if turns)
    return path


SHAPES: dict[str, Callable[[Rows, Path], Path]] = {
    "messages, JSON Lines, gzip": write_chats,
    "ShareGPT, Parquet": write_sharegpt,
    "a turn a row, CSV": write_turns,
}


def first_blocks(blocks: int, folder: Path) -> Path:
    """The embedded model without its later blocks: it judges nothing, and costs as much less."""
    whole = read_checkpoint(Settings().model)
    tensors = load_tensors(whole.path, torch.float32)
    kept = {name: one for name, one in tensors.items() if not _block(name) or _block(name) <= blocks}
    save_checkpoint(
        folder,
        tensors=kept,
        config={**whole.config, "num_hidden_layers": blocks},
        tokenizer_json=(whole.path / "tokenizer.json").read_text(encoding="utf-8"),
        name=f"{whole.name}-first-{blocks}",
        max_tokens=whole.max_tokens,
        hazards=whole.hazards,
        calibration=whole.calibration,
    )
    return folder


def _block(name: str) -> int:
    """The block of a tensor, from 1; 0 of those in none."""
    *_, place, _rest = [0, *(part for part in name.split(".") if part.isdecimal()), 0]
    return int(place) + 1 if ".layers." in name else 0


def start(source: Path, out: Path, model: Path, *options: str) -> "subprocess.Popen[bytes]":
    guard = Path(sys.executable).with_name("guard")
    command = [guard, "audit", source, "--out", out, "--policy", "default", "--model", model, "--progress", "none"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*map(str, command), *options], stdout=quiet, stderr=quiet, start_new_session=True)


def audit(source: Path, out: Path, model: Path, *options: str) -> Audited:
    running = start(source, out, model, *options)
    status, most = Path(f"/proc/{running.pid}/status"), 0
    while running.poll() is None:  # getrusage would tell this process's own, from which it was forked
        with suppress(OSError, TypeError):
            most = max(most, int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]))  # type: ignore[index]
        time.sleep(0.1)
    assert running.returncode == 0, f"the audit ended with {running.returncode}"
    return audited(out, most / 1024)


def audited(out: Path, memory: float = 0.0) -> Audited:
    parts = read_manifest(out)
    conversations, turns, tokens = (sum(part[name] for part in parts) for name in ("conversations", "turns", "tokens"))
    return Audited(conversations, turns, tokens, sum(part["seconds"] for part in parts), memory)


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    for path in part_files(out):
        yield from pq.read_table(path).to_pylist()


class Engine:
    """The model in this process, with the batcher before it and nothing else."""

    def __init__(self, model: Path) -> None:
        self._thread = model_thread()
        self.classifier = self._thread.submit(TurnClassifier, model).result()

    def tokenised(self, rows: Rows) -> list[tuple[Tokens, ...]]:
        return [self.classifier.tokenise(_conversation(row)) for row in rows]

    def rate(self, requests: Sequence[tuple[Tokens, ...]]) -> float:
        """Tokens a second, with all of them at hand."""

        async def serve() -> None:
            batcher = Batcher(
                self.classifier.score,
                self._thread,
                max_batch_tokens=512,
                max_queue_seconds=1e9,
                rate=1.0,
                telemetry=Telemetry.start("error"),
            )
            await asyncio.gather(*(batcher.score(windows, Lane.INTERACTIVE, None) for windows in requests))

        started = time.monotonic()
        asyncio.run(serve())
        return sum(len(one.ids) for windows in requests for one in windows) / (time.monotonic() - started)


def plain_rate(model: Path, requests: Sequence[tuple[Tokens, ...]], folder: Path, dtype: torch.dtype) -> float:
    """Tokens a second of transformers in a loop, a conversation at a time."""
    from safetensors.torch import save_file
    from transformers import LlamaModel

    tensors = load_tensors(model, torch.float32)
    for name in ("score.weight", "score.bias"):
        del tensors[name]
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(read_checkpoint(model).config)), encoding="utf-8")
    reference = LlamaModel.from_pretrained(folder, dtype=dtype).eval()
    windows = [one for windows in requests for one in windows]
    with torch.inference_mode():
        reference(torch.tensor([windows[0].ids]), use_cache=False)
        started = time.monotonic()
        for one in windows:
            reference(torch.tensor([one.ids]), use_cache=False)
    return sum(len(one.ids) for one in windows) / (time.monotonic() - started)


def _conversation(row: dict[str, Any]) -> Conversation:
    return Conversation(tuple(Turn(Role(turn["role"]), turn["content"]) for turn in row["turns"]), None)


def speed(rows: Rows, model: Path, folder: Path, wanted: str, split: bool) -> None:
    console = Console(width=120)
    engine = Engine(model)
    requests = engine.tokenised(rows[: min(max(_SAMPLE, len(rows) // 4), _AT_HAND)])
    engine.rate(requests[:_SAMPLE])  # warms up
    console.print(f"{'shape':26} {'rows':>7} {'turns':>7} {'rows/s':>7} {'tokens/s':>8}  of the engine alone   peak")
    for number, (name, write) in enumerate(SHAPES.items()):
        if wanted not in name:
            continue
        source = write(rows[number :: len(SHAPES)] if split else rows, folder)
        alone = engine.rate(requests)
        found = audit(source, folder / "out", model)
        alone = (alone + engine.rate(requests)) / 2
        rate = found.tokens / found.seconds
        console.print(
            f"{name:26} {found.conversations:7,} {found.turns:7,} {found.conversations / found.seconds:7,.1f}"
            f" {rate:8,.0f}  {rate / alone:>8.0%} of {alone:7,.0f} {found.memory:6,.0f} MiB"
        )
        shutil.rmtree(folder / "out")
    for dtype in (torch.float32, torch.bfloat16):
        plain = plain_rate(model, requests[:_SAMPLE], folder / "plain", dtype)
        console.print(f"transformers in a loop, {dtype}, {_SAMPLE} of the rows: {plain:,.0f} tokens/s")


def killed(rows: Rows, model: Path, folder: Path, times: int) -> None:
    """Kills it at random moments of a run, each further on, and compares what it wrote."""
    source = write_chats(rows, folder)
    whole = audit(source, folder / "whole", model)
    out, chooser = folder / "killed", random.Random(times)
    for number in range(times):
        running = start(source, out, model)
        time.sleep(chooser.uniform(8, 68))  # seconds, some of which it takes to load; every thirty something is written
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        done = audited(out).conversations if out.exists() else 0
        Console().print(f"killed {number + 1}: {done:,} of {whole.conversations:,} conversations were written")
    audit(source, out, model)
    same = list(rows_of(out)) == list(rows_of(folder / "whole"))
    Console().print(
        f"{audited(out).turns:,} rows, {'the same as' if same else 'OTHERS THAN'} those of the run that was not killed"
    )


def on_ray(rows: Rows, model: Path, folder: Path, workers: Sequence[int]) -> None:
    source = write_chats(rows, folder)
    local = audit(source, folder / "local", model)
    Console().print(f"local: {local.tokens / local.seconds:,.0f} tokens/s")
    for count in workers:
        out = folder / f"ray-{count}"
        found = audit(source, out, model, "--engine", "ray", "--workers", str(count))
        same = list(rows_of(out)) == list(rows_of(folder / "local"))
        told = f"{found.tokens / found.seconds:,.0f} tokens/s, rows {'the same' if same else 'OTHERS'}"
        Console().print(f"ray, {count} workers: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--blocks", type=int, help="of the embedded model; by default all")
    parser.add_argument("--shape", default="", help="only those with this in their name")
    parser.add_argument(
        "--split", action="store_true", help="a third of the rows in each shape, not all in all of them"
    )
    parser.add_argument("--kill", type=int, metavar="TIMES")
    parser.add_argument("--ray", type=int, nargs="+", metavar="WORKERS")
    given = parser.parse_args()
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        model = first_blocks(given.blocks, folder / "model") if given.blocks else Settings().model
        rows = drawn(given.data, given.rows)
        if given.kill:
            killed(rows, model, folder, given.kill)
        elif given.ray:
            on_ray(rows, model, folder, given.ray)
        else:
            speed(rows, model, folder, given.shape, given.split)


if __name__ == "__main__":
    main()
