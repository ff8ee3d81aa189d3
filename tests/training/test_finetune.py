from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from guard.model.chat import ChatTokenizer
from guard.training.data import Example, Recipe
from guard.training.finetune import Reading, TurnModel, batches, read
from guard.types import Conversation, Role, Turn
from tests.training.tiny import RECIPE, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> ChatTokenizer:
    return ChatTokenizer(base / "tokenizer.json", 64)


@pytest.fixture(scope="module")
def model(base: Path) -> TurnModel:
    model = TurnModel(LlamaConfig.from_pretrained(base))
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def example(*texts: str) -> Example:
    roles = (Role.USER, Role.AGENT)
    turns = tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts))
    return Example("1", "colours", "en", Conversation(turns, len(turns) - 1), False, frozenset())


conversations = st.lists(st.lists(st.text("ab", max_size=6), min_size=1, max_size=3), min_size=1, max_size=12)


@settings(deadline=None)
@given(texts=conversations)
def test_packing_changes_no_score(model: TurnModel, tokenizer: ChatTokenizer, texts: list[list[str]]) -> None:
    """Every label of a batch of packed and folded conversations is scored as it is alone."""

    def scored(examples: Sequence[Example]) -> dict[int, torch.Tensor]:
        return {
            place: logits
            for batch in batches(examples, tokenizer, (32, 64), 128)
            for place, logits in zip(batch.places, model(batch), strict=True)
        }

    examples = [example(*turns) for turns in texts]
    with torch.inference_mode():
        together = scored(examples)
        assert together.keys() == set(range(len(examples)))
        for place, one in enumerate(examples):
            torch.testing.assert_close(together[place], scored([one])[0], atol=1e-5, rtol=1e-5)


def test_a_conversation_is_read_within_the_one_it_begins(tokenizer: ChatTokenizer) -> None:
    """Labels of earlier turns cost no tokens of their own; a repeated example does, since it is to be met again."""
    talk = ("ab", "ba", "aa")
    labels = [example(*talk[:turns]) for turns in (1, 3, 2)]

    def tokens(examples: Sequence[Example]) -> int:
        return sum(int((batch.sequence > 0).sum()) for batch in batches(examples, tokenizer, (64,), 64))

    assert tokens(labels) == tokens(labels[1:2])
    assert tokens([*labels, labels[1]]) == 2 * tokens(labels)


def test_epochs_of_unlike_lengths_follow_one_another(tokenizer: ChatTokenizer) -> None:
    """Each batch of each epoch is read once and in order, also from within a later epoch on."""
    recipe = Recipe.model_validate(RECIPE | {"augmented": 0.9})
    examples = [example("ab" * (n % 9 + 1)) for n in range(120)]

    def stood(reading: Reading) -> tuple[int, int, int]:
        return reading.epoch, reading.place, reading.batches

    whole = [stood(reading) for reading in islice(read(examples, tokenizer, recipe, 0, 0), 60)]
    sizes = {epoch: size for epoch, _, size in whole}
    assert len(set(sizes.values())) > 1
    assert whole == [(epoch, place, size) for epoch, size in sizes.items() for place in range(size)][:60]
    last = len(sizes) - 2  # the last whole one
    first = whole.index((last, 1, sizes[last]))
    assert [stood(one) for one in islice(read(examples, tokenizer, recipe, last, 1), 60 - first)] == whole[first:]
