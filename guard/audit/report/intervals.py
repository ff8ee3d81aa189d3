"""Shares, and how far from them the truth may be."""

import math
from dataclasses import dataclass

_Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True, slots=True)
class Share:
    """So many `of` so many, with the 95 % interval of Wilson from `low` to `high`; None of nothing."""

    count: int
    of: int
    share: float | None
    low: float | None
    high: float | None

    @classmethod
    def make(cls, count: int, of: int) -> "Share":
        low, high = wilson(count, of) if of else (None, None)
        return cls(count, of, count / of if of else None, low, high)


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, which takes the cases as independent; `of` is 1 or more."""
    share = count / of
    scale = 1 + _Z**2 / of
    middle = (share + _Z**2 / (2 * of)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    return (0.0 if count == 0 else middle - half), (1.0 if count == of else middle + half)
