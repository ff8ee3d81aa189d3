"""Makes a model fit for products of int8: evens out channels between activations and weights, and measures the rest."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from guard.model.kernels import span_of, turned
from guard.training.data import Example
from guard.training.evaluate import Floats, labels
from guard.training.finetune import Batch, TurnModel, rounded

_SMOOTHED = ("self_attn.o_proj", "mlp.down_proj")  # whose inputs no norm comes before
_LEAST = 1e-5
_EVERY = 13  # of the tokens is enough to choose a strength
_STRENGTHS = [tenths / 10 for tenths in range(11)]
_MOST_AUPRC_LOST = 0.003
_MOST_VERDICTS_CHANGED = 0.01


def even(
    model: TurnModel | LlamaForCausalLM,
    batches: Iterable[Batch | Tensor],
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The model's tensors, such that it computes the same, but with channels of activations that differ less in size.

    `more` stand in for those of their names: a head with outputs beyond the taxonomy. A language model is given token
    ids [rows, tokens] without padding; its head comes back apart from the embedding, where they were tied.
    A row of activations is rounded to int8 by one scale, which its largest channel decides. So the residual stream is
    rotated, which makes its channels alike (QuaRot: Ashkboos et al., arXiv:2404.00456); and what is large on `batches`
    among the channels of values and of the gated product is divided in the rows of the matrix that they come from, and
    multiplied in the columns of the one that they meet (SmoothQuant: Xiao et al., arXiv:2211.10438), by
    max|activation|^strength / max|weight|^(1 - strength), with the strength that leaves least of a product's error.
    """
    inputs = _inputs(model, batches)
    config = model.model.config
    tensors = {name: tensor.clone() for name, tensor in {**model.state_dict(), **more}.items()}
    _rotate(tensors, config)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    dim = config.head_dim or config.hidden_size // config.num_attention_heads

    def shared(divisor: Tensor) -> Tensor:
        """The query heads of a group read the same values."""
        return divisor.view(kv_heads, -1, dim).amax(1, keepdim=True)

    def whole(divisor: Tensor) -> Tensor:
        return shared(divisor).expand(-1, config.num_attention_heads // kv_heads, -1).flatten()

    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        down, up, out, value = (
            tensors[f"{block}.{name}_proj.weight"] for name in ("mlp.down", "mlp.up", "self_attn.o", "self_attn.v")
        )
        share = _divisor(inputs[f"{block}.mlp.down_proj"], down, span=span_of(down.shape[1]))
        up /= share[:, None]
        down *= share
        share = _divisor(inputs[f"{block}.self_attn.o_proj"], out, whole)
        value /= shared(share).flatten()[:, None]
        out *= share
    return tensors


def _rotate(tensors: dict[str, Tensor], config: LlamaConfig) -> None:
    """Gives the model another basis of the residual stream, and norms that only normalise."""
    size = config.hidden_size
    power = size & -size  # the largest power of two in it
    cosines = torch.from_numpy(dct(np.eye(size // power), norm="ortho"))
    turn = torch.kron(torch.from_numpy(hadamard(power)) / power**0.5, cosines)

    def reads(norm: str, *names: str) -> None:
        for name in names:
            tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() * tensors[f"{norm}.weight"] @ turn).float()
        tensors[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])

    def writes(name: str) -> None:
        tensors[f"{name}.weight"] = (turn.T @ tensors[f"{name}.weight"].double()).float()

    tensors["model.embed_tokens.weight"] = (tensors["model.embed_tokens.weight"].double() @ turn).float()
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        reads(f"{block}.input_layernorm", *(f"{block}.self_attn.{name}_proj" for name in "qkv"))
        writes(f"{block}.self_attn.o_proj")
        reads(f"{block}.post_attention_layernorm", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
        writes(f"{block}.mlp.down_proj")
    reads("model.norm", "lm_head" if "lm_head.weight" in tensors else "score")


def _divisor(
    x: Tensor, weight: Tensor, tied: Callable[[Tensor], Tensor] = lambda divisor: divisor, span: int = 0
) -> Tensor:
    """What to divide the channels of `x` [rows, in] by, before the product with `weight` [out, in]; [in].

    Both are turned by `span` where they are rounded.
    """
    rows, columns = (matrix.abs().amax(0).clamp_min(_LEAST) for matrix in (x, weight))
    exact = x @ weight.T
    size = exact.square().sum(1).clamp_min(_LEAST)

    def error(divisor: Tensor) -> float:
        found = rounded(turned(x / divisor, span)) @ rounded(turned(weight * divisor, span)).T
        return float(((found - exact).square().sum(1) / size).mean())

    return min((tied(rows**strength / columns ** (1 - strength)) for strength in _STRENGTHS), key=error)


def _inputs(model: TurnModel | LlamaForCausalLM, batches: Iterable[Batch | Tensor]) -> dict[str, Tensor]:
    """What each layer of `_SMOOTHED` gets for some of the tokens, padding apart; [tokens, in]."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    real = torch.tensor([])

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name].append(inputs[0][real][::_EVERY].float())

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name.removeprefix("_orig_mod.")))
        for name, module in model.named_modules()
        if name.endswith(_SMOOTHED)
    ]
    try:
        with torch.inference_mode():
            for batch in batches:
                if isinstance(batch, Batch):
                    real = batch.sequence > 0
                    model(batch)
                else:
                    real = torch.ones_like(batch, dtype=torch.bool)
                    model.model(batch, use_cache=False)  # without the head, whose logits are of the whole vocabulary
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def agreement(reference: Floats, scores: Floats, examples: Sequence[Example]) -> dict[str, float]:
    """How probabilities [rows, heads] of a rounded model compare with those of the model as it was trained.

    A verdict is `unsafe` at 0.5; `auprc_lost` is that of `unsafe`.
    """
    unsafe = labels(examples)[0][:, 0]
    before, after = (float(average_precision_score(unsafe, found[:, 0])) for found in (reference, scores))
    return {
        "rows": len(examples),
        "auprc_lost": round(before - after, 4),
        "verdicts_changed": round(float(((reference[:, 0] >= 0.5) != (scores[:, 0] >= 0.5)).mean()), 4),
        "unsafe_mean_difference": round(float(abs(reference[:, 0] - scores[:, 0]).mean()), 4),
        "unsafe_max_difference": round(float(abs(reference[:, 0] - scores[:, 0]).max()), 4),
        "hazards_max_difference": round(float(abs(reference[:, 1:] - scores[:, 1:]).max()), 4),
    }


def acceptable(found: dict[str, float]) -> bool:
    """Whether a model that agrees so may stand in for the one that was trained."""
    return found["auprc_lost"] <= _MOST_AUPRC_LOST and found["verdicts_changed"] <= _MOST_VERDICTS_CHANGED
