"""Passes recorded as CUDA graphs: one launch in place of hundreds, which take longer than the work of a small batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Room(NamedTuple):
    """What a pass has to hold, or has room for; `held` is None where it has no pages."""

    tokens: int
    sequences: int
    reads: int
    longest: int  # tokens of a sequence that the pass reads
    held: int | None = None  # tokens that it need not read

    def holds(self, other: "Room") -> bool:
        """Whether that fits; what has pages and what has none are two kinds."""
        return (self.held is None) == (other.held is None) and all(
            own >= its for own, its in zip(self, other, strict=True) if own is not None and its is not None
        )


_TOKENS = (64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
_LONGEST = (256, 2048)  # many short sequences or few long ones
_HELD = (None, 2048, 16384)


def _room(tokens: int, longest: int, held: int | None) -> Room:
    # Attention launches blocks for each sequence as if it were the longest: together as many as 32 tokens would for
    # each that there is room for.
    sequences = 32 * tokens // longest
    return Room(tokens, sequences, sequences, longest, held)


ROOMS = sorted(
    {_room(tokens, min(tokens, longest), held) for tokens in _TOKENS for longest in _LONGEST for held in _HELD},
    key=lambda room: (room.tokens, room.held or 0, room.longest),
)
"""For which passes are recorded, the smallest first."""


def fitting(needed: Room) -> Room | None:
    """The smallest room that holds a pass; None where that is to run unrecorded."""
    return next((room for room in ROOMS if room.holds(needed)), None)


class Recorder:
    """Where passes are recorded. They share memory: what one gives stands until the next is run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[Tensor], Tensor]:
        """The same pass over a row of integers as long as `inputs`."""
        inputs, graph = inputs.to(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run(inputs)  # what is made at a first call is not to be recorded
        # Another thread may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run(inputs)

        def replay(own: Tensor) -> Tensor:
            inputs.copy_(own)
            graph.replay()
            return out

        return replay
