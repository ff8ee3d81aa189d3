"""What a report is made of: sections of words, tables and charts, in no form yet; and the same in Markdown."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guard.audit.report.intervals import Share

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[import-untyped]

_LONGEST = 80  # characters of a name
_LONGEST_QUOTE = 300
_JOINERS = {"\u200c", "\u200d"}  # which some scripts cannot be read without
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|#~])")


@dataclass(frozen=True, slots=True)
class Heat:
    """A number in a table whose cells are shaded, from 0 to 1."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Quote:
    """What may be longer than a name."""

    text: str


Value = str | int | float | Share | Heat | Quote | None


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph; one that `warns` says what limits what the report tells."""

    text: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`is_folded` where it is long and few will read it; the rows of one `as_cards` need a line of their own each."""

    header: tuple[str, ...]
    rows: Sequence[tuple[Value, ...]]
    title: str = ""
    is_folded: bool = False
    as_cards: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure, or several of which the reader picks one by its name; tables beside it say the same."""

    title: str
    figures: "Mapping[str, Figure]"
    pick: str = ""


Block = Words | Table | Chart


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """`tiles` are the few numbers to see first, with what they are."""

    title: str
    subtitle: str
    lead: tuple[Words, ...]
    tiles: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def plain(text: str, longest: int = _LONGEST) -> str:
    """Foreign text, short and clean."""
    return clean(text if len(text) <= longest else text[:longest] + "…")


def clean(text: str) -> str:
    """On one line, without what would turn or hide the text beside it."""
    return " ".join("".join(c if c.isprintable() or c in _JOINERS else " " for c in text).split())


def percent(share: Share, *, interval: bool = True) -> str:
    """With as many decimals as its interval makes sense of, e.g. 2.10 % (1.95–2.26 %)."""
    if share.share is None or share.low is None or share.high is None:
        return "–"
    width = (share.high - share.low) * 100
    decimals = min(8, max(0, 1 - math.floor(math.log10(width)))) if width else 0
    low, middle, high = (
        f"{100 * value:.{decimals}f}" if value else "0" for value in (share.low, share.share, share.high)
    )
    return f"{middle} % ({low}–{high} %)" if interval else f"{middle} %"


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def show(value: Value) -> str:
    match value:
        case None:
            return ""
        case Share():
            return percent(value)
        case Heat():
            return value.text
        case Quote():
            return plain(value.text, _LONGEST_QUOTE)
        case str():
            return plain(value)
        case _:
            return number(value)


def is_number(value: Value) -> bool:
    return isinstance(value, int | float | Share | Heat)


def markdown(report: Report) -> str:
    """For tickets and pull requests; without the charts, whose tables say the same."""
    lines = [f"# {_escaped(report.title)}", _escaped(report.subtitle), *map(_words, report.lead)]
    for section in report.sections:
        lines.append(f"## {_escaped(section.title)}")
        for block in section.blocks:
            lines += _block(block)
    return "\n\n".join(lines) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Words():
            yield _words(block)
        case Table(is_folded=True):
            yield f"<details><summary>{_escaped(block.title)}</summary>\n\n{_table(block)}\n\n</details>"
        case Table():
            if block.title:
                yield f"### {_escaped(block.title)}"
            yield _table(block)
        case Chart():
            pass


def _words(words: Words) -> str:
    return f"**Note:** {_escaped(words.text)}" if words.warns else _escaped(words.text)


def _table(table: Table) -> str:
    first = table.rows[0] if table.rows else ()
    rule = ["---:" if is_number(value) else "---" for value in first] or ["---"] * len(table.header)
    rows = ([_escaped(show(value)) for value in row] for row in table.rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (map(_escaped, table.header), rule, *rows))


def _escaped(text: str) -> str:
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)
