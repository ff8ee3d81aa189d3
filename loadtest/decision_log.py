"""Makes a decision log of as many verdicts as one likes, as the service would have written it, without a model.

    python -m loadtest.decision_log policies/default.yaml 1000000 > decisions.jsonl

Ten thousand verdicts of random scores are judged by the policy; the log repeats them under other ids.
"""

import itertools
import random
import sys
from array import array
from pathlib import Path

from guard.policy.calibration import Calibration
from guard.policy.compile import Policy
from guard.policy.decide import decide
from guard.policy.store import load_policy
from guard.service.decision_log import Entry, Salt
from guard.settings import Settings
from guard.types import HAZARDS, Coverage, Decision, Revision, Role, Scores, Timings, Turn, Verdict

_DIFFERENT = 10_000
_START = 1_767_225_600.0  # 2026-01-01, in Unix seconds
_ID = "f" * 32  # stands in a line where its own id comes to stand


def main(policy: Path, count: int) -> None:
    served = load_policy(policy, Calibration.read(Settings().model))
    chooser = random.Random(0)
    salt = Salt(b"loadtest")
    templates = [line for _ in range(_DIFFERENT) for line in _entry(served, chooser).lines(salt)]
    for number, line in enumerate(itertools.islice(itertools.cycle(templates), count)):
        sys.stdout.write(line.replace(_ID, f"{number:032x}", 1) + "\n")


def _entry(policy: Policy, chooser: random.Random) -> Entry:
    """Of one harmless or, one in twenty, harmful turn: scores are low or spread out; those of its own heads, too."""
    role = chooser.choice([Role.USER, Role.AGENT])
    shape = (1.0, 1.5) if chooser.random() < 0.05 else (0.3, 20.0)
    codes = dict.fromkeys([*HAZARDS, *(code for category in policy.categories for code in category.hazards)])
    unsafe, *hazards = array("f", [chooser.betavariate(*shape) for _ in range(len(codes) + 1)])
    judged = Scores(unsafe, dict(zip(codes, hazards, strict=True)))
    verdict = Verdict(0, *decide(policy, role, judged), judged, Coverage(60, 60))
    revision = Revision(policy.name, policy.revision)
    timings = Timings(*(chooser.uniform(0.001, 0.05) for _ in range(3)))
    decision = Decision(_ID, (verdict,), revision, Revision("none", "0" * 16), timings)
    return Entry(_START + chooser.uniform(0, 86400), decision, (Turn(role, "x" * 200),), "conversation", {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
