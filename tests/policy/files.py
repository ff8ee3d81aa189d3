"""A policy that uses the whole language, and what tests of it share."""

from pathlib import Path

from guard.policy.calibration import Calibration, Effect
from guard.types import Role

WHOLE = """\
description: For tests, with everything in it.
include: [crisis_include.yaml]
mode: enforce
history: 2
on_error: {user: block}
replies:
  house-rules: Please keep to the rules of the house.
rules:
  secrets:
    terms: [Project Falcon, αβγ]
    except: [project falcon 9]
    roles: [agent]
    action: block
    category: leaks
  card-number:
    pattern: (?i)card\\s*\\d{4}
    roles: [user, agent]
    action: redirect
    reply: house-rules
categories:
  leaks:
    title: Leaks
    definition: What only we may know.
    score: weighted
    hazards: {S7: 0.75, S8: 0.5}
    thresholds:
      agent: {flag: 0.25, block: 0.5}
  hate:
    title: Hate
    score: any
    hazards: [S10, X1]
    thresholds:
      user: {flag: 0.5, redirect: {at: 0.75, reply: house-rules}, block: 0.9}
  crime:
    title: Crime
    hazards: [S1, S2]
    thresholds:
      user: {flag: {max_fpr: 0.03}, block: {max_fpr: 0.01}}
overlays:
  - when: {app: kids}
    thresholds:
      hate:
        user: {block: 0.1}
  - when: {app: kids, tenant: acme}
    thresholds:
      hate:
        user: {}
        tool: {flag: 0.5}
"""
CRISIS = """\
replies:
  crisis-line: You are not alone. Call 988.
categories:
  self-harm:
    title: Self-harm
    hazards: [S11]
    thresholds:
      user: {redirect: {at: {min_recall: 0.6}, reply: crisis-line}}
"""


def curve(*points: tuple[float, float, float]) -> list[tuple[float, Effect]]:
    """Of (threshold, false-positive rate, recall)."""
    return [
        (threshold, Effect(fpr, recall, (fpr / 2, fpr * 2), (recall / 2, recall))) for threshold, fpr, recall in points
    ]


CALIBRATION = Calibration(
    {
        Role.USER: {
            "S1": curve((0.1, 0.02, 0.9), (0.3, 0.01, 0.7), (0.6, 0.004, 0.2)),
            "S2": curve((0.2, 0.02, 0.8), (0.4, 0.005, 0.5)),
            "S11": curve((0.05, 0.02, 0.9), (0.25, 0.01, 0.7), (0.5, 0.0, 0.3)),
        }
    }
)


def write(directory: Path, whole: str = WHOLE, crisis: str = CRISIS) -> Path:
    """The files in a directory; the path of the policy."""
    (directory / "crisis_include.yaml").write_text(crisis)
    path = directory / "whole.yaml"
    path.write_text(whole)
    return path
