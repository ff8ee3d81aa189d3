"""The work that everything here is measured on: texts of log-normal length, the same ones every time."""

import math
import random
from pathlib import Path

from tokenizers import Tokenizer

MEDIAN, P95, LONGEST = 60, 400, 1024  # tokens of a request, its role markers included
_SIGMA = math.log(P95 / MEDIAN) / 1.645  # of the normal distribution's logarithm; 1.645 is its 95th percentile
_TEMPLATE = 5  # tokens that the rendering adds to a text


def texts(count: int, tokenizer_json: Path, seed: int = 0) -> list[str]:
    """Texts of random common words, each word one token."""
    chooser = random.Random(seed)
    words = _words(tokenizer_json)
    lengths = (chooser.lognormvariate(math.log(MEDIAN), _SIGMA) for _ in range(count))
    return [text_of(min(LONGEST, max(8, round(length))), words, chooser) for length in lengths]


def text_of(tokens: int, words: list[str], chooser: random.Random) -> str:
    """A text that is `tokens` tokens long once it is rendered."""
    return "".join(chooser.choices(words, k=tokens - _TEMPLATE))


def texts_of(tokens: int, count: int, tokenizer_json: Path, seed: int = 1) -> list[str]:
    """Texts of one length."""
    chooser = random.Random(seed)
    words = _words(tokenizer_json)
    return [text_of(tokens, words, chooser) for _ in range(count)]


def _words(tokenizer_json: Path) -> list[str]:
    vocabulary = Tokenizer.from_file(str(tokenizer_json)).get_vocab()
    marked = (token for token, number in sorted(vocabulary.items(), key=lambda item: item[1]) if number < 20_000)
    return [
        f" {token[1:]}" for token in marked if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha()
    ]
