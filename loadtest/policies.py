"""How long policies take to load, and to load again: a directory of generated ones, `python -m loadtest.policies`."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guard.policy.store import PolicyStore
from guard.types import HAZARDS


def policy(categories: int) -> str:
    """A policy file; each category is fed by two hazards, and judges users and agents."""
    codes = list(HAZARDS)
    lines = ["description: One of many.", "categories:"]
    for number in range(categories):
        fed = f"[{codes[number % 20]}, {codes[(number + 1 + number // 20) % 20]}]"
        flag, block = 0.3 + number % 40 / 100, 0.75 + number % 20 / 100
        lines += [
            f"  category-{number}:",
            f"    title: Category {number}",
            f"    hazards: {fed}",
            "    thresholds:",
            *(f"      {role}: {{flag: {flag:.2f}, block: {block:.2f}}}" for role in ("user", "agent")),
        ]
    return "\n".join(lines) + "\n"


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(f"{what:<24} {time.perf_counter() - wall:8.3f} s, {time.process_time() - cpu:8.3f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--categories", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for number in range(arguments.policies):
            path = directory / (f"policy-{number}.yaml" if number else "default.yaml")
            path.write_text(policy(arguments.categories))
        with timed("all"):
            store = PolicyStore.load(directory)
        with timed("nothing changed"):
            PolicyStore.load(directory, earlier=store)
        path.write_text(path.read_text().replace("One of many", "Another one"))
        with timed("one changed"):
            changed = PolicyStore.load(directory, earlier=store)
        assert changed.policies != store.policies


if __name__ == "__main__":
    main()
