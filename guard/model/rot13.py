"""Undoes ROT13, which it knows by how often letters stand in a text."""

import re
from itertools import chain, groupby
from operator import itemgetter
from typing import Final, NamedTuple

_ROT13: Final = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "nopqrstuvwxyzabcdefghijklmNOPQRSTUVWXYZABCDEFGHIJKLM"
)
_WORD: Final = re.compile(r"\w+")
_TELLING: Final = re.compile("[A-Za-zÀ-ɏ][a-zÀ-ɏ]+|[A-ZÀ-ɏ]{2,}")  # is no name in code, number or symbol
# How many times as often letters a to m stand in texts as the letters n to z that ROT13 makes of them: means of six
# languages, English to Portuguese. As all likelihoods here, ten times the natural logarithm.
_OFTENER: Final = (4, -17, 5, 19, 7, -17, -12, -4, 16, -5, 8, 20, 16)
_TURNED: Final = {
    letter: sign * oftener
    for half, sign in (("abcdefghijklm", -1), ("nopqrstuvwxyz", 1))
    for letter, oftener in zip(half, _OFTENER, strict=True)
}
_ASCII: Final = _TURNED.keys()
# None of them is turned into a word of some other language, as `in` is into `va`.
_WORDS: Final = (
    "the and to of for is it that this you your me my how what why who can do make give with from are have not "
    "der die und nicht ist ich ein mit auf les des pas est que pour vous para como por con una los che per del com uma"
)
_COMMON: Final = _WORDS.split()
_BEYOND: Final = 30  # what a common word tells beyond its letters
_KNOWN: Final = dict.fromkeys(_COMMON, -_BEYOND) | {word.translate(_ROT13): _BEYOND for word in _COMMON}
_ALONG: Final = re.compile("[ ,'’-]+")  # what stands between the words of one and the same clause
_WITHIN: Final = 150  # how unlikely ROT13 begins or ends within a clause
_BETWEEN: Final = 60  # and between two
_CERTAIN: Final = 90  # of a run with a common word in it
_CERTAIN_BY_LETTERS: Final = 160


class _Word(NamedTuple):
    """A word, how many times as likely it is turned as not, and whether none before it has told that."""

    begin: int
    end: int
    evidence: int
    is_new: bool
    is_known: bool
    may_end_run: bool


def undo_rot13(text: str) -> str:
    """The text, with ROT13 undone in each run of words that is surely such.

    The runs are those of the likeliest path through a Markov model of two states (Viterbi 1967), less the clauses at
    their ends that do not speak for it.
    """
    if not _may_be_turned(text):
        return text
    words = _words(text)
    plain = turned = 0  # how likely the likeliest path to either state is
    switches = []  # whether that path comes from the other state
    clauses = []  # which each word is in
    last = clause = 0
    for word in words:
        along = _ALONG.fullmatch(text, last, word.begin) is not None
        clause += not along
        clauses.append(clause)
        cost = _WITHIN if along else _BETWEEN
        switches.append((turned - cost > plain, plain - cost > turned))
        plain, turned = max(plain, turned - cost), max(turned, plain - cost) + word.evidence
        last = word.end
    state = turned > plain
    path = []
    for place in reversed(range(len(words))):
        path.append((clauses[place], words[place], state))
        state ^= switches[place][state]
    parts = []
    done = 0
    for within, some in groupby(reversed(path), key=itemgetter(2)):
        if within and (run := _sure([(clause, word) for clause, word, _ in some])):
            parts += [text[done : run[0].begin], text[run[0].begin : run[-1].end].translate(_ROT13)]
            done = run[-1].end
    return "".join((*parts, text[done:]))


def _sure(run: list[tuple[int, _Word]]) -> list[_Word]:
    """The words of a run that are surely turned; none where that is not so."""
    clauses = [[word for _, word in some] for _, some in groupby(run, key=itemgetter(0))]
    speaking = [place for place, clause in enumerate(clauses) if sum(word.evidence for word in clause) > 0]
    if not speaking:
        return []
    words = list(chain.from_iterable(clauses[speaking[0] : speaking[-1] + 1]))
    ends = [place for place, word in enumerate(words) if word.may_end_run]
    words = words[ends[0] : ends[-1] + 1] if ends else []
    certain = _CERTAIN if any(word.is_known for word in words) else _CERTAIN_BY_LETTERS
    return words if sum(word.evidence for word in words if word.is_new) >= certain else []


def _may_be_turned(text: str) -> bool:
    """Whether words in a row come to what a run needs, whatever the path: a look that costs ordinary text little."""
    seen = set[str]()
    total = 0
    for word in _WORD.findall(text):
        small = word.lower()
        if small not in seen:
            seen |= {small, small.translate(_ROT13)}
            total = max(total, 0) + sum(_evidence(word, small))
            if total >= _CERTAIN:
                return True
    return False


def _words(text: str) -> list[_Word]:
    seen = set[str]()
    found = []
    for match in _WORD.finditer(text):
        word = match[0]
        small = word.lower()
        letters, known = _evidence(word, small)
        is_new = small not in seen
        if is_new:
            seen |= {small, small.translate(_ROT13)}
        may_end_run = len(word) == 1 or _TELLING.fullmatch(word) is not None
        found.append(_Word(*match.span(), letters + known, is_new, known > 0, may_end_run))
    return found


def _evidence(word: str, small: str) -> tuple[int, int]:
    """Of its letters, and of its being a common word."""
    if not _TELLING.fullmatch(word):
        return 0, 0
    known = _KNOWN.get(small, 0)
    return sum(map(_TURNED.__getitem__, set(small) & _ASCII)) if known or len(word) > 2 else 0, known
