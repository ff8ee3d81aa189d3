"""Judges on a Ray cluster: one task reads, an actor for each GPU or some cores judges, and rows come back in order."""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from guard.audit.judge import Judged, Source
from guard.audit.recipe import Recipe
from guard.audit.records import Position
from guard.audit.stop import Stop
from guard.errors import GuardError, ModelFailed
from guard.types import ModelInfo

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: it would call home

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

_BLOCK = 1  # byte from which on a block is passed on: a window is one, and is judged as soon as it is read


class Cluster:
    """Judges by actors, each of which has loaded the model.

    The cluster is that of RAY_ADDRESS, or else one of this machine. Every machine of it needs Guard, the model where it
    is not the embedded one, and what is to be read.
    """

    def __init__(self, recipe: Recipe, workers: int | None = None) -> None:
        """`workers` is how many actors there are: by default one for each GPU, or for each machine without any.

        Blocks until one of them has loaded the model. Raises ConfigError where it cannot be.
        """
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        self._workers = workers or gpus or len(ray.nodes())
        cores = max(1, int(there["CPU"]) // self._workers)
        self._share = {"num_cpus": cores, "num_gpus": min(1.0, gpus / self._workers)}
        self._recipe = replace(recipe, settings=recipe.settings.model_copy(update={"threads": cores}))
        with _told():
            loaded = ray.get(ray.remote(_load).options(**self._share).remote(self._recipe))
        self.schema, self.model, self._window = loaded

    def judged(self, source: Source, start: Position, stop: Stop) -> Iterator[Judged]:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells every step of its own
        context = DataContext.get_current()
        context.target_max_block_size = _BLOCK
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        read = ray.data.read_datasource(_Windows(source, start, self._window), override_num_blocks=1, num_cpus=0)
        pool = ActorPoolStrategy(size=self._workers)
        found = read.map_batches(_Actor, fn_constructor_args=(self._recipe,), compute=pool, batch_size=1, **self._share)
        with _told():
            for row in found.iter_rows():
                yield pickle.loads(row["judged"])


def _load(recipe: Recipe) -> tuple[pa.Schema, ModelInfo, int]:
    judge, model = recipe.judge()
    return judge.schema, model, judge.window


class _Actor:
    """A judge in a process of its own."""

    def __init__(self, recipe: Recipe) -> None:
        self._judge, _ = recipe.judge()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        judge = self._judge
        windows = map(pickle.loads, batch["window"])
        judged = (judge.tell(judge.score(judge.prepare(window), Stop())) for window in windows)
        return {"judged": list(map(pickle.dumps, judged))}


class _Windows(Datasource):
    """Windows, pickled, in the one column `window`; one task reads them, in order."""

    def __init__(self, source: Source, start: Position, characters: int) -> None:
        self._read = partial(_blocks, source, start, characters)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        return [ReadTask(self._read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


def _blocks(source: Source, start: Position, characters: int) -> Iterator[pa.Table]:
    for window in source.windows(start, characters):
        yield pa.table({"window": [pickle.dumps(window)]})


@contextmanager
def _told() -> Iterator[None]:
    """Of what goes wrong in another process, what it was that did."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, GuardError) else ModelFailed(type(error.cause).__name__) from None
