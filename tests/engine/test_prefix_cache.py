"""What is held of earlier requests saves reading and changes nothing else: with a stand-in, and with the real model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.engine.prefix_cache import Paged, PrefixCache
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.telemetry import Metrics
from guard.types import PAGE, Conversation, Coverage, Prefix, Role, Scores, Span, Tokens, Turn


class PagedModel:
    """Knows a token by what it and all before it are, and finds what it has read nowhere but in its pages."""

    page_bytes = 1

    def __init__(self) -> None:
        self.fails = False
        self.read = 0  # tokens, in the last pass
        self._pages: list[list[int]] = []

    def reserve(self, pages: int) -> None:
        self._pages = [[-1] * PAGE for _ in range(pages)]

    def copy(self, source: int, target: int) -> None:
        self._pages[target] = list(self._pages[source])

    def score(self, batch: Sequence[Tokens], prefixes: Sequence[Prefix] = ()) -> list[tuple[Scores, ...]]:
        self.read = 0
        passes = [list(self._pass(*each)) for each in zip(batch, prefixes, strict=True)]
        if self.fails:
            raise RuntimeError("out of memory")
        return [
            tuple(Scores(own[span.end - 1 - prefix.held], {}) for span in tokens.spans)
            for own, tokens, prefix in zip(passes, batch, prefixes, strict=True)
        ]

    def _pass(self, tokens: Tokens, prefix: Prefix) -> Iterator[int]:
        known = self._pages[prefix.pages[(prefix.held - 1) // PAGE]][(prefix.held - 1) % PAGE] if prefix.held else 0
        for place in range(prefix.held, len(tokens.ids)):
            known = known_as(known, tokens.ids[place])
            if prefix.written <= place < PAGE * len(prefix.pages):
                self._pages[prefix.pages[place // PAGE]][place % PAGE] = known
            self.read += 1
            yield known


def known_as(before: int, token: int) -> int:
    return crc32(repr((before, token)).encode())


def cold(tokens: Tokens) -> list[Scores]:
    known = [0]
    for token in tokens.ids:
        known.append(known_as(known[-1], token))
    return [Scores(known[span.end], {}) for span in tokens.spans]


def tokens_of(ids: Sequence[int], tenant: str | None = "someone", ends: Sequence[int] = ()) -> Tokens:
    """A sequence whose turns end at `ends`, by default one that is all of it."""
    spans = (Span(turn, Role.USER, 0, end, Coverage(end, end)) for turn, end in enumerate(ends or [len(ids)]))
    return Tokens(tuple(ids), tuple(spans), tenant=tenant)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """A cache of some pages, whose clock goes on by a minute for each pass."""

    def __init__(self, pages: int) -> None:
        self.model, self.metrics, self.clock = PagedModel(), Metrics(), Clock()
        self.cache = PrefixCache(self.model, pages, self.metrics, self.clock)

    def read(self, *batch: Tokens, seconds: float = 60) -> int:
        """How many tokens of a batch are read, whose scores are those of a cold pass."""
        self.clock.now += seconds
        assert [list(scores) for scores in self.cache.score(batch)] == [cold(tokens) for tokens in batch]
        return self.model.read

    @property
    def held(self) -> float | None:
        return self.metrics.registry.get_sample_value("guard_prefix_cache_bytes")


SAID = list(range(1000))
END = 7777


def test_a_conversation_that_goes_on_costs_its_new_tokens() -> None:
    """To the token, whatever pages it ends in; `unread` knows before."""
    cached, held = Cache(32), 0
    for length in (30, 50, 64, 65, 100, 130, 500, 510):
        tokens = tokens_of(SAID[:length])
        assert cached.cache.unread(tokens) == length - held
        assert cached.read(tokens) == length - held
        held = length
    assert cached.held == 8  # pages: one conversation stands there once


def test_unfinished_text_costs_its_new_tokens_and_an_end() -> None:
    """An end token that comes to stand elsewhere, and half a word before it, are read again, and take little room."""
    cached = Cache(32)
    cached.read(tokens_of([*SAID[:50], END]))
    for length in range(50, 400, 10):
        new = cached.read(tokens_of([*SAID[:length], 5000, 5001, END]))
        assert new == (3 if length == 50 else 13)
    assert cached.held is not None
    assert cached.held <= 10  # pages, of which 7 are the conversation


def test_the_same_again_costs_what_is_scored() -> None:
    """Every span has to be read at its end."""
    cached = Cache(32)
    assert cached.read(tokens_of(SAID[:100])) == 100
    assert cached.read(tokens_of(SAID[:100])) == 1
    assert cached.read(tokens_of(SAID[:90])) == 1
    assert cached.read(tokens_of(SAID[:100], ends=[40, 100])) == 61


def test_conversations_share_what_they_begin_with() -> None:
    """Full pages serve both as they are; of the page in which they part what is alike is copied."""
    cached = Cache(32)
    assert cached.read(tokens_of([*SAID[:230], *range(2000, 2100)])) == 330
    assert cached.read(tokens_of([*SAID[:230], *range(3000, 3100)])) == 100
    assert cached.read(tokens_of([*SAID[:230], *range(2000, 2200)])) == 100
    assert cached.held == 6 + 3 + 1


def test_tenants_share_nothing() -> None:
    """Not even what they say alike; and what has no tenant is not kept."""
    cached = Cache(32)
    assert cached.read(tokens_of(SAID[:100], "one")) == 100
    assert cached.read(tokens_of(SAID[:100], "other")) == 100
    assert cached.read(tokens_of(SAID[:100], None)) == 100
    assert cached.read(tokens_of(SAID[:100], None)) == 100
    assert cached.cache.unread(tokens_of(SAID[:100], None)) == 100
    assert cached.read(tokens_of(SAID[:100], "one")) == 1


def test_what_is_no_ones_is_read_once_for_all() -> None:
    """Whole pages of it, for any tenant and for none; what follows is each tenant's own."""
    cached = Cache(32)

    def prompt(tenant: str | None, end: int) -> Tokens:
        return replace(tokens_of([*SAID[:150], *SAID[200:end]], tenant), shared=150)

    assert cached.read(prompt("one", 300)) == 250
    assert cached.read(prompt(None, 300)) == 250 - 2 * PAGE
    assert cached.held == 4
    assert cached.read(prompt("two", 300)) == 250 - 2 * PAGE
    assert cached.read(prompt("two", 300)) == 1
    assert cached.cache.unread(prompt(None, 300)) == 250 - 2 * PAGE
    assert cached.read(replace(prompt("two", 300), shared=100)) == 250 - PAGE  # a page that is not all no one's


def test_what_is_not_worth_it_is_not_kept() -> None:
    """The end of a prompt, which stands elsewhere the next time: the page before it is gone on in."""
    cached = Cache(3)

    def prompt(said: int) -> Tokens:
        return replace(tokens_of([*SAID[:said], *range(5000, 5040)]), kept=said)

    assert cached.read(prompt(130)) == 170
    assert cached.held == 3
    assert cached.read(prompt(140), seconds=0) == 50
    assert cached.read(prompt(150), seconds=0) == 50
    assert cached.read(prompt(150), seconds=0) == 40


def test_what_was_used_longest_ago_goes_first() -> None:
    """A page follows what it stands on into oblivion, or goes before it."""
    cached = Cache(4)
    cached.read(tokens_of(SAID[:128], "one"))
    cached.read(tokens_of(SAID[:128], "two"))
    cached.read(tokens_of(SAID[:64], "one"))
    cached.read(tokens_of(SAID[:128], "three"))
    assert cached.read(tokens_of(SAID[:128], "three")) == 1
    assert cached.read(tokens_of(SAID[:64], "one")) == 1
    assert cached.read(tokens_of(SAID[:128], "one"), seconds=0) == 64
    assert cached.held == 4


def test_what_serves_others_is_left_to_them() -> None:
    """Where there is no page that nobody has used for some seconds, a conversation is read without being kept."""
    cached = Cache(4)
    cached.read(tokens_of(SAID[:192], "one"))
    assert cached.read(tokens_of(SAID[:192], "two"), seconds=1) == 192
    assert cached.read(tokens_of(SAID[:192], "two"), seconds=1) == 128
    assert cached.read(tokens_of(SAID[:192], "one"), seconds=1) == 1
    assert cached.read(tokens_of(SAID[:300], "three"), seconds=60) == 300
    assert cached.read(tokens_of(SAID[:300], "three"), seconds=60) == 300 - 4 * PAGE


def test_a_failure_of_the_model_leaves_nothing_behind() -> None:
    """What was being read is not held, what was held before is."""
    cached = Cache(8)
    cached.read(tokens_of(SAID[:100]))
    cached.model.fails = True
    with pytest.raises(RuntimeError):
        cached.cache.score([tokens_of(SAID[:300]), tokens_of(range(5000, 5100))])
    cached.model.fails = False
    assert cached.read(tokens_of(SAID[:300])) == 300 - PAGE
    assert cached.read(tokens_of(range(5000, 5100))) == 100
    assert cached.held == 7


beginnings = st.tuples(st.sampled_from([0, 0, 0, 2000]), st.integers(1, 300)).map(
    lambda of: range(of[0], of[0] + of[1])
)
sequences = st.builds(
    lambda parts, tenant, turns, kept, shared: replace(
        tokens_of(ids := [token for part in parts for token in part], tenant, sorted({*turns[: len(ids)], len(ids)})),
        kept=None if kept is None else min(kept, len(ids)),
        shared=min(shared, len(ids) if kept is None else kept),
    ),
    st.lists(
        beginnings | st.just([END]) | st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=3
    ),
    st.sampled_from(["one", "one", "two", None]),
    st.sampled_from([[], [1]]),
    st.none() | st.integers(0, 300),
    st.sampled_from([0, 0, 64, 100, 200]),
)


@settings(deadline=None)
@given(
    pages=st.integers(0, 12),
    passes=st.lists(
        st.tuples(st.lists(sequences, min_size=1, max_size=4), st.sampled_from([0, 1, 60]), st.integers(0, 9)),
        max_size=8,
    ),
)
def test_cached_is_cold(pages: int, passes: list[tuple[list[Tokens], float, int]]) -> None:
    """Whatever came before, whatever stands beside it, and however little room there is; and no page is lost."""
    cached = Cache(pages)
    for batch, seconds, fate in passes:
        cached.model.fails = not fate
        if not fate:
            with pytest.raises(RuntimeError):
                cached.cache.score(batch)
        else:
            cached.read(*batch, seconds=seconds)
    cached.model.fails = False
    fresh = tokens_of(range(9000, 9000 + PAGE * pages + 1))
    cached.read(fresh)  # takes every page there is
    assert cached.read(fresh) == 1 + (0 if pages else PAGE * pages)
    assert cached.held == pages


@cache
def real(dtype: str) -> TurnClassifier:
    return TurnClassifier(Settings().model, "cpu", dtype)


texts = st.text(max_size=40) | st.lists(st.sampled_from(["Hello", " world", ". ", "How do I", "🗝️", "12 3", "é"])).map(
    "".join
)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@settings(deadline=None, max_examples=5)
@given(
    said=st.lists(st.tuples(st.sampled_from(Role), texts), min_size=1, max_size=3),
    growing=texts,
    pages=st.integers(0, 6),
    random=st.randoms(use_true_random=False),
)
def test_the_real_model_gives_the_same_bits(
    dtype: str, said: list[tuple[Role, str]], growing: str, pages: int, random: Random
) -> None:
    """However a turn grows, in whatever company, with room or without: it is scored as by a pass over the whole."""
    hold_to_the_bit(real(dtype), said, growing, pages, random)


def hold_to_the_bit(
    model: TurnClassifier, said: list[tuple[Role, str]], growing: str, pages: int, random: Random
) -> None:
    clock = Clock()
    cached: PrefixCache = PrefixCache(as_paged(model), pages * model.page_bytes, Metrics(), clock)
    before = tuple(Turn(role, text) for role, text in said)
    for length in sorted({*random.choices(range(len(growing) + 1), k=4), len(growing)}):
        turns = (*before, Turn(Role.AGENT, growing[:length]))
        others = [Conversation(turns[: random.randrange(len(turns)) + 1], None) for _ in range(random.randrange(3))]
        batch = [
            replace(tokens, tenant=random.choice(["one", "two", None]))
            for conversation in (Conversation(turns, len(turns) - 1), *others)
            for tokens in model.tokenise(conversation)
        ]
        clock.now += random.choice([0, 60])
        assert cached.score(batch) == [model.score([tokens])[0] for tokens in batch]


def as_paged(model: TurnClassifier) -> Paged:
    return model
