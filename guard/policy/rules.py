"""Exact rules: what a text holds, word for word or by a pattern, and linear in its length."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import re2

from guard.types import Action, Reply, Role

# Scripts that put no spaces between words, and Hangul, whose words carry their particles: a character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SYMBOLS = "\u2190-\u2bff\U0001f000-\U0001faff"  # so is an arrow, a sign, an emoji
_INDIC = "\u0900-\u0963\u0966-\u0dff"  # whose vowels are marks within a word
_POINTS = "\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670"  # of Hebrew and Arabic letters, mostly left out
_WORD = re.compile(rf"[{_UNSPACED}{_SYMBOLS}]|(?:[^\W_{_UNSPACED}]|[{_INDIC}{_POINTS}\u0300-\u036f])+")
# The same in two steps, each many times as fast.
_ALONE = re.compile(rf"[{_UNSPACED}{_SYMBOLS}]")
_RUN = re.compile(rf"[\w{_INDIC}{_POINTS}{_SYMBOLS}\u0300-\u036f]+")
_ASCII_RUN = re.compile("[0-9a-z]+")
# Accents of Latin and Greek letters; the marks of other scripts make other letters.
_MARKS = re.compile(rf"(?<=[a-zα-ω])[\u0300-\u036f]+|[{_POINTS}]")

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # it would write to stderr


class BadPattern(ValueError):
    """RE2 does not take a pattern; the message says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as it is served. `terms` and `exceptions` are folded words; there is a pattern where there are none."""

    name: str
    category: str
    roles: frozenset[Role]
    action: Action
    reply: Reply | None
    terms: tuple[tuple[str, ...], ...]
    pattern: str
    exceptions: tuple[tuple[str, ...], ...]


def words(text: str) -> tuple[str, ...]:
    """The words of a text, folded: compatibility forms, case and accents are told apart no more."""
    if text.isascii():
        return tuple(_ASCII_RUN.findall(text.lower()))
    folded = _folded(_composed(text)).replace("_", " ")
    return tuple(_RUN.findall(_ALONE.sub(r" \g<0> ", folded)))


def compile_pattern(pattern: str) -> "re2._Regexp[str]":
    """Raises BadPattern also for a pattern that the empty text matches, as then every text does."""
    try:
        compiled = re2.compile(pattern, options=_OPTIONS)
    except re2.error as error:
        (reason,) = error.args
        raise BadPattern(reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)) from None
    if compiled.search(""):
        raise BadPattern("it matches the empty text, and so every text")
    return compiled


class Matcher:
    """All rules of a policy at once: each word of a text is looked up once, however many terms there are."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        rules = tuple(rules)
        self._terms = _Phrases({rule.name: rule.terms for rule in rules if rule.terms})
        self._patterns = {rule.name: compile_pattern(rule.pattern) for rule in rules if rule.pattern}
        self._exceptions = {rule.name: _Phrases({rule.name: rule.exceptions}) for rule in rules if rule.exceptions}

    def hits(self, texts: Iterable[str]) -> frozenset[str]:
        """The names of the rules that match any of some views of one text, whatever their roles."""
        return frozenset(name for text in texts for name in (*self._by_terms(text), *self._by_patterns(text)))

    def _by_terms(self, text: str) -> Iterator[str]:
        said = words(text) if self._terms else ()
        for name, start, end in self._terms.found(said):
            exceptions = self._exceptions.get(name)
            if exceptions is None or not _within(start, end, exceptions.found(said)):
                yield name

    def _by_patterns(self, text: str) -> Iterator[str]:
        text = _composed(text) if self._patterns else ""
        for name, pattern in self._patterns.items():
            exceptions = self._exceptions.get(name)
            if exceptions is None:
                matches = pattern.search(text) is not None
            else:
                matches = any(not exceptions.cover(text, *match.span()) for match in pattern.finditer(text))
            if matches:
                yield name


class _Phrases:
    """Phrases by their first word, each with the name that it is found under."""

    def __init__(self, named: Mapping[str, Iterable[tuple[str, ...]]]) -> None:
        self._by_first: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for name, phrases in named.items():
            for phrase in phrases:
                self._by_first[phrase[0]].append((name, phrase))

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def found(self, said: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
        """(name, start, end) of every phrase in a text; places are words."""
        if self._by_first.keys().isdisjoint(said):  # as good as always, and found out in C
            return
        for start, word in enumerate(said):
            for name, phrase in self._by_first.get(word, ()):
                if said[start : start + len(phrase)] == phrase:
                    yield name, start, start + len(phrase)

    def cover(self, text: str, start: int, end: int) -> bool:
        """Whether a phrase stands around the characters from start to end of a composed text."""
        places = list(_WORD.finditer(text))
        found = self.found(tuple(_folded(place[0]) for place in places))
        return _within(start, end, ((name, places[i].start(), places[j - 1].end()) for name, i, j in found))


def _within(start: int, end: int, spans: Iterable[tuple[str, int, int]]) -> bool:
    return any(first <= start and end <= last for _, first, last in spans)


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFKD", text.casefold())))
