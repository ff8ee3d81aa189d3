"""The report of an audit: report.html to look at, report.md for tickets, and summary.json for programs."""

import json
from collections.abc import Iterator
from pathlib import Path

from guard.audit.report.blocks import Report, Words, markdown, number, percent, plain
from guard.audit.report.sections import sections
from guard.audit.report.summary import Summary, summarise
from guard.errors import ConfigError

_MOST_OFTEN = 3  # categories that the first sentences name
_CHANCE = (
    "In brackets are 95 % confidence intervals: how far a share could be off by chance alone, were these turns a "
    "sample of many more. They take turns as independent of each other; those of one conversation are not quite, so "
    "that the truth may be somewhat further off. They do not tell how often the model itself is wrong."
)


def write_report(out: Path, *, text: bool = False) -> Summary:
    """Writes the report of the audit in that folder, finished or not, and returns its numbers.

    `text` is whether beginnings of texts stand beside the cases, where the audit kept them. Raises ConfigError where
    there is no audit, or a file cannot be read or written.
    """
    from guard.audit.report.page import page

    summary = summarise(out, text=text)
    report = _report(summary, text)
    files = {
        "summary.json": json.dumps(summary.as_json(), indent=1) + "\n",
        "report.md": markdown(report),
        "report.html": page(report),
    }
    try:
        for name, content in files.items():
            _write(out / name, content)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    return summary


def _write(path: Path, content: str) -> None:
    """Whoever reads it meanwhile finds the old one whole."""
    aside = path.with_name(f".{path.name}")
    # Ids may hold what is half a character.
    aside.write_text(content, encoding="utf-8", errors="replace")
    aside.replace(path)


def _report(summary: Summary, text: bool) -> Report:
    facts, turns, totals = summary.in_force, summary.turns, summary.totals
    tiles = [
        (number(totals.conversations), "conversations"),
        (number(turns.turns), "turns"),
        (percent(turns.not_allowed, interval=False), "of turns not allowed"),
        (number(turns.actions["flag"]), "turns flagged"),
        *([(number(turns.actions["redirect"]), "turns redirected")] if turns.actions["redirect"] else []),
        (number(turns.actions["block"]), "turns blocked"),
        (number(totals.rejected), "rows not judged"),
    ]
    if summary.flips:
        tiles.append((percent(summary.flips.verdicts, interval=False), f"of verdicts differ under {_compare(summary)}"))
    version = f"Guard {facts.get('version', '')}".strip()
    model = facts.get("model") or {}
    when = f", turns from {turns.first[:10]} to {turns.last[:10]} (UTC)" if turns.first and turns.last else ""
    return Report(
        title="Safety audit of conversations",
        subtitle=f"{version}, model {model.get('name', 'unknown')}, {_policies(summary)}{when}",
        lead=(*_lead(summary), *_notes(summary, text)),
        tiles=tuple(tiles),
        sections=tuple(sections(summary)),
    )


def _policies(summary: Summary) -> str:
    names = list(map(plain, summary.in_force.get("policies") or {}))
    return f"polic{'y' if len(names) == 1 else 'ies'} {', '.join(names)}"


def _compare(summary: Summary) -> str:
    return plain((summary.in_force.get("compare") or {}).get("name", "the other policy"))


def _lead(summary: Summary) -> list[Words]:
    """The audit in a few sentences."""
    if not summary.turns.turns:
        return [Words("No turn was judged, so there is nothing to tell but what was in force and what was rejected.")]
    return [Words(" ".join(_sentences(summary))), Words(_CHANCE)]


def _sentences(summary: Summary) -> Iterator[str]:
    turns, totals = summary.turns, summary.totals
    acted = {"flag": "flagged", "redirect": "redirected", "block": "blocked"}
    counts = [f"{turns.actions[action]:,} {done}" for action, done in acted.items() if turns.actions[action]]
    yield (
        f"Of {_counted(turns.turns, 'turn')} in {_counted(totals.conversations, 'conversation')}, "
        f"{percent(turns.not_allowed)} were not allowed{': ' if counts else ''}{_joined(counts)}."
    )
    yield f"Of the conversations, {percent(totals.conversations_not_allowed)} hold at least one such turn."
    if summary.by_category:
        most = [
            f"{plain(one.category or 'no category')} ({percent(one.share, interval=False)} of turns)"
            for one in summary.by_category[:_MOST_OFTEN]
        ]
        yield f"Found most often: {_joined(most)}."
    if flips := summary.flips:
        yield (
            f"The policy {_compare(summary)} would decide otherwise about {percent(flips.verdicts)} of the turns: more "
            f"strictly about {flips.stricter:,}, more mildly about {flips.milder:,}."
        )


def _notes(summary: Summary, text: bool) -> list[Words]:
    """What a reader must know before trusting the numbers."""
    turns, totals = summary.turns, summary.totals
    notes = (
        (
            not summary.is_complete,
            "The audit is not finished: this is what was judged so far. The same command goes on.",
        ),
        (totals.rejected, f"Rows that could not be judged and are not counted in any rate: {totals.rejected:,}."),
        (totals.incomplete, f"Inputs of which the rest could not be read and is missing here: {totals.incomplete:,}."),
        (turns.degraded, f"Turns about which the policy decided without the model’s answer: {turns.degraded:,}."),
        (turns.partly_seen, f"Turns too long for the model to be shown everything: {turns.partly_seen:,}."),
        (
            turns.shadow,
            f"Turns judged by a policy in shadow mode, which allows everything: {turns.shadow:,}. They are counted by "
            "what it would have done.",
        ),
        (
            text and not summary.has_text,
            "Texts were asked for, but the audit was run without --with-text and kept none.",
        ),
    )
    return [Words(note, warns=True) for holds, note in notes if holds]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _joined(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
