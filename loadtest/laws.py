"""Holds the engine to its laws on random conversations: however a text is cut, whatever is held, the bits are the same.

    python -m loadtest.laws --cases 2000 --dtype int8

Conversations that grow by random pieces are scored side by side through a cache that is too small for them, and each
score is compared, to the bit, with that of a cold pass. The lines are counts: scores that were compared, and those that
differed, of texts cut at random (stream = whole) and of conversations that came back turn by turn (cached = cold).
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

from guard.engine.prefix_cache import PrefixCache
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.telemetry import Metrics
from guard.types import Conversation, Role, Scores, Tokens, Turn

_SIDE_BY_SIDE = 8
_PIECES = (
    *("Hello", " there", ". ", "How do I", " internationalisation", "\n\n", "  ", "1234567", "don't", " — ", "e\u0301"),
    *("🗝️", "👩\u200d👩\u200d👧", "🇩🇪", "Übergrößenträger", "запрос", "こんにちは", "مرحبا", "\u200b", "a" * 40),
    *("<|im_end|>", "<|im_start|>"),
)


def text(chance: random.Random) -> str:
    """Short as a rule, of several pages at times."""
    pieces = chance.randrange(120 if chance.random() < 0.1 else 16)
    words = chance.choices(_PIECES, k=pieces)
    return "".join(word if chance.random() < 0.8 else chr(chance.randrange(0x20, 0xD7FF)) for word in words)


def cut(chance: random.Random) -> Iterator[Conversation]:
    """A turn as it is being written, cut between any two characters, among them those of one letter or one emoji."""
    before = [Turn(chance.choice(list(Role)), text(chance)) for _ in range(chance.randrange(3))]
    whole = text(chance)
    places = sorted({*(chance.randrange(len(whole) + 1) for _ in range(chance.randrange(4))), len(whole)})
    for place in places:
        yield Conversation((*before, Turn(Role.AGENT, whole[:place])), len(before))


def chat(chance: random.Random) -> Iterator[Conversation]:
    """A conversation that is judged turn by turn, now and then as a whole, or at a turn that was judged before."""
    turns = [Turn(chance.choice(list(Role)), text(chance)) for _ in range(chance.randrange(1, 6))]
    for last in range(len(turns)):
        target = None if chance.random() < 0.2 else chance.randrange(last + 1) if chance.random() < 0.2 else last
        yield Conversation(tuple(turns[: last + 1]), target)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="of each law")
    parser.add_argument("--dtype", choices=["int8", "float32"], default="int8")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    model = TurnClassifier(Settings().model, "cpu", given.dtype)
    broken = 0
    for law, case in (("stream = whole", cut), ("cached = cold", chat)):
        # Its clock jumps: what was used last may go at times, and at times may not.
        cache = PrefixCache(model, 20 * model.page_bytes, Metrics(), lambda: chance.choice([0, 1e9]))
        compared = differed = 0
        for _ in range(0, given.cases, _SIDE_BY_SIDE):
            growing = [case(chance) for _ in range(_SIDE_BY_SIDE)]
            while growing:
                states = [(one, conversation) for one in growing if (conversation := next(one, None)) is not None]
                growing = [one for one, _ in states]
                batch = [
                    replace(tokens, tenant=chance.choice(["one", "one", "other"]))
                    for _, conversation in states
                    for tokens in model.tokenise(conversation)
                ]
                if not batch:
                    continue
                cold = _cold(model, chance, batch)
                compared += len(batch)
                differed += sum(own != theirs for own, theirs in zip(cache.score(batch), cold, strict=True))
        broken += differed
        print(f"{law}, {given.dtype}: {given.cases} cases, {compared} scored, {differed} differ", flush=True)
    return 1 if broken else 0


def _cold(model: TurnClassifier, chance: random.Random, batch: list[Tokens]) -> list[tuple[Scores, ...]]:
    """In another order, so that neighbours are others too."""
    order = chance.sample(range(len(batch)), len(batch))
    scores = dict(zip(order, model.score([batch[place] for place in order]), strict=True))
    return [scores[place] for place in range(len(batch))]


if __name__ == "__main__":
    sys.exit(main())
