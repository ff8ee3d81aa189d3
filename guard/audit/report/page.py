"""A report as one HTML file that loads nothing: plain CSS, and plotly within."""

import html
import json
from collections.abc import Iterator
from typing import Any

from guard.audit.report.blocks import (
    Block,
    Chart,
    Heat,
    Report,
    Section,
    Table,
    Value,
    Words,
    clean,
    is_number,
    percent,
    show,
)
from guard.audit.report.intervals import Share
from guard.audit.report.style import SCRIPT, STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def page(report: Report) -> str:
    """Content-Security-Policy keeps a browser from loading anything, whatever stands in the file."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    charts: dict[str, Any] = {}
    body = "\n".join(_section(section, charts) for section in report.sections)
    links = "".join(f'<a href="#{section.name}">{_escaped(section.title)}</a>' for section in report.sections)
    tiles = "".join(
        f"<div class=tile><b>{_escaped(value)}</b><span>{_escaped(what)}</span></div>" for value, what in report.tiles
    )
    lead = "\n".join(map(_words, report.lead))
    title = _escaped(report.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<nav aria-label="Contents">{links}</nav>
<main>
<header>
<h1>{title}</h1>
<p class=subtitle>{_escaped(report.subtitle)}</p>
<div class=tiles>{tiles}</div>
{lead}
</header>
{body}
</main>
<script type="application/json" id="figures">{_as_json(charts)}</script>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(section: Section, charts: dict[str, Any]) -> str:
    blocks = "\n".join(_block(block, f"{section.name}-{place}", charts) for place, block in enumerate(section.blocks))
    return f'<section id="{section.name}">\n<h2>{_escaped(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block, name: str, charts: dict[str, Any]) -> str:
    match block:
        case Words():
            return _words(block)
        case Table():
            return _table(block)
        case Chart():
            charts[name] = [figure.to_plotly_json() for figure in block.figures.values()]
            return _chart(block, name)


def _words(words: Words) -> str:
    if words.warns:
        return f"<p class=note><strong>Note:</strong> {_escaped(words.text)}</p>"
    return f"<p>{_escaped(words.text)}</p>"


def _chart(chart: Chart, name: str) -> str:
    title = _escaped(chart.title)
    options = "".join(f"<option value={place}>{_escaped(label)}" for place, label in enumerate(chart.figures))
    picker = (
        f'<label class=picker>{_escaped(chart.pick)} <select data-of="{name}">{options}</select></label>'
        if chart.pick
        else ""
    )
    height = next(iter(chart.figures.values())).layout.height
    return (
        f"<figure><figcaption>{title}</figcaption>{picker}"
        f'<div class=chart id="{name}" role=img aria-label="{title}; the tables of this section say the same" '
        f'style="min-height:{height}px"></div></figure>'
    )


def _table(table: Table) -> str:
    widest = max((value.high or 0 for row in table.rows for value in row if isinstance(value, Share)), default=0) or 1
    first = table.rows[0] if table.rows else ()
    numeric = [is_number(value) for value in first] or [False] * len(table.header)
    head = "".join(
        f"<th scope=col{' class=number' * right}>{_escaped(name)}"
        for name, right in zip(table.header, numeric, strict=True)
    )
    rows = "\n".join(f"<tr>{''.join(_cells(table, row, widest))}" for row in table.rows)
    kind = " class=cards" if table.as_cards else ""
    grid = f"<div class=table tabindex=0><table{kind}><thead><tr>{head}<tbody>\n{rows}</table></div>"
    title = _escaped(table.title)
    if table.is_folded:
        return f"<details><summary>{title} <small>({len(table.rows):,})</small></summary>{grid}</details>"
    return f"<h3>{title}</h3>{grid}" if title else grid


def _cells(table: Table, row: tuple[Value, ...], widest: float) -> Iterator[str]:
    for place, (name, value) in enumerate(zip(table.header, row, strict=True)):
        tag = "th scope=row" if place == 0 else "td"
        label = f' data-label="{_escaped(name)}"' if table.as_cards else ""
        yield f"<{tag}{label}{_look(value)}>{_value(value, widest)}"


def _look(value: Value) -> str:
    match value:
        case Heat():
            return f' class="number heat" style="--heat:{100 * value.weight:.0f}%"'
        case Share():
            return ' class="number share"'
        case _:
            return " class=number" if is_number(value) else ""


def _value(value: Value, widest: float) -> str:
    if not isinstance(value, Share) or value.low is None or value.high is None or value.share is None:
        return f"<bdi>{_escaped(show(value))}</bdi>"
    shown, _, interval = percent(value).partition(" (")
    left, width, at = (100 * number / widest for number in (value.low, value.high - value.low, value.share))
    bar = f'<i style="left:{left:.2f}%;width:{width:.2f}%"></i><b style="width:{at:.2f}%"></b>'
    return f"<div>{shown} <small>({interval}</small><span class=bar aria-hidden=true>{bar}</span></div>"


def _escaped(text: str) -> str:
    return html.escape(clean(text))


def _as_json(charts: dict[str, Any]) -> str:
    """No text in it ends the element that it stands in."""
    from plotly.utils import PlotlyJSONEncoder  # type: ignore[import-untyped]

    return json.dumps(charts, cls=PlotlyJSONEncoder, separators=(",", ":")).replace("<", "\\u003c")
