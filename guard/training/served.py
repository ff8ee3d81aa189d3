"""Scores by the engine that serves, so that what is measured is what users get."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from guard.engine.moderator import Moderator
from guard.errors import ModelFailed
from guard.policy.compile import Policy
from guard.policy.store import PolicyStore
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.training.data import Example
from guard.training.evaluate import Floats
from guard.types import HAZARDS, Lane, ModelInfo, Scores

_AT_ONCE = 512  # rows; enough to fill batches


def served(
    settings: Settings, examples: Sequence[Example], scored: Callable[[], None] = lambda: None
) -> tuple[ModelInfo, Floats]:
    """The model of the settings, and its probabilities [rows, 1 + hazards]; `scored` is called for each row.

    Not a number stands where the model does not score a hazard. Raises ConfigError where the model or the policies
    cannot be used, and ModelFailed.
    """
    info, rows = _scored(Moderator.load(settings, Telemetry.start("warning")), examples, scored)
    return info, np.array([[own.unsafe, *(own.hazards.get(code, np.nan) for code in HAZARDS)] for own in rows])


def served_under(
    policy: Policy, settings: Settings, examples: Sequence[Example], scored: Callable[[], None] = lambda: None
) -> list[Scores]:
    """The scores of each row as one policy asks for them; otherwise as `served`."""
    policies = PolicyStore([policy], policy.name)
    return _scored(Moderator.load(settings, Telemetry.start("warning"), policies), examples, scored)[1]


def _scored(
    moderator: Moderator, examples: Sequence[Example], scored: Callable[[], None]
) -> tuple[ModelInfo, list[Scores]]:
    try:
        return moderator.model, asyncio.run(_score(moderator, examples, scored))
    finally:
        moderator.close()


async def _score(moderator: Moderator, examples: Sequence[Example], scored: Callable[[], None]) -> list[Scores]:
    async def row(example: Example) -> Scores:
        decision = await moderator.judge(example.conversation, lane=Lane.BULK)
        scores = decision.verdicts[-1].scores
        if scores is None:
            raise ModelFailed(f"the model could not answer for row {example.id}")
        scored()
        return scores

    rows: list[Scores] = []
    for start in range(0, len(examples), _AT_ONCE):
        rows += await asyncio.gather(*map(row, examples[start : start + _AT_ONCE]))
    return rows
