"""What a verdict costs under a large policy.

    python -m loadtest.policy

A policy of 50 categories, fed by one to three hazards each, and 500 terms in 10 rules; a turn of some 60 tokens.
"""

import random
import string
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from guard.policy.compile import Policy
from guard.policy.decide import decide
from guard.policy.store import load_policy
from guard.types import HAZARDS, Role, Scores

_CATEGORIES, _RULES, _TERMS = 50, 10, 50
_WORDS = 45  # of the turn
_ROUNDS, _CALLS = 20, 1000  # of each measurement


def main() -> None:
    chooser = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "large.yaml"
        path.write_text(_policy(chooser), encoding="utf-8")
        policy = load_policy(path)
    text = " ".join(_word(chooser) for _ in range(_WORDS)).capitalize()
    hit = f"{text} {' '.join(policy.rules[-1].terms[-1])}"
    scores = [_scores(chooser) for _ in range(_CALLS)]
    print(f"by a policy of {_CATEGORIES} categories and {_RULES * _TERMS} terms, per turn:")
    for what, judge in (
        ("rules, none matches", lambda _: policy.matcher.hits({text})),
        ("rules, one matches", lambda _: policy.matcher.hits({hit})),
        ("rules, in a text that is no ASCII", lambda _: policy.matcher.hits({f"{text}é"})),
        ("decision", lambda number: decide(policy, Role.USER, scores[number])),
        ("both", lambda number: _verdict(policy, text, scores[number])),
    ):
        print(f"  {what}: {_microseconds(judge):.1f} µs")


def _verdict(policy: Policy, text: str, scores: Scores) -> object:
    return decide(policy, Role.USER, scores, policy.matcher.hits({text}))


def _microseconds(judge: Callable[[int], object]) -> float:
    """Processor time of one call, in the best of some rounds: whatever else the machine does only adds to it."""
    rounds = []
    for _ in range(_ROUNDS):
        started = time.process_time()
        for number in range(_CALLS):
            judge(number)
        rounds.append(time.process_time() - started)
    return min(rounds) / _CALLS * 1e6


def _policy(chooser: random.Random) -> str:
    lines = ["description: For the benchmark.", "rules:"]
    for number in range(_RULES):
        terms = ", ".join(" ".join(_word(chooser) for _ in range(chooser.choice([1, 1, 2]))) for _ in range(_TERMS))
        lines += [f"  r{number}:", f"    terms: [{terms}]", "    roles: [user, agent]", "    action: block"]
    lines.append("categories:")
    for number in range(_CATEGORIES):
        hazards = ", ".join(chooser.sample(sorted(HAZARDS), chooser.randint(1, 3)))
        flag = chooser.uniform(0.1, 0.5)
        lines += [
            f"  c{number}:",
            f"    title: Category {number}",
            f"    hazards: [{hazards}]",
            "    thresholds:",
            f"      user: {{flag: {flag:.3f}, block: {flag + 0.3:.3f}}}",
            f"      agent: {{flag: {flag:.3f}, block: {flag + 0.2:.3f}}}",
        ]
    return "\n".join(lines) + "\n"


def _word(chooser: random.Random) -> str:
    return "".join(chooser.choices(string.ascii_lowercase, k=chooser.randint(4, 10)))


def _scores(chooser: random.Random) -> Scores:
    """Of a harmless turn or, one in twenty, a harmful one."""
    shape = (1.0, 1.5) if chooser.random() < 0.05 else (0.3, 20.0)
    unsafe, *hazards = array("f", [chooser.betavariate(*shape) for _ in range(len(HAZARDS) + 1)])
    return Scores(unsafe, dict(zip(HAZARDS, hazards, strict=True)))


if __name__ == "__main__":
    main()
