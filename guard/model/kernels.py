"""The steps of a Llama layer, in the forms that processors run fastest: torch everywhere, fused C++ on x86-64."""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from guard.model.graphs import Room, fitting
from guard.types import PAGE


class Scaled(NamedTuple):
    """Rows that are still to be multiplied, each by its own scale: `values` [rows, width], `scales` float32 [rows]."""

    values: Tensor
    scales: Tensor


# Between layers of floating point a tensor; between products of integers, uint8 that goes into one, floats out of it.
Rows = Tensor | Scaled


class Gathered(NamedTuple):
    """Keys and values of a pass in one packed row, those that are held and those that are new; int64, but for bounds.

    `bounds`, int32, are those of sequences in that row. A token of it is `old`, and held in a page at a place, or it is
    in a row of the pass. A row of the pass goes into a page at a place; those that go nowhere, into the pool's last.
    """

    bounds: Tensor
    old: Tensor  # bool
    held_pages: Tensor
    held_places: Tensor
    rows: Tensor
    kept_pages: Tensor
    kept_places: Tensor


class Paging(NamedTuple):
    """The pages of keys and values that a pass reads and writes; int32, all but the pool.

    `pool` is [pages, layers, PAGE, 2 * kv_heads * dim], a row having the keys of all heads, then the values; native
    kernels lay out what a layer has in a page as their products take it. Sequence s has pages[bounds[s]:bounds[s + 1]];
    its first held[s] tokens are no rows of the pass, those from written[s] on go into pages.
    """

    pool: Tensor
    held: Tensor
    written: Tensor
    bounds: Tensor
    pages: Tensor
    gathered: Gathered | None = None  # for attention that does not know pages


Linear = Callable[[Rows], Rows]


_LANES = 16  # float32 numbers of the widest vectors


class TorchKernels:
    """Every step in torch, on the CPU: the form that runs everywhere, and the reference for the others.

    No row of a result depends on another row, but for attention, where it depends on earlier rows of its sequence.
    """

    name: str = "torch"
    most: int = 127  # that a row is rounded to, and the opposite

    @property
    def multiplies_integers(self) -> bool:
        """Whether products of int8 are faster here than those of floating point."""
        return False

    def linear(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, *, residual: bool = False
    ) -> Linear:
        """The product x [rows, in] -> [rows, out] with `weight` [out, in], laid out for this device.

        A weight of int8 has `scales`, float32 [out]; its product is one of integers, with x rounded to int8 by a scale
        for each row, and exact: it is the same whatever the order of summation. It comes as bfloat16, which halves what
        goes through memory, or as float32 where it is added to the `residual`.
        """
        if scales is not None:
            dtype = torch.float32 if residual else torch.bfloat16
            if _overflows():
                whole = TorchKernels.linear(self, weight.float(), None)
                return _whole_linear(whole, bias, scales, dtype, self)
            return _integer_linear(weight, bias, scales, dtype, self)
        if not torch.backends.mkldnn.is_available() or (
            weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return lambda x: F.linear(_floats(x), weight, bias)
        # What torch.compile's own CPU backend calls: weights reordered once, for oneDNN's blocked kernels. Unlike the
        # plain product, a row comes out the same to the bit whatever the number of rows (from two on; see `bucket`);
        # but for bfloat16 on AMX.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, bias, "none", [], "")

    def quantise(self, x: Tensor) -> Scaled:
        """Rows as integers of -most..most, each `most` higher, as uint8; a row of zeros stays one."""
        largest = x.abs().amax(1).float()
        inverse = torch.where(largest > 0, self.most / largest, 0.0)
        return Scaled(((x * inverse[:, None]).round() + self.most).to(torch.uint8), largest / self.most)

    def bucket(self, tokens: int) -> int:
        """The rows that `tokens` are padded to, so that the same shapes are met again."""
        step = 16 if tokens <= 256 else 1 << ((tokens - 1).bit_length() - 4)  # at most an eighth is padding
        return -(-tokens // step) * step

    def room(self, needed: Room, dtype: torch.dtype) -> Room:
        """What a pass in `dtype` is padded to."""
        return needed._replace(
            tokens=self.bucket(needed.tokens),
            sequences=self.bucket(needed.sequences + 1) - 1,  # there is one bound more
            reads=self.bucket(needed.reads),
        )

    def add_rms_norm(self, x: Tensor, delta: Rows | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
        """Adds `delta` to the float32 residual `x` [rows, hidden] in place, and returns its RMS norm in `dtype`."""
        if delta is not None:
            x.add_(_floats(delta))
        normed = F.rms_norm(x, x.shape[-1:], weight, eps)
        return self.quantise(normed) if dtype == torch.int8 else normed.to(dtype)

    def rope(self, rows: Rows, positions: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """`rows` with the first `heads` heads of each rotated, perhaps in place.

        `cos` and `sin` are [positions, dim / 2].
        """
        qkv = _floats(rows)
        half = cos.shape[-1]
        rotated = qkv[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
        low, high = rotated.float().unbind(2)
        c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        rotated.copy_(torch.stack((low * c - high * s, high * c + low * s), dim=2))
        return qkv

    def paged_type(self, dtype: torch.dtype) -> torch.dtype:
        """The type of keys and values in a model of `dtype`."""
        return torch.float32 if dtype == torch.int8 else dtype

    def paging(self, pool: Tensor, tables: Sequence[Tensor], bounds: Tensor, room: Room) -> Paging:
        """From `tables`: held, written, bounds and pages of a Paging; `bounds` are those of the pass's rows."""
        held, written, page_bounds, pages = tables
        return Paging(pool, held, written, page_bounds, pages)

    def attention(
        self,
        qkv: Tensor,
        bounds: Tensor,
        longest: int,
        heads: int,
        kv_heads: int,
        paging: Paging | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Causal attention within each sequence of a packed row, and what is held of it.

        `qkv` is [rows, (heads + 2 * kv_heads) * dim]; sequence s is rows bounds[s]:bounds[s + 1]; the result is
        [rows, heads * dim]. `longest` is a bound for rows of a sequence; where one has more, its result is anything.
        """
        q, kv = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, 2 * kv_heads), dim=1)
        out = torch.empty_like(q)
        for s, (start, end) in enumerate(pairwise(bounds.tolist())):
            if start == end:
                continue
            own_kv = kv[start:end] if paging is None else _extended(paging, s, layer, kv[start:end])
            held = len(own_kv) - (end - start)
            mask = torch.ones(end - start, len(own_kv), dtype=torch.bool).tril(held) if held else None
            own_k, own_v = own_kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
            own_q = q[start:end].transpose(0, 1).unsqueeze(0)
            attended = F.scaled_dot_product_attention(
                own_q, own_k, own_v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out[start:end] = attended.squeeze(0).transpose(0, 1)
        return out.flatten(1)

    def silu_mul(self, gate_up: Rows, span: int = 0) -> Rows:
        """silu(gate) * up, for `gate_up` [rows, 2 * inner] -> [rows, inner]; integers follow on scaled rows.

        Before they are rounded, rows are `turned`.
        """
        gate, up = _floats(gate_up).chunk(2, dim=-1)
        product = F.silu(gate) * up
        return self.quantise(turned(product, span)) if isinstance(gate_up, Scaled) else product


def turned(x: Tensor, span: int) -> Tensor:
    """The Walsh-Hadamard transform, orthonormal, of every 16th of `span` columns of x [rows, width].

    It is its own inverse, and spreads what is large in one column over many; that its columns stand 16 apart is for the
    processor's vectors.
    """
    shape, half = x.shape, _LANES
    while half < span:
        low, high = (x * 0.5**0.5).reshape(-1, 2, half).unbind(1)
        x = torch.stack((low + high, low - high), 1)
        half *= 2
    return x.reshape(shape)


def span_of(width: int) -> int:
    """The longest span that divides a width, for `turned`; 0 where there is none."""
    return 0 if width % _LANES else width & -width


def _gathered(paging: Paging, bounds: Tensor, rows: int, held: int) -> Gathered:
    """For so many rows of a pass, and room for so many tokens held; worked out on the device."""
    before, written, page_bounds, own_pages = (table.long() for table in paging[1:5])
    bounds = bounds.long()
    bounds_k = bounds + torch.cat([before.new_zeros(1), before.cumsum(0)])

    def at(bounds: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Which sequence each of so many tokens is of, the last where it is of none; and its place there."""
        tokens = torch.arange(count, device=bounds.device)
        sequences = torch.searchsorted(bounds[1:], tokens, right=True).clamp_max(len(bounds) - 2)
        return sequences, tokens - bounds[sequences]

    def pages(of: Tensor, place: Tensor) -> Tensor:
        return own_pages[(page_bounds[of] + place // PAGE).clamp_max(len(own_pages) - 1)]

    of, place = at(bounds_k, rows + held)
    row_of, row_place = at(bounds, rows)
    row_place = row_place + before[row_of]
    paged = PAGE * (page_bounds[row_of + 1] - page_bounds[row_of])
    is_kept = (written[row_of] <= row_place) & (row_place < paged)
    return Gathered(
        bounds=bounds_k.int(),
        old=place < before[of],
        held_pages=pages(of, place),
        held_places=place % PAGE,
        rows=(bounds[of] + place - before[of]).clamp(0, rows - 1),
        kept_pages=torch.where(is_kept, pages(row_of, row_place), len(paging.pool) - 1),
        kept_places=row_place % PAGE,
    )


def _gather(paging: Paging, layer: int, new: Tensor) -> Tensor:
    """Keys and values of all tokens, of which the `new` ones [tokens, 2 * heads, dim] are put into pages."""
    gathered = paging.gathered
    assert gathered is not None, "the pass is made ready for it"
    rows, pool = new.flatten(1), paging.pool[:, layer]
    pool[gathered.kept_pages, gathered.kept_places] = rows
    held = pool[gathered.held_pages, gathered.held_places]
    return torch.where(gathered.old[:, None], held, rows[gathered.rows]).view(-1, *new.shape[1:])


def _extended(paging: Paging, sequence: int, layer: int, new: Tensor) -> Tensor:
    """What is held of the keys and values of a sequence, and the `new` ones [tokens, ...], which are put into pages."""
    held, written = int(paging.held[sequence]), int(paging.written[sequence])
    pages = paging.pages[paging.bounds[sequence] : paging.bounds[sequence + 1]].long()
    at = torch.arange(max(held, written), min(held + len(new), len(pages) * PAGE))
    paging.pool[pages[at // PAGE], layer, at % PAGE] = new.flatten(1)[at - held]
    old = torch.arange(held)
    return torch.cat([paging.pool[pages[old // PAGE], layer, old % PAGE].view(held, *new.shape[1:]), new])


def _floats(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows.values.float() * rows.scales[:, None]


def _biased(rows: Scaled, bias: Tensor | None) -> Rows:
    return rows if bias is None else (_floats(rows) + bias).to(rows.values.dtype)


def _overflows() -> bool:
    """Whether oneDNN's products of bytes are wrong here: x86 without VNNI adds two of them in 16 bits."""
    processor = torch.cpu.get_capabilities()
    return processor.get("architecture") == "x86_64" and not (processor["avx512_vnni"] or processor["avx_vnni"])


def _whole_linear(
    product: Linear, bias: Tensor | None, scales: Tensor, dtype: torch.dtype, kernels: TorchKernels
) -> Linear:
    """What `_integer_linear` gives, by a product of float32, which is exact as long as sums stay below 2^24."""

    def linear(x: Rows) -> Rows:
        x = kernels.quantise(x) if isinstance(x, Tensor) else x
        y = _floats(product(x.values.float() - kernels.most)) * scales
        return _biased(Scaled(y.to(dtype), x.scales), bias)

    return linear


def _integer_linear(
    weight: Tensor, bias: Tensor | None, scales: Tensor, dtype: torch.dtype, kernels: TorchKernels
) -> Linear:
    """oneDNN's product of uint8 rows with int8 weights, accumulated in int32: rows of `dtype`, still to be scaled."""
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    product = torch.ops.onednn.qlinear_pointwise.default
    zeros = torch.zeros_like(scales, dtype=torch.int32)

    def linear(x: Rows) -> Rows:
        x = kernels.quantise(x) if isinstance(x, Tensor) else x
        y = product(x.values, 1.0, kernels.most, packed, scales, zeros, None, 1.0, 0, dtype, "none", [], "")
        return _biased(Scaled(y, x.scales), bias)

    return linear


class CudaKernels(TorchKernels):
    """Torch on CUDA, with the library's attention over packed rows."""

    name = "torch-cuda"

    def linear(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, *, residual: bool = False
    ) -> Linear:
        assert scales is None, "products of integers are the CPU's"
        if weight.dtype != torch.float32:
            return lambda x: F.linear(_floats(x), weight, bias)
        # A head's: in which order it is summed depends on the number of rows, and in float64 hardly shows.
        weight, bias = weight.double(), None if bias is None else bias.double()
        return lambda x: F.linear(_floats(x).double(), weight, bias).float()

    def room(self, needed: Room, dtype: torch.dtype) -> Room:
        return fitting(needed) or super().room(needed, dtype)

    def paging(self, pool: Tensor, tables: Sequence[Tensor], bounds: Tensor, room: Room) -> Paging:
        paging = super().paging(pool, tables, bounds, room)
        return paging._replace(gathered=_gathered(paging, bounds, room.tokens, room.held or 0))

    def attention(
        self,
        qkv: Tensor,
        bounds: Tensor,
        longest: int,
        heads: int,
        kv_heads: int,
        paging: Paging | None = None,
        layer: int = 0,
    ) -> Tensor:
        q, kv = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, 2 * kv_heads), dim=1)
        bounds_k, longest_k = bounds, longest
        if paging is not None and paging.gathered is not None:
            kv, bounds_k = _gather(paging, layer, kv), paging.gathered.bounds
            longest_k = len(kv)  # a bound that needs no look at what is on the device
        k, v = kv.chunk(2, dim=1)
        out: Tensor = self.varlen(q, k, v, bounds, bounds_k, longest, longest_k)
        return out.flatten(1)

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int
    ) -> Tensor:
        """Causal attention of the last tokens of packed sequences to all of them; [rows, heads, dim]."""
        # num_splits=1: the order of reduction does not depend on the batch.
        out = varlen_attn(
            q, k, v, bounds, bounds_k, longest, longest_k, window_size=(-1, 0), enable_gqa=True, num_splits=1
        )
        assert isinstance(out, Tensor), "only a call that asks for more gets a tuple"
        return out


_SUFFIXES: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
# What torch found the processor to be, to the levels of x86-64 that the library is built for, the fastest first.
_LEVELS: Final = {"AVX512": ("v4_amx", "v4"), "AVX2": ("v3",)}


class NativeKernels(TorchKernels):
    """guard/model/native/kernels.cpp, on the CPU; oneDNN's products where it has none."""

    def __init__(self, library: str, name: str) -> None:
        self.name = name
        self._library = ctypes.CDLL(library)
        self._has_products = hasattr(self._library, "guard_linear_f32")
        self._rows = self._library.guard_tile_rows()
        self.most = self._library.guard_most()

    @classmethod
    def find(cls) -> "NativeKernels | None":
        """The library built for this processor, or None where there is none."""
        processor = torch.cpu.get_capabilities()
        has_tiles = processor.get("amx_bf16") and processor.get("amx_int8")
        for level in _LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()):
            spec = importlib.util.find_spec(f"guard.model._native_{level}")
            if spec and spec.origin and (level != "v4_amx" or has_tiles):
                kernels = cls(spec.origin, f"native-x86-64-{level.replace('_', '-')}")
                if kernels._library.guard_usable():
                    return kernels
        return None

    @property
    def multiplies_integers(self) -> bool:
        return self._has_products or torch.cpu.get_capabilities().get("avx512_vnni", False)

    def room(self, needed: Room, dtype: torch.dtype) -> Room:
        room = super().room(needed, dtype)
        # Products that take any number of rows, and make nothing ready for it as oneDNN does, need no padding.
        takes_any = dtype == torch.int8 and self._has_products and self._rows == 1
        return room._replace(tokens=needed.tokens) if takes_any else room

    def _call(self, function: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        getattr(self._library, f"guard_{function}_{_SUFFIXES[dtype]}")(*map(_as_c, arguments))

    def linear(
        self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, *, residual: bool = False
    ) -> Linear:
        """The library's own product where it has one.

        On AMX oneDNN's takes half as long again for few rows; before VNNI it has none that is right.
        """
        cols, depth = weight.shape
        if scales is None or depth % 64 or cols % 32 or not self._has_products:
            return super().linear(weight, bias, scales, residual=residual)
        weight, scales = _narrowed(weight, scales, self._library.guard_most_pair())
        excess = self.most * weight.sum(1, dtype=torch.int32)
        tiles = weight.view(cols // 16, 16, depth // 64, 16, 4).permute(0, 2, 3, 1, 4).contiguous()
        dtype = torch.float32 if residual else torch.bfloat16

        def product(x: Rows) -> Rows:
            x = self.quantise(x) if isinstance(x, Tensor) else x
            assert len(x.values) % self._rows == 0, "rows are padded to whole tiles; see `bucket`"
            y = torch.empty(len(x.values), cols, dtype=dtype)
            self._call("linear", dtype, x.values, tiles, excess, scales, y, len(y), depth, cols)
            return _biased(Scaled(y, x.scales), bias)

        return product

    def quantise(self, x: Tensor) -> Scaled:
        out = _integers(*x.shape)
        self._call("quantise", x.dtype, x, *out, *x.shape)
        return out

    def add_rms_norm(self, x: Tensor, delta: Rows | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Rows:
        if dtype == torch.int8:
            integers = _integers(*x.shape)
            values, scales = delta if isinstance(delta, Scaled) else (delta, None)
            self._call("add_rms_norm", dtype, x, values, scales, weight, *integers, *x.shape, eps)
            return integers
        if delta is not None and (isinstance(delta, Scaled) or delta.dtype != dtype):  # after the last layer
            x, delta = x.add_(_floats(delta)), None
        out = torch.empty_like(x, dtype=dtype)
        self._call("add_rms_norm", dtype, x, delta, weight, out, *x.shape, eps)
        return out

    def rope(self, rows: Rows, positions: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        if isinstance(rows, Scaled):
            qkv, scales = rows
            self._call("rope", torch.int8, qkv, scales, positions, cos, sin, *qkv.shape, heads, 2 * cos.shape[-1])
            return qkv
        self._call("rope", rows.dtype, rows, positions, cos, sin, *rows.shape, heads, 2 * cos.shape[-1])
        return rows

    def paged_type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.int8 else dtype

    def attention(
        self,
        qkv: Tensor,
        bounds: Tensor,
        longest: int,
        heads: int,
        kv_heads: int,
        paging: Paging | None = None,
        layer: int = 0,
    ) -> Tensor:
        dim = qkv.shape[1] // (heads + 2 * kv_heads)
        if dim % 64:  # the width of the library's tiles
            return super().attention(qkv, bounds, longest, heads, kv_heads, paging, layer)
        out = qkv.new_empty(len(qkv), heads * dim)
        pages: tuple[Tensor | int | None, ...] = (None, 0, None, None, None, None)
        if paging is not None:
            pages = (paging.pool[0, layer], paging.pool.stride(0), *paging[1:5])
        self._call("attention", qkv.dtype, qkv, bounds, len(bounds) - 1, out, heads, kv_heads, dim, *pages)
        return out

    def silu_mul(self, gate_up: Rows, span: int = 0) -> Rows:
        if isinstance(gate_up, Scaled):
            integers = _integers(len(gate_up.values), gate_up.values.shape[1] // 2)
            self._call("silu_mul", torch.int8, *gate_up, *integers, *integers.values.shape, span)
            return integers
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._call("silu_mul", gate_up.dtype, gate_up, out, *out.shape)
        return out


def _narrowed(weight: Tensor, scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and its scales, such that no two neighbours of a row come to more than `most` or less than -most.

    Those that do are lowered. Where that costs a row more than rounding did, it is rounded again instead, by a larger
    scale.
    """
    pairs = weight.float().unflatten(1, (-1, 2))
    sums = pairs.sum(2)
    above = (sums.abs() - most).clamp_min(0)
    share = torch.stack([(above / 2).ceil(), (above / 2).floor()], 2)
    lowered = pairs - sums.sign().unsqueeze(2) * share
    factor = torch.where(share.square().mean((1, 2)) > 1 / 12, sums.abs().amax(1) / (most - 1), 0).clamp_min(1)
    narrowed = torch.where(factor[:, None, None] > 1, (pairs / factor[:, None, None]).round(), lowered)
    return narrowed.flatten(1).to(weight.dtype), scales * factor


def _integers(rows: int, width: int) -> Scaled:
    return Scaled(torch.empty(rows, width, dtype=torch.uint8), torch.empty(rows))


def _as_c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    match argument:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert argument.is_contiguous(), "the library reads whole rows"
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            return ctypes.c_int64(argument)
        case float():
            return ctypes.c_float(argument)


def fastest(device: torch.device) -> TorchKernels:
    """The form that is fastest on `device`."""
    if device.type == "cuda":
        return CudaKernels()
    return NativeKernels.find() or TorchKernels()
