"""Which passes are recorded, and that a recorded one gives what the same pass gives otherwise."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.model.graphs import ROOMS, Room, fitting
from guard.model.kernels import CudaKernels, TorchKernels
from guard.model.llama import Llama, LlamaConfig
from guard.types import PAGE, Prefix

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Unrecorded(CudaKernels):
    """Pads a pass as is done where there is no room for it."""

    room = TorchKernels.room


def model(kernels: TorchKernels) -> Llama:
    """Two layers of random weights."""
    config = LlamaConfig(
        hidden=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=64,
        eps=1e-5,
        max_positions=4096,
        rope={"rope_type": "default", "rope_theta": 1e4},
    )
    generator = torch.Generator().manual_seed(0)
    matrices = {
        "self_attn.q_proj": (256, 256),
        "self_attn.k_proj": (128, 256),
        "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 256),
        "mlp.gate_proj": (448, 256),
        "mlp.up_proj": (448, 256),
        "mlp.down_proj": (256, 448),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (500, 256)}
    tensors = {"norm.weight": torch.ones(256)}
    for i in range(config.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"layers.{i}.{name}.weight": torch.ones(256) for name in norms}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    return Llama(config, {name: tensor.to("cuda", torch.bfloat16) for name, tensor in tensors.items()}, kernels)


def sequences(lengths: list[int]) -> list[list[int]]:
    chooser = Random(0)
    return [[chooser.randrange(500) for _ in range(length)] for length in lengths]


@given(
    tokens=st.integers(0, 5000),
    sequences=st.integers(1, 600),
    reads=st.integers(0, 600),
    longest=st.integers(0, 3000),
    held=st.none() | st.integers(0, 20_000),
)
def test_a_pass_is_padded_to_the_smallest_room_that_holds_it(
    tokens: int, sequences: int, reads: int, longest: int, held: int | None
) -> None:
    """Of those with pages for one that has pages, and of the others for the others."""
    needed = Room(tokens, sequences, reads, longest, held)
    holding = [
        room
        for room in ROOMS
        if room.tokens >= tokens and room.sequences >= sequences and room.reads >= reads and room.longest >= longest
        if (room.held is None if held is None else room.held is not None and room.held >= held)
    ]
    assert fitting(needed) == min(holding, key=lambda room: (room.tokens, room.held or 0), default=None)


def test_an_ordinary_batch_has_a_room() -> None:
    """One request, a full batch of ordinary ones, one as long as the embedded model reads; and streams that go on."""
    assert fitting(Room(60, 2, 1, 60, 0)) == Room(64, 32, 32, 64, 2048)
    assert fitting(Room(4050, 40, 40, 900, 0)) == Room(4096, 64, 64, 2048, 2048)
    assert fitting(Room(2048, 2, 1, 2048)) == Room(2048, 32, 32, 2048)
    assert fitting(Room(1024, 65, 64, 16, 16_000)) == Room(1024, 128, 128, 256, 16_384)
    assert fitting(Room(4097, 2, 1, 60)) is None


@needs_gpu
def test_a_recorded_pass_gives_what_an_unrecorded_one_gives() -> None:
    """Whatever batch it is in, a sequence gives the same bits; read in pieces too, within rounding."""
    recorded, unrecorded = model(CudaKernels()), model(Unrecorded())
    recorded.reserve(40)
    batch = sequences([1, 5, 64, 65, 300, 17, 1000])
    reads = [[len(ids) - 1] for ids in batch]
    together = recorded.read(batch, reads)
    assert torch.equal(together, unrecorded.read(batch, reads))
    for ids, read, row in zip(batch, reads, together, strict=True):
        assert torch.equal(recorded.read([ids], [read])[0], row)
    pages = tuple(range(-(-1000 // PAGE)))
    for start, end in ((0, 300), (300, 316), (316, 1000)):
        piece = recorded.read([batch[-1][:end]], [[end - 1]], prefixes=[Prefix(start, start, pages)])
    torch.testing.assert_close(piece, together[-1:], rtol=0.02, atol=0.02)


@needs_gpu
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_what_was_run_before_leaves_no_trace(lengths: list[int]) -> None:
    """Passes share memory; each gives the same again after any other."""
    recorded = model(CudaKernels())
    batch = sequences(lengths)
    reads = [[len(ids) - 1] for ids in batch]
    first = recorded.read(batch, reads)
    recorded.read(sequences([700, 3]), [[699], [2]])
    assert torch.equal(recorded.read(batch, reads), first)
