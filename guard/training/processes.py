"""Training in one process or, under torchrun, in several, each of which computes a share of the rows of every step.

torchrun --no-python --nproc-per-node 4 guard train …
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

Row = TypeVar("Row")

_PATIENCE = timedelta(hours=4)  # teachers may have many rows to label while the others wait


@contextmanager
def joined() -> Iterator[torch.device]:
    """The device of this process, which has joined the others while this lasts: a GPU each, or the CPU."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    try:
        yield device
        distributed.barrier()  # the others may read what the first one has written
    finally:
        distributed.destroy_process_group()


def first() -> bool:
    """Whether this process is the one that writes files and reports."""
    return os.environ.get("RANK", "0") == "0"


def share(rows: Sequence[Row]) -> Sequence[Row]:
    """Every so manieth of some rows, so that each process that has joined has others."""
    return rows[distributed.get_rank() :: count()] if distributed.is_initialized() else rows


def count() -> int:
    """How many processes have joined."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Puts the sum over all processes in the place of each tensor."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)
