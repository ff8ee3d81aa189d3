"""Undoes ROT13, which it knows by how often letters stand in a text."""

import re
from itertools import groupby
from operator import itemgetter
from typing import Final

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
_WORDS: Final = (
    "the and to of for is it that this you your me my how what why who can do make give with from are have not"
)
_COMMON: Final = _WORDS.split()
_BEYOND: Final = 30  # what a common word tells beyond its letters
_KNOWN: Final = dict.fromkeys(_COMMON, -_BEYOND) | {word.translate(_ROT13): _BEYOND for word in _COMMON}
_ALONG: Final = re.compile("[ ,'’-]+")  # what stands between the words of one and the same clause
_WITHIN: Final = 150  # how unlikely ROT13 begins or ends within a clause
_BETWEEN: Final = 60  # and between two
_CERTAIN: Final = 90


def undo_rot13(text: str) -> str:
    """The text, with ROT13 undone in each run of words that is surely such; idempotent.

    The runs are those of the likeliest path through a Markov model of two states (Viterbi 1967). Nothing that comes out
    is such a run: a path through it that is worth anything would have made a likelier one before.
    """
    words = list(_WORD.finditer(text))
    evidence = _evidence([word[0] for word in words])
    plain = turned = 0  # how likely the likeliest path to either state is
    switches = []  # whether that path comes from the other state
    last = 0
    for word, own in zip(words, evidence, strict=True):
        cost = _WITHIN if _ALONG.fullmatch(text, last, word.start()) else _BETWEEN
        switches.append((turned - cost > plain, plain - cost > turned))
        plain, turned = max(plain, turned - cost), max(turned, plain - cost) + own
        last = word.end()
    state = turned > plain
    path = []
    for word, own, switch in zip(reversed(words), reversed(evidence), reversed(switches), strict=True):
        path.append((word, own, state))
        state ^= switch[state]
    parts = []
    done = 0
    for within, some in groupby(reversed(path), key=itemgetter(2)):
        run = list(some)
        if within and sum(own for _, own, _ in run) >= _CERTAIN:
            begin, end = run[0][0].start(), run[-1][0].end()
            parts += [text[done:begin], text[begin:end].translate(_ROT13)]
            done = end
    return "".join((*parts, text[done:]))


def _evidence(words: list[str]) -> list[int]:
    """Of each word how many times as likely it is turned as not; nothing of one that was there before."""
    seen = set[str]()
    found = []
    for word in words:
        small = word.lower()
        if small in seen or not _TELLING.fullmatch(word):
            found.append(0)
            continue
        found.append(sum(map(_TURNED.__getitem__, set(small) & _ASCII)) + _KNOWN.get(small, 0))
        seen |= {small, small.translate(_ROT13)}
    return found
