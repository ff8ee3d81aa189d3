"""The packed forward pass against transformers, and against itself in other batches."""

import functools
import json
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guard.errors import CheckpointError
from guard.model.checkpoint import as_integers, load_tensors, read_checkpoint
from guard.model.kernels import CudaKernels, NativeKernels, Scaled, TorchKernels, span_of, turned
from guard.model.llama import Llama, LlamaConfig
from guard.settings import Settings
from guard.types import PAGE, Prefix


class CudaShapes(CudaKernels):
    """Computes as torch does on the CPU, with keys and values packed as they are for CUDA."""

    linear = TorchKernels.linear

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_k: Tensor, longest: int, longest_k: int
    ) -> Tensor:
        out = torch.empty_like(q)
        for (start, end), (first, last) in zip(pairwise(bounds.tolist()), pairwise(bounds_k.tolist()), strict=True):
            if start < end:
                own_q, own_k, own_v = (
                    t.transpose(0, 1).unsqueeze(0) for t in (q[start:end], k[first:last], v[first:last])
                )
                mask = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - (end - start))
                attended = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=mask, enable_gqa=True)
                out[start:end] = attended.squeeze(0).transpose(0, 1)
        return out


FORMS: dict[str, TorchKernels] = {"torch": TorchKernels(), "packed": CudaShapes()}
if native := NativeKernels.find():
    FORMS["native"] = native

INTEGER_FORMS = [form for form in FORMS if form != "packed"]  # which are the CPU's
TYPED_FORMS = [
    (form, dtype)
    for form in FORMS
    for dtype in (torch.float32, torch.bfloat16, torch.int8)
    if dtype == torch.float32 or form in INTEGER_FORMS  # how tokens are packed has nothing to do with their type
]

# Every length that a block of attention or a bucket of rows begins or ends at, and some between.
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def llama3_style() -> transformers.LlamaForCausalLM:
    """Random weights in the shape of Llama 3: grouped queries, stretched RoPE, untied embeddings."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    return transformers.LlamaForCausalLM(config)


def biased() -> transformers.LlamaForCausalLM:
    """Biases everywhere, no grouping, and a head width that the native kernels leave to torch."""
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():  # biases begin as zeros, which would hide their absence
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def embedded() -> transformers.LlamaForCausalLM:
    """The backbone that Guard ships."""
    checkpoint = read_checkpoint(Settings().model)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    tensors = {
        name: tensor for name, tensor in load_tensors(Settings().model, torch.float32).items() if "score" not in name
    }
    model.load_state_dict(tensors, strict=False)
    return model


MODELS = {"embedded": embedded, "llama3": llama3_style, "biased": biased}


@functools.cache
def reference(name: str) -> transformers.LlamaForCausalLM:
    model = MODELS[name]()
    model.eval()
    return model


@functools.cache
def packed(name: str, form: str, dtype: torch.dtype = torch.float32) -> Llama:
    model = reference(name)
    state = model.state_dict()
    tensors = as_integers(state) if dtype == torch.int8 else {key: value.to(dtype) for key, value in state.items()}
    return Llama(LlamaConfig.read(json.loads(model.config.to_json_string())), tensors, FORMS[form])


def random_ids(length: int, seed: int) -> list[int]:
    chooser = Random(seed)
    return [chooser.randrange(500) for _ in range(length)]


def read_all(model: Llama, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Hidden states of every token, one tensor a sequence."""
    hidden = model.read(sequences, [range(len(sequence)) for sequence in sequences])
    return torch.split(hidden, [len(sequence) for sequence in sequences])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name: str, form: str) -> None:
    """In float32 the two differ by less than 1e-4 of the largest hidden state."""
    sequences = [random_ids(length, seed=length) for length in LENGTHS]
    found = read_all(packed(name, form), sequences)
    for sequence, own in zip(sequences, found, strict=True):
        with torch.no_grad():
            theirs = reference(name).model(torch.tensor([sequence])).last_hidden_state[0]
        assert (own - theirs).abs().max() <= 1e-4 * theirs.abs().max()


batches = given(lengths=st.lists(st.integers(1, 100), min_size=2, max_size=5), random=st.randoms(use_true_random=False))


@settings(deadline=None, max_examples=10)
@batches
def test_the_embedded_model_does_not_depend_on_the_batch(lengths: list[int], random: Random) -> None:
    """Alone, or in any batch and any order, a sequence gives the same bits; in the form that is served."""
    hold_batch_invariance(packed("embedded", next(reversed(FORMS))), lengths, random)


@pytest.mark.parametrize(("form", "dtype"), TYPED_FORMS, ids=str)
@settings(deadline=None, max_examples=12)
@batches
def test_no_form_depends_on_the_batch(form: str, dtype: torch.dtype, lengths: list[int], random: Random) -> None:
    """So it is in torch alone and with native kernels, in float32, bfloat16 and int8.

    But for bfloat16 on AMX, where the order of oneDNN's sums depends on the number of rows: there it is nearly so.
    """
    nearly = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False)
    hold_batch_invariance(packed("llama3", form, dtype), lengths, random, 0.03 if nearly else 0)


def hold_batch_invariance(model: Llama, lengths: list[int], random: Random, within: float = 0) -> None:
    """To the bit, or `within` a share of the largest value."""
    sequences = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    together = read_all(model, sequences)
    order = random.sample(range(len(sequences)), len(sequences))
    shuffled = read_all(model, [sequences[i] for i in order])
    (alone,) = read_all(model, [sequences[order[0]]])
    for i, own in [*zip(order, shuffled, strict=True), (order[0], alone)]:
        assert (own - together[i]).abs().max() <= within * together[i].abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_a_position_reads_the_same_whatever_follows(form: str) -> None:
    """One pass gives every turn what a pass that ends there gives: to the bit, but for torch's own attention."""
    model = packed("llama3", form)
    ids = random_ids(150, seed=0)
    ends = [0, 16, 63, 64, 100, 149]
    together = model.read([ids], [ends])
    for row, end in zip(together, ends, strict=True):
        ending = model.read([ids[: end + 1]], [[end]])[0]
        torch.testing.assert_close(row, ending, rtol=0, atol=0 if form == "native" else 1e-4)


@pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form, dtype in TYPED_FORMS if dtype != torch.bfloat16], ids=str
)
@settings(deadline=None, max_examples=12)
@given(
    cuts=st.lists(st.integers(1, 199), max_size=6, unique=True).map(sorted),
    paged=st.integers(0, 4),
    lengths=st.lists(st.integers(1, 100), max_size=3),
)
def test_what_is_held_need_not_be_read(
    form: str, dtype: torch.dtype, cuts: list[int], paged: int, lengths: list[int]
) -> None:
    """Read piece by piece a sequence gives what it gives as a whole: to the bit, but for torch's own attention.

    So it does among others, and where pages are there for its beginning alone.
    """
    model = packed("llama3", form, dtype)
    model.reserve(6)
    ids, pages = random_ids(200, seed=1), (4, 1, 3, 0)[:paged]
    others = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    whole = model.read([ids], [range(200)])
    atol = 0 if form == "native" else 1e-4 if dtype == torch.float32 else 0.1
    held = 0
    for end in [*cuts, 200]:
        read = model.read(
            [*others, ids[:end]],
            [[]] * len(others) + [range(held, end)],
            prefixes=[Prefix()] * len(others) + [Prefix(held, held, pages)],
        )
        torch.testing.assert_close(read, whole[held:end], rtol=0, atol=atol)
        held = min(end, PAGE * paged)


def test_a_page_that_is_written_stays_as_it_is() -> None:
    """Tokens that are read again over what their pages hold find it there; a copied beginning of a page is as good."""
    model = packed("llama3", next(reversed(FORMS)))
    model.reserve(3)
    ids = random_ids(100, seed=2)
    whole = model.read([ids], [[99]], prefixes=[Prefix(0, 0, (0, 1))])
    assert torch.equal(model.read([ids], [[99]], prefixes=[Prefix(99, 100, (0, 1))]), whole)
    model.copy(1, 2)
    assert torch.equal(model.read([ids], [[99]], prefixes=[Prefix(64 + 20, 64 + 20, (0, 2))]), whole)


def test_forms_agree() -> None:
    """The native kernels differ from torch by rounding alone."""
    sequences = [random_ids(length, seed=length) for length in LENGTHS]
    theirs, *others = (torch.cat(read_all(packed("embedded", form), sequences)) for form in FORMS)
    for own in others:
        assert (own - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["llama3", "biased"])
@pytest.mark.parametrize("form", INTEGER_FORMS)
def test_int8_differs_from_float32_by_rounding_alone(name: str, form: str) -> None:
    """Products of int8, with a scale for each row on either side, keep hidden states within a few per cent."""
    sequences = [random_ids(length, seed=length) for length in LENGTHS]
    exact, rounded = (
        torch.cat(read_all(packed(name, form, dtype), sequences)) for dtype in (torch.float32, torch.int8)
    )
    assert (rounded - exact).norm() <= 0.05 * exact.norm()
    assert not torch.equal(rounded, exact)


@settings(deadline=None)
@given(width=st.integers(1, 40).map(lambda sixteens: 16 * sixteens), seed=st.integers(0, 99))
def test_turning_is_its_own_inverse_and_keeps_lengths(width: int, seed: int) -> None:
    """So that a product of turned rows and turned columns is the product."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    other = turned(x, span_of(width))
    torch.testing.assert_close(turned(other, span_of(width)), x)
    torch.testing.assert_close(other.norm(dim=1), x.norm(dim=1))
    assert torch.equal(other, x) == (width % 32 > 0)


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16), min_size=1, max_size=8))
def test_rows_are_rounded_to_the_nearest_integer_of_their_own_scale(rows: list[list[float]]) -> None:
    """Every form rounds a row by its own largest value, and what is rounded is off by half a step at most."""
    x = torch.tensor(rows)
    for kernels in FORMS.values():
        integers, scales = kernels.quantise(x)
        assert integers.dtype == torch.uint8
        back = (integers.float() - kernels.most) * scales[:, None]
        assert torch.all((back - x).abs() <= scales[:, None] * 0.5001)
        torch.testing.assert_close(scales, x.abs().amax(1) / kernels.most)


@pytest.mark.parametrize("form", INTEGER_FORMS)
@settings(deadline=None)
@given(kind=st.sampled_from(["normal", "alike", "few"]), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_no_product_of_integers_overflows(form: str, kind: str, sign: int, seed: int) -> None:
    """Whatever weights there are: as large as each other, or few; and activations as large as they come."""
    torch.manual_seed(seed)
    weight = {
        "normal": torch.randn(32, 128),
        "alike": sign * torch.ones(32, 128),
        "few": sign * torch.ones(32, 128) * (torch.rand(32, 128) < 0.1),
    }[kind]
    x = torch.cat([torch.randn(5, 128), torch.ones(1, 128), -torch.ones(1, 128)])
    stored = as_integers({"w": weight})
    product = FORMS[form].linear(stored["w"], None, stored["w_scale"], residual=True)(x)
    assert isinstance(product, Scaled)
    found, exact = product.values * product.scales[:, None], x @ weight.T
    assert (found - exact).norm() <= 0.03 * exact.norm()


def test_what_is_no_llama_is_refused() -> None:
    """Another architecture, another activation, another RoPE or a tensor that is missing: each says what is wrong."""
    config = json.loads(reference("llama3").config.to_json_string())
    with pytest.raises(CheckpointError, match="model_type"):
        LlamaConfig.read(config | {"model_type": "mistral"})
    with pytest.raises(CheckpointError, match="hidden_act"):
        LlamaConfig.read(config | {"hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match="'yarn'"):
        LlamaConfig.read(config | {"rope_parameters": {"rope_type": "yarn"}})
    tensors = dict(reference("llama3").state_dict())
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        Llama(LlamaConfig.read(config), tensors, TorchKernels())
