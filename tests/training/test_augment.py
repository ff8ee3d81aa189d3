import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.training.augment import DISGUISES, Augmenter
from guard.training.data import Example
from guard.types import Conversation, Role, Turn

_TEXT = "Where can I buy fresh bread early in the morning, before the market opens?"


def example(text: str = _TEXT, role: Role = Role.USER, *, unsafe: bool = False) -> Example:
    turns = (Turn(Role.USER, "Earlier turn"), Turn(role, text))
    hazards = frozenset({"S1"}) if unsafe else frozenset[str]()
    return Example("1", "colours", "en", Conversation(turns, 1), unsafe, hazards)


@given(seed=st.integers(), unsafe=st.booleans(), role=st.sampled_from([Role.USER, Role.AGENT]), text=st.text())
def test_labels_and_earlier_turns_stay(seed: int, unsafe: bool, role: Role, text: str) -> None:
    """Whatever is done to a judged turn, its label, its role and the turns before it stay; no hazard is lost."""
    before = example(text, role, unsafe=unsafe)
    after = Augmenter([example()])(before, random.Random(seed))
    assert (after.unsafe, after.role) == (before.unsafe, before.role)
    assert after.conversation.turns[:-1] == before.conversation.turns[:-1]
    assert after.hazards is not None
    assert before.hazards is not None
    assert after.hazards - before.hazards <= ({"X3"} if unsafe else frozenset())
    assert before.hazards <= after.hazards
    assert replace(after, conversation=before.conversation, hazards=before.hazards) == before


def test_what_is_too_long_to_be_encoded_is_no_attack() -> None:
    """It stays as it is, and so do its hazards."""
    for text, hazards in ((_TEXT, frozenset({"S1", "X3"})), (_TEXT * 20, frozenset({"S1"}))):
        changed = Augmenter([]).change("encoded", example(text, unsafe=True), random.Random(1))
        assert changed.hazards == hazards


@pytest.mark.parametrize("name", DISGUISES)
def test_each_disguise_changes_a_text_the_same_way_again(name: str) -> None:
    """Every disguise changes an ordinary sentence, and a seed decides how."""
    first, again = (DISGUISES[name](_TEXT, random.Random(5)) for _ in range(2))
    assert first == again != _TEXT


def test_an_unsafe_reply_is_cut_late() -> None:
    """Of a reply that is cut short a beginning is left; of an unsafe one most of it."""
    words = [f"w{n}" for n in range(100)]
    text = " ".join(words)
    augment = Augmenter([])
    for unsafe, least in ((False, 15), (True, 70)):
        seen = set()
        for seed in range(400):
            found = augment(example(text, Role.AGENT, unsafe=unsafe), random.Random(seed)).conversation.turns[-1].text
            if found != text and text.startswith(found):
                seen.add(len(found.split()))
        assert least <= min(seen) < max(seen) < 100


def test_a_recipe_may_say_how_often_each_is() -> None:
    """Of what it does not name as often as ever; and a name that nobody knows is told."""
    only, never = dict.fromkeys(DISGUISES, 0.0), {"passage": 0.0}
    for shares, often in ((only, {2}), (never, {0, 1})):
        augment = Augmenter([example()], shares)  # whose text is also the only passage
        changed = [augment(example(), random.Random(seed)).conversation.turns[-1].text for seed in range(100)]
        assert {text.count(_TEXT) for text in changed} == often
    with pytest.raises(ConfigError, match=r"disguises: there is no 'pasage'; did you mean passage\?"):
        Augmenter([example()], {"pasage": 1.0})
    with pytest.raises(ConfigError, match="disguises: none of them is left"):
        Augmenter([], only)
