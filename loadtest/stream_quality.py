"""What a stream lets pass: where replies that were held out of training are cut, and how much of them is shown before.

    python -m loadtest.stream_quality --data DIRECTORY --recipe guard/model/default/recipe.yaml

Replies come character by character, and verdicts at once; the rest is as the service does it, by the default policy.
"""

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

from guard.engine.moderator import Moderator
from guard.policy.compile import Debounce
from guard.service.stream import Writing
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.training.data import load_examples, read_recipe
from guard.types import Action, Conversation, Role, Verdict
from guard.v1 import moderation_pb2 as pb

_MODES = {"hold": pb.STREAM_MODE_HOLD, "lag": pb.STREAM_MODE_LAG}
_SIDE_BY_SIDE = 16


@dataclass(frozen=True)
class Outcome:
    """Of one reply: whether it is unsafe by its label, and as a whole; and of its characters what share was shown."""

    unsafe: bool
    whole: bool
    cut_at: float | None
    shown: float


async def watch(
    moderator: Moderator, settings: Settings, mode: str, conversation: Conversation, unsafe: bool
) -> Outcome:
    *before, last = conversation.turns
    opened = pb.StreamOpen(mode=_MODES[mode])
    debounce: Debounce = moderator.policies.get("").stream
    writing = Writing(0, tuple(before), last.role)
    size = max(1, len(last.text))

    async def verdict(end: int) -> Verdict:
        return (await moderator.judge(writing.conversation(end), client=mode)).verdicts[0]

    whole = (await moderator.judge(conversation)).verdicts[0].action >= Action.REDIRECT
    for place, character in enumerate(last.text, 1):
        writing.add(character.encode(), 0.0)
        if place == len(last.text):
            writing.finish()
        writing.release(opened, 0.0)
        if writing.due(0.0, settings) == 0:
            is_cut = writing.take(await verdict(place), place, 0.0, debounce, writing.complete)
            if is_cut:
                return Outcome(unsafe, whole, place / size, writing.released / size)
            writing.release(opened, 0.0)
    return Outcome(unsafe, whole, None, writing.released / size)


async def run(moderator: Moderator, settings: Settings, given: argparse.Namespace) -> None:
    rows = load_examples(read_recipe(given.recipe), given.data, "validation")
    replies = [
        (row.conversation, row.unsafe)
        for row in rows
        if row.source in given.sources and row.conversation.turns[-1].role is Role.AGENT
    ]
    for mode in ("hold", "lag"):
        outcomes: list[Outcome] = []
        for start in range(0, len(replies), _SIDE_BY_SIDE):
            part = replies[start : start + _SIDE_BY_SIDE]
            outcomes += await asyncio.gather(*(watch(moderator, settings, mode, *one) for one in part))
        bad, good = [one for one in outcomes if one.unsafe], [one for one in outcomes if not one.unsafe]
        cut = [one for one in bad if one.cut_at is not None]
        early = [one for one in cut if one.cut_at is not None and one.cut_at <= 0.75]
        false = [one for one in good if one.cut_at is not None]
        shown = sum(one.shown for one in cut) / max(1, len(cut))
        print(
            f"{mode}: of {len(bad)} unsafe replies {len(cut)} are cut, {len(early)} of them before the last quarter "
            f"(as a whole: {sum(one.whole for one in bad)}); of what is cut {shown:.0%} was shown; "
            f"of {len(good)} safe ones {len(false)} are cut (as a whole: {sum(one.whole for one in good)})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Settings().model / "recipe.yaml")
    parser.add_argument("--sources", nargs="+", default=["authored_replies_en", "authored_context_en"])
    given = parser.parse_args()
    settings = Settings(threads=1, max_queue_seconds=3600)
    moderator = Moderator.load(settings, Telemetry.start("error"))
    try:
        asyncio.run(run(moderator, settings, given))
    finally:
        moderator.close()


if __name__ == "__main__":
    main()
