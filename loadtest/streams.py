"""What judging costs while a text grows: against one pass over the whole, and against reading all of it each time.

    python -m loadtest.streams

An answer that is judged every 16 tokens, alone and 32 side by side, and a chat of 20 turns that is judged turn by turn.
Times are those that the processor spent in the engine's thread, which others on the machine change least; the model
runs on one thread. Reading all of it each time is measured at every eighth point, and counted eight times.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from guard.engine.prefix_cache import PrefixCache
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.telemetry import Metrics
from guard.types import Conversation, Role, Scores, Tokens, Turn

_EVERY = 16
_SAMPLE = 8
_TEXT = (
    "the of to and a in is it you that he was for on are with as his they be at one have this from or had by not but "
    "what all were when we there can an your which their said if do will each about how up out them then she many some"
)
_WORDS = tuple(_TEXT.split())

Score = Callable[[Sequence[Tokens]], object]


def growing(model: TurnClassifier, tokens: int, seed: int) -> list[Tokens]:
    """The states of an answer at every point where it is judged; a word is a token."""
    chance = random.Random(seed)
    words = chance.choices(_WORDS, k=tokens)
    asked = Turn(Role.USER, " ".join(chance.choices(_WORDS, k=20)))
    states = []
    for end in range(_EVERY, tokens + 1, _EVERY):
        (state,) = model.tokenise(Conversation((asked, Turn(Role.AGENT, " ".join(words[:end]))), 1))
        states.append(replace(state, tenant="someone"))
    return states


def chat(model: TurnClassifier, turns: int) -> list[Tokens]:
    """The states of a conversation, judged at each turn."""
    chance = random.Random(7)
    said = tuple(
        Turn((Role.USER, Role.AGENT)[place % 2], " ".join(chance.choices(_WORDS, k=chance.randrange(10, 90))))
        for place in range(turns)
    )
    states = (model.tokenise(Conversation(said[: last + 1], last))[0] for last in range(turns))
    return [replace(state, tenant="someone") for state in states]


def spent(score: Score, batches: Sequence[Sequence[Tokens]]) -> list[float]:
    """Seconds of each pass."""
    times = []
    for batch in batches:
        started = time.thread_time()
        score(batch)
        times.append(time.thread_time() - started)
    return times


def cached(model: TurnClassifier, batches: Sequence[Sequence[Tokens]], mebibytes: int) -> list[float]:
    cache = PrefixCache(model, mebibytes * 2**20, Metrics())

    def score(batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        return cache.score(batch)

    return spent(score, batches)


def tell(name: str, steps: list[float], whole: float, again: float | None, tokens: int) -> None:
    steps = sorted(steps)
    total, p50, p95 = sum(steps), steps[len(steps) // 2], steps[int(len(steps) * 0.95)]
    against = f"{again / total:.1f} times less than reading all each time" if again else ""
    print(
        f"{name}: {len(steps)} steps of p50 {p50 * 1000:.1f} / p95 {p95 * 1000:.1f} ms, "
        f"{total / whole:.2f} times one pass over the whole ({tokens} tokens, {whole:.2f} s); {against}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of the answer")
    parser.add_argument("--side-by-side", type=int, default=32)
    given = parser.parse_args()
    model = TurnClassifier(Settings().model, "cpu", "auto", threads=1)

    def again(states: Sequence[Tokens]) -> float:
        return sum(spent(model.score, [[state] for state in states[_SAMPLE - 1 :: _SAMPLE]])) * _SAMPLE

    turns = chat(model, 20)
    model.score([turns[-1]])
    whole = median(spent(model.score, [[turns[-1]]] * 3))
    stateless = sum(spent(model.score, [[state] for state in turns]))
    tell("a chat of 20 turns", cached(model, [[state] for state in turns], 256), whole, stateless, len(turns[-1].ids))

    states = growing(model, given.tokens, 0)
    whole = median(spent(model.score, [[states[-1]]] * 3))
    alone = [[state] for state in states]
    tell("one answer", cached(model, alone, 256), whole, again(states), len(states[-1].ids))

    many = [growing(model, given.tokens // 4, seed) for seed in range(given.side_by_side)]
    whole = sum(spent(model.score, [[each[-1]] for each in many]))
    abreast = list(zip(*many, strict=True))
    total = sum(len(each[-1].ids) for each in many)
    name = f"{given.side_by_side} answers side by side"
    tell(name, cached(model, abreast, 1024), whole, again(many[0]) * len(many), total)


if __name__ == "__main__":
    main()
