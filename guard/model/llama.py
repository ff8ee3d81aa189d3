"""One packed forward pass of a Llama decoder, for every Hugging Face LlamaForCausalLM checkpoint."""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.errors import CheckpointError
from guard.model.graphs import ROOMS, Recorder, Room
from guard.model.kernels import Linear, Rows, TorchKernels
from guard.types import PAGE, Prefix


@dataclass(frozen=True)
class LlamaConfig:
    """What of a checkpoint's config.json the forward pass depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    max_positions: int
    rope: Mapping[str, Any]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """From the parsed config.json, of transformers before or since version 5; CheckpointError if not a Llama."""
        if config.get("model_type") != "llama" or config.get("hidden_act", "silu") != "silu":
            raise CheckpointError("config.json: expected model_type llama with hidden_act silu")
        rope = config.get("rope_parameters") or {"rope_type": "default", **(config.get("rope_scaling") or {})}
        rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
        if rope["rope_type"] not in ("default", "llama3"):
            raise CheckpointError(f"config.json: RoPE of type {rope['rope_type']!r} is not supported")
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            eps=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            rope=rope,
        )


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position, float32 [head_dim / 2], with long waves stretched for checkpoints with Llama 3's scaling.

    Source: `apply_scaling` in meta-llama/llama-models.
    """
    rope = config.rope
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: Tensor = 1.0 / rope["rope_theta"] ** exponents  # rounded as transformers does: far off, angles show it
    if rope["rope_type"] == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    trained, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((trained / wavelengths - low) / (high - low)).clamp(
        0, 1
    )  # 1 for short waves, 0 for those stretched in full
    scaled: Tensor = frequencies * (kept + (1 - kept) / rope["factor"])
    return scaled


class _Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    span: int  # that the inputs of `down` are turned by; see guard.model.kernels.turned
    down: Linear


class Llama:
    """The decoder without its language-model head: packed batches in, hidden states, or what a head makes of them, out.

    `tensors` holds the checkpoint's tensors under their Hugging Face names (with or without the `model.` prefix), on
    the device and in the type to compute in; beside a matrix of int8, `<name>_scale` has the scales of its rows, and
    `<name>_span` is there where it meets turned inputs. What is used is taken out of it, so that weights laid out anew
    for the processor do not stand in memory twice. `head` takes float32 [rows, hidden].
    """

    def __init__(
        self, config: LlamaConfig, tensors: dict[str, Tensor], kernels: TorchKernels, head: Linear | None = None
    ) -> None:
        prefix = "model." if "model.embed_tokens.weight" in tensors else ""

        def take(name: str) -> Tensor:
            try:
                return tensors.pop(prefix + name)
            except KeyError:
                raise CheckpointError(f"the checkpoint has no tensor {prefix}{name}") from None

        def linear(layer: int, block: str, *names: str, residual: bool = False) -> Linear:
            stems = [f"layers.{layer}.{block}.{name}_proj" for name in names]
            weight = torch.cat([take(f"{stem}.weight") for stem in stems])
            biased = f"{prefix}{stems[0]}.bias" in tensors
            bias = torch.cat([take(f"{stem}.bias") for stem in stems]) if biased else None
            if weight.dtype != torch.int8:
                return kernels.linear(weight, bias)
            scales = torch.cat([take(f"{stem}.weight_scale") for stem in stems])
            return kernels.linear(weight, bias, scales, residual=residual)

        self.config = config
        self._kernels = kernels
        self._head = head
        self._embedding = take("embed_tokens.weight")
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self._embedding_scale = take("embed_tokens.weight_scale") if self.dtype == torch.int8 else None
        self._layers = [
            _Layer(
                attention_norm=take(f"layers.{i}.input_layernorm.weight").float(),
                qkv=linear(i, "self_attn", "q", "k", "v"),
                out=linear(i, "self_attn", "o", residual=True),
                mlp_norm=take(f"layers.{i}.post_attention_layernorm.weight").float(),
                gate_up=linear(i, "mlp", "gate", "up"),
                span=int(tensors.pop(f"{prefix}layers.{i}.mlp.down_proj.weight_span", 0)),
                down=linear(i, "mlp", "down", residual=True),
            )
            for i in range(config.layers)
        ]
        self._norm = take("norm.weight").float()
        angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), rope_frequencies(config))
        self._cos, self._sin = angles.cos().to(self.device), angles.sin().to(self.device)
        self._pool: Tensor | None = None
        self._recorded = dict[Room, Callable[[Tensor], Tensor]]()
        self._record()

    @property
    def page_bytes(self) -> int:
        """What a page of keys and values takes."""
        config = self.config
        values = config.layers * PAGE * 2 * config.kv_heads * config.head_dim
        return values * self._kernels.paged_type(self.dtype).itemsize

    def reserve(self, pages: int) -> None:
        """Makes so many pages for keys and values; on the CPU their memory is taken as they are written to."""
        config = self.config
        # One more is for what is not kept.
        shape = (pages + 1, config.layers, PAGE, 2 * config.kv_heads * config.head_dim)
        self._pool = torch.empty(shape, dtype=self._kernels.paged_type(self.dtype), device=self.device)
        self._record()

    def copy(self, source: int, target: int) -> None:
        """What a page holds, into another page."""
        assert self._pool is not None, "pages are reserved before they are used"
        self._pool[target] = self._pool[source]

    @torch.inference_mode()
    def read(
        self,
        sequences: Sequence[Sequence[int]],
        reads: Sequence[Sequence[int]],
        columns: int | None = None,
        prefixes: Sequence[Prefix] = (),
    ) -> Tensor:
        """What the head makes of the hidden states after the final norm; float32 [sum of reads, ...], on the CPU.

        `sequences` are token ids, one list a sequence; `reads[i]` are the positions to read of sequence i, in order;
        `columns` are how many of the head's are wanted, by default all. `prefixes` are what is held of each sequence,
        by default nothing; no position that is held can be read.
        The sequences stand in one row without padding between them; only the end of the row is padded to a bucket.
        """
        is_paged = self._pool is not None and any(prefix.pages for prefix in prefixes)
        prefixes = prefixes or [Prefix()] * len(sequences)
        starts = [prefix.held for prefix in prefixes]
        lengths = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        needed = Room(
            tokens=sum(lengths),
            sequences=len(sequences) + 1,  # padding is read as one more
            reads=sum(map(len, reads)),
            longest=max(lengths, default=0),
            held=sum(starts) if is_paged else None,
        )
        room = self._kernels.room(needed, self.dtype)
        inputs = _packed(sequences, reads, prefixes, room)
        replay = self._recorded.get(room)
        out = replay(inputs) if replay else self._blocks(inputs.to(self.device), room)
        return out[: needed.reads, :columns].cpu()

    @torch.inference_mode()
    def _record(self) -> None:
        """Records the passes for which there is room, so that none is when it is waited for."""
        if self.device.type != "cuda":
            return
        recorder = Recorder(self.device)
        for room in reversed(ROOMS):  # the largest first, so that the others share its memory
            if (room.held is None) == (self._pool is None):
                self._recorded[room] = recorder.record(partial(self._blocks, room=room), _packed([], [], [], room))

    def _blocks(self, inputs: Tensor, room: Room) -> Tensor:
        """`inputs`, int32, are `_packed` -> float32 [R, ...]."""
        kernels, config = self._kernels, self.config
        ids, positions, bounds, wanted, *paged = inputs.split(_sizes(room))
        paging = None
        if paged:
            assert self._pool is not None, "pages are reserved before they are used"
            paging = kernels.paging(self._pool, paged, bounds, room)
        x = self._embedding[ids].float()  # [T, hidden], the residual stream
        if self._embedding_scale is not None:
            x *= self._embedding_scale[ids, None]
        delta: Rows | None = None
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(kernels.add_rms_norm(x, delta, layer.attention_norm, config.eps, self.dtype))
            qkv = kernels.rope(qkv, positions, self._cos, self._sin, config.heads + config.kv_heads)
            context = kernels.attention(qkv, bounds, room.longest, config.heads, config.kv_heads, paging, i)
            if i + 1 == config.layers:  # no later layer looks at the other tokens
                x, context = x[wanted], context[wanted]
            gate_up = layer.gate_up(kernels.add_rms_norm(x, layer.out(context), layer.mlp_norm, config.eps, self.dtype))
            delta = layer.down(kernels.silu_mul(gate_up, layer.span))
        hidden = kernels.add_rms_norm(x, delta, self._norm, config.eps, torch.float32)
        out = self._head(hidden) if self._head else hidden
        assert isinstance(out, Tensor), "float32 stays float32"
        return out


class OnPages:
    """What a model that computes with a Llama does with pages, for guard.engine.prefix_cache."""

    _llama: Llama

    @property
    def page_bytes(self) -> int:
        """What a page of keys and values takes."""
        return self._llama.page_bytes

    def reserve(self, pages: int) -> None:
        """Makes so many pages of keys and values, for `score` to keep what it reads in."""
        self._llama.reserve(pages)

    def copy(self, source: int, target: int) -> None:
        """What a page holds, into another page."""
        self._llama.copy(source, target)


def _sizes(room: Room) -> list[int]:
    """How long each table is in `_packed`."""
    sizes = [room.tokens, room.tokens, room.sequences + 1, room.reads]
    if room.held is not None:
        pages = room.sequences + (room.tokens + room.held) // PAGE  # the last of each sequence may be begun
        sizes += [room.sequences, room.sequences, room.sequences + 1, pages]
    return sizes


def _packed(
    sequences: Sequence[Sequence[int]], reads: Sequence[Sequence[int]], prefixes: Sequence[Prefix], room: Room
) -> Tensor:
    """What a pass is given, in one row: ids and positions of tokens, bounds of sequences, which tokens to read.

    Then, where it has pages, the tables of a Paging. Each is padded to the room.
    """
    starts, ends = [prefix.held for prefix in prefixes], list(map(len, sequences))
    bounds = [0, *accumulate(end - start for start, end in zip(starts, ends, strict=True))]
    # None is longer than what Paging needs: pages beyond a sequence's end are not used.
    pages = [prefix.pages[: -(-end // PAGE)] for prefix, end in zip(prefixes, ends, strict=True)]
    tables = [
        chain.from_iterable(map(islice, sequences, starts, repeat(None))),
        chain.from_iterable(map(range, starts, ends)),
        bounds,
        (
            first + position - start
            for row, first, start in zip(reads, bounds, starts, strict=False)
            for position in row
        ),
        starts,
        (prefix.written for prefix in prefixes),
        accumulate(map(len, pages), initial=0),
        chain.from_iterable(pages),
    ]
    padding = [0, 0, room.tokens, 0, 0, 0, sum(map(len, pages)), 0]
    row = array("i")
    end = 0
    for table, size, value in zip(tables, _sizes(room), padding, strict=False):
        end += size
        row.extend(table)
        row.extend(repeat(value, end - len(row)))
    return torch.frombuffer(row, dtype=torch.int32)
