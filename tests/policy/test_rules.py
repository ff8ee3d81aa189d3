"""Exact rules: what a term, a pattern and an exception match, in any script, and that nothing else counts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.policy.rules import Matcher, Rule, words
from guard.types import Action, Role


def rule(name: str, *terms: str, pattern: str = "", exceptions: tuple[str, ...] = ()) -> Rule:
    folded = tuple(map(words, terms))
    return Rule(name, "", frozenset(Role), Action.BLOCK, None, folded, pattern, tuple(map(words, exceptions)))


def matches(text: str, *terms: str, pattern: str = "", exceptions: tuple[str, ...] = ()) -> bool:
    return Matcher([rule("r", *terms, pattern=pattern, exceptions=exceptions)]).hits([text]) == {"r"}


@pytest.mark.parametrize(
    ("term", "text", "expected"),
    [
        ("bomb", "A BOMB!", True),
        ("bomb", "bombastic, a-bombs", False),
        ("pipe bomb", "a pipe-bomb, a pipe,\n bomb", True),
        ("pipe bomb", "a pipe and a bomb", False),
        ("naïve café", "NAIVE CAFE\u0301", True),
        ("strasse", "Straße", True),
        ("bomb", "ｂｏｍｂ", True),
        ("αθήνα", "Στην ΑΘΗΝΑ.", True),
        ("мой", "мои", False),
        ("бомба", "БОМБА", True),
        ("炸弹", "如何制造炸弹?", True),
        ("爆弾", "爆の弾", False),
        ("폭탄", "폭탄을", True),
        ("हिंदी", "हिंदी!", True),
        ("हिंदी", "हद", False),
        ("سلام", "سَلَام", True),
        ("🔫", "Hi🔫🔫", True),
        ("kill_process", "kill process", True),
    ],
)
def test_terms_are_whole_words_folded(term: str, text: str, expected: bool) -> None:
    """Case, accents, compatibility forms and what stands between words do not matter; a part of a word is no match."""
    assert matches(text, term) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kill him", True),
        ("kill the process", False),
        ("Kill the Process, then kill him", True),
        ("don't kill the processor", True),
        ("how to kill  THE process?", False),
    ],
)
def test_a_match_within_an_exception_does_not_count(text: str, expected: bool) -> None:
    """Of a term, and of a pattern alike; a match elsewhere in the text still does."""
    exceptions = ("kill the process",)
    assert matches(text, "kill", exceptions=exceptions) is expected
    assert matches(text, pattern=r"(?i)\bkill\b", exceptions=exceptions) is expected


def test_an_exception_is_for_its_own_rule_alone() -> None:
    """What one rule lets pass, another may still match; and any view of a text may match."""
    matcher = Matcher([rule("mild", "kill", exceptions=("kill it",)), rule("strict", "kill"), rule("other", "x")])
    assert matcher.hits(["kill it"]) == {"strict"}
    assert matcher.hits(["kill it", "x"]) == {"strict", "other"}
    assert matcher.hits([]) == matcher.hits([""]) == frozenset()


alphabet = st.text("abé ,.A", max_size=24)


@given(st.lists(alphabet.filter(words), min_size=1, max_size=4), alphabet)
def test_terms_are_found_as_a_search_for_words_would(terms: list[str], text: str) -> None:
    """One pass over the text finds a phrase just where its words stand in a row."""
    said = f" {' '.join(words(text))} "
    expected = {str(n) for n, term in enumerate(terms) if f" {' '.join(words(term))} " in said}
    assert Matcher(rule(str(n), term) for n, term in enumerate(terms)).hits([text]) == expected


@given(st.text(max_size=30))
def test_folding_is_done_once(text: str) -> None:
    """The words of folded words are the same words."""
    assert words(" ".join(words(text))) == words(text)
    assert not any(re.search(r"\s", word) for word in words(text))


@given((alphabet | st.text(max_size=20)).filter(words), alphabet, alphabet)
def test_an_exception_around_all_of_a_match_voids_it(text: str, before: str, after: str) -> None:
    """A pattern that matches a whole text, whatever it holds, is excepted by that text's own words."""
    assert matches(f"{before} {text} {after}", text)
    assert not matches(text, text, exceptions=(text,))
