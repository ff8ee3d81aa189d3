"""What an audit found, in numbers: what summary.json holds, and what the report tells."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guard.audit.report import cases, flips, rates
from guard.audit.report.cases import Case, Histogram
from guard.audit.report.finished import Finished
from guard.audit.report.flips import Flips
from guard.audit.report.intervals import Share
from guard.audit.report.rates import Cell, Found, Rate, Reason, Turns

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Totals:
    """`seconds` are those in which parts were made. `incomplete` inputs could not be read to their end."""

    conversations: int
    conversations_not_allowed: Share
    rejected: int
    incomplete: int
    tokens: int
    seconds: float
    turns_per_second: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The audit, as far as it is, and what it found.

    `is_complete` says whether all inputs are read. `in_force` are the facts of audit.json that a report tells. Rates
    are of turns that were not allowed; those of a policy in shadow are counted by what it would have done.
    """

    format: int
    is_complete: bool
    has_text: bool
    in_force: Mapping[str, Any]
    totals: Totals
    turns: Turns
    by_category: tuple[Found, ...]
    by_rule: tuple[Found, ...]
    by_role: tuple[Rate, ...]
    by_policy: tuple[Rate, ...]
    by_day: tuple[Rate, ...]
    by_language: tuple[Rate, ...]
    by_source: tuple[Rate, ...]
    category_by_role: tuple[Cell, ...]
    category_by_day: tuple[Cell, ...]
    histograms: tuple[Histogram, ...]
    most_certain: tuple[Case, ...]
    most_doubtful: tuple[Case, ...]
    flips: Flips | None
    rejected: tuple[Reason, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(folder: Path, *, text: bool = False) -> Summary:
    """What the audit in that folder found; with beginnings of texts only where they are asked for and kept.

    Raises ConfigError where there is no audit, or its parts cannot be read.
    """
    finished = Finished.read(folder)
    has_text = text and finished.holds_text
    with finished.open() as database:
        turns = rates.turns(database)
        rates.find(database)
        by_role = rates.by(database, "role")
        spoken = {rate.name or "": rate.share.of for rate in by_role}
        certain, doubtful = cases.cases(database, finished, has_text)
        return Summary(
            format=FORMAT,
            is_complete=finished.is_complete,
            has_text=has_text,
            in_force=_in_force(finished.facts),
            totals=_totals(finished, turns.turns, rates.conversations(database)),
            turns=turns,
            by_category=rates.by_category(database, turns.turns),
            by_rule=rates.by_rule(database, turns.turns),
            by_role=by_role,
            by_policy=rates.by(database, "policy.name"),
            by_day=rates.by_day(database),
            by_language=rates.by(database, "language"),
            by_source=rates.by(database, "source"),
            category_by_role=rates.category_by_role(database, spoken),
            category_by_day=rates.category_by_day(database),
            histograms=cases.histograms(database, finished.policies),
            most_certain=certain,
            most_doubtful=doubtful,
            flips=flips.flips(database, spoken) if finished.facts.get("compare") else None,
            rejected=rates.rejected(database, finished),
        )


def _totals(finished: Finished, turns: int, conversations_not_allowed: int) -> Totals:
    conversations = int(finished.total("conversations"))
    seconds = round(finished.total("seconds"), 3)
    return Totals(
        conversations=conversations,
        conversations_not_allowed=Share.make(conversations_not_allowed, max(conversations, conversations_not_allowed)),
        rejected=int(finished.total("rejected")),
        incomplete=int(finished.total("incomplete")),
        tokens=int(finished.total("tokens")),
        seconds=seconds,
        turns_per_second=round(turns / seconds, 1) if seconds else None,
    )


def _in_force(facts: Mapping[str, Any]) -> dict[str, Any]:
    """All but the format; of inputs and policies whatever is known."""
    return {name: value for name, value in facts.items() if name != "format"}
