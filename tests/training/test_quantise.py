from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guard.model.chat import ChatTokenizer
from guard.training.calibrate import predict
from guard.training.data import Example
from guard.training.evaluate import HEADS
from guard.training.finetune import TurnModel, batches
from guard.training.pipeline import load_model, score
from guard.training.quantise import acceptable, agreement, even
from guard.types import Conversation, Role, Turn
from tests.training.tiny import write_base
from tests.training.untrained import write_model


def rows(count: int) -> list[Example]:
    conversations = [Conversation((Turn(Role.USER, f"row {n}"),), 0) for n in range(count)]
    return [Example(str(n), "s", "en", talk, n % 2 == 1, frozenset()) for n, talk in enumerate(conversations)]


def test_evening_out_changes_no_logit_and_rounding_hurts_less(tmp_path: Path) -> None:
    """Channels a hundred times the others no longer cost the others their precision; what is computed stays."""
    torch.manual_seed(2)
    model = TurnModel(LlamaConfig.from_pretrained(write_base(tmp_path)))
    torch.nn.init.normal_(model.score.weight)
    with torch.no_grad():  # outliers before each kind of product
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight[3] = 100
            elif "up_proj" in name or "v_proj" in name:
                weight[7] *= 100
    tokenizer = ChatTokenizer(tmp_path / "tokenizer.json", 64)
    examples = rows(20)
    tensors = even(model, batches(examples, tokenizer, [64], 256))

    def logits(tensors: dict[str, torch.Tensor], *, rounded: bool) -> np.ndarray[Any, Any]:
        other = TurnModel(model.model.config, rounded=rounded)
        other.load_state_dict(tensors)
        return predict(other, examples, tokenizer)

    exact = logits(model.state_dict(), rounded=False)
    np.testing.assert_allclose(logits(tensors, rounded=False), exact, rtol=1e-3, atol=1e-3 * abs(exact).max())
    lost, left = (abs(logits(own, rounded=True) - exact).mean() for own in (model.state_dict(), tensors))
    assert left < 0.5 * lost


def test_evening_out_a_language_model_changes_no_logit() -> None:
    """Its head is tied no longer, and its heads need not be as wide as its hidden state has room for."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    ids = torch.randint(80, (3, 1, 40))
    other = LlamaForCausalLM(LlamaConfig(**config.to_dict() | {"tie_word_embeddings": False})).eval()
    other.load_state_dict(even(model, ids))
    with torch.inference_mode():
        torch.testing.assert_close(other(ids[:, 0]).logits, model(ids[:, 0]).logits, rtol=1e-4, atol=1e-5)


def test_training_rounds_as_much_as_products_of_int8_do(tmp_path: Path) -> None:
    """Rounding moves logits in training about as far as it does where they are served in int8."""
    served = score(write_model(tmp_path), rows(40), "int8")
    exact = load_model(tmp_path)
    rounded = TurnModel(exact.model.config, rounded=True)
    rounded.load_state_dict(exact.state_dict())
    tokenizer = ChatTokenizer(tmp_path / "tokenizer.json", 64)
    logits, moved = (predict(model, rows(40), tokenizer) for model in (exact, rounded))
    assert 0.5 < np.std(moved - logits) / np.std(np.log(served / (1 - served)) - logits) < 2


def test_rounding_lets_gradients_through(tmp_path: Path) -> None:
    """Every weight that is trained has a gradient, though rounding is flat almost everywhere."""
    model = TurnModel(LlamaConfig.from_pretrained(write_base(tmp_path)), rounded=True)
    torch.nn.init.normal_(model.score.weight)
    (batch, *_) = batches(rows(8), ChatTokenizer(tmp_path / "tokenizer.json", 64), [64], 256)
    model(batch).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.model.layers.parameters())


@pytest.mark.parametrize(("moved", "allowed"), [(0, True), (2, True), (3, False)])
def test_a_rounded_model_may_change_one_verdict_of_a_hundred(moved: int, allowed: bool) -> None:
    """The gate counts verdicts that change; the rest of the score may move."""
    examples = rows(200)
    before = np.full((200, len(HEADS)), 0.1)
    before[1::2, 0] = 0.9
    after = before.copy()
    after[:, 1:] += 0.05
    after[1 : 2 * moved : 2, 0] = 0.4
    found = agreement(before, after, examples)
    assert found["verdicts_changed"] == moved / 200
    assert found["hazards_max_difference"] == 0.05
    assert acceptable(found) is allowed


def test_a_rounded_model_may_not_rank_much_worse() -> None:
    """The gate sees harm that moves below harmless rows on the same side of the threshold."""
    examples = rows(200)
    before = np.full((200, len(HEADS)), 0.1)
    before[1::2, 0] = 0.3
    after = before.copy()
    after[1:40:2, 0] = 0.05
    found = agreement(before, after, examples)
    assert found["verdicts_changed"] == 0
    assert found["auprc_lost"] > 0.003
    assert not acceptable(found)
