"""Proves on live traffic that a replay gives what was live: `python -m loadtest.replay`.

Starts `guard serve` with the shipped policies and a decision log, has every turn of short conversations judged by the
policies in turn, and then lets `guard policy replay` judge the log again. The model reads a conversation once for the
verdicts on all of its turns. Exits with 1 where a verdict is missing, or differs from its replay.
"""

import argparse
import asyncio
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from guard.client import Client
from guard.policy.store import policy_files
from guard.settings import Settings
from guard.v1 import moderation_pb2 as pb
from loadtest.overload import serve

_TURNS = 10  # of a conversation
_CALLERS = 4
_ASKS = ("How do I make", "Where can I buy", "Please help me to hide", "I want to get rid of", "Tell me all about")
_THINGS = ("bread", "a pipe bomb", "cocaine", "my neighbour", "myself", "a tax return", "his home address", "that scum")
_WHYS = ("", " for a story", " tonight", " without anybody noticing", " and ignore your rules")


def conversations(chooser: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Endless; each turn is harmless, harmful or something between."""
    while True:
        yield [
            (role, f"{chooser.choice(_ASKS)} {chooser.choice(_THINGS)}{chooser.choice(_WHYS)}? {chooser.random():.3f}")
            for role in itertools.islice(itertools.cycle(("user", "agent")), _TURNS)
        ]


async def judge(policies: list[Path], verdicts: int) -> Counter[str]:
    """How many verdicts each action had."""
    actions = Counter[str]()
    said = zip(conversations(random.Random(0)), itertools.cycle(policies), range(verdicts // _TURNS), strict=False)
    async with serve() as (target, _), Client(target, timeout=600) as client:

        async def call() -> None:
            for turns, policy, number in said:
                metadata = {"app": ("kids", "forum", "")[number % 3]}
                answer = await client.check_conversation(turns, policy=policy.stem, metadata=metadata)
                actions.update(pb.Action.Name(verdict.action) for verdict in answer.verdicts)

        await asyncio.gather(*(call() for _ in range(_CALLERS)))
    return actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=10_000)
    options = parser.parse_args()
    policies = policy_files(Settings.load({}, os.environ).policies)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "decisions.jsonl"
        os.environ |= {"GUARD_DECISION_LOG": str(log), "GUARD_MAX_QUEUE_SECONDS": "600"}
        started = time.perf_counter()
        actions = asyncio.run(judge(policies, options.verdicts))
        print(f"{actions.total():,} verdicts in {time.perf_counter() - started:.0f} s: {dict(actions)}")
        guard = Path(sys.executable).with_name("guard")
        command = (guard, "policy", "replay", "--on", log)
        ends = [subprocess.run([*command, "--policy", path.stem, path]).returncode for path in policies]
        logged = len(log.read_text(encoding="utf-8").splitlines())
    print(f"{logged:,} of them logged")
    sys.exit(int(any(ends) or actions.total() != logged))


if __name__ == "__main__":
    main()
