"""The charts of a report. Their colours are names of its style sheet, so that they go with the page."""

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from guard.audit.report.blocks import plain
from guard.audit.report.cases import BINS, Histogram
from guard.audit.report.finished import LEVELS
from guard.audit.report.flips import Flip
from guard.audit.report.rates import Cell, Found, Rate

_PATTERNS = {"flag": "", "redirect": "x", "block": "/"}  # for those who do not tell the colours apart
_SERIES = 6  # categories of their own in a chart over time, and one for the others
_SERIES_PATTERNS = ("", "/", "x", ".", "\\", "-", "+")
_LABEL = 24  # characters of a name at an axis
_ROW = 26  # pixels of a bar
_PANEL = 190  # pixels of a histogram
_RIGHT = 0.7  # thresholds above it have their label on their left
_DASHES = {"flag": "dot", "redirect": "dashdot", "block": "dash"}
_AXIS: dict[str, Any] = {
    "gridcolor": "var(--line)",
    "zeroline": False,
    "automargin": True,
    "fixedrange": True,
    "ticklabelstandoff": 4,
}


def categories(found: Sequence[Found]) -> go.Figure:
    """How many turns have a violation of each category, by the strictest action."""
    names = _labels([one.category for one in found])
    bars = [
        go.Bar(
            y=names,
            x=[getattr(one, action) for one in found],
            name=action,
            orientation="h",
            marker=_marker(f"var(--{action})", _PATTERNS[action]),
            hovertemplate=f"%{{y}}: %{{x:,}} turns<extra>{action}</extra>",
        )
        for action in LEVELS[1:]
        if any(getattr(one, action) for one in found)
    ]
    figure = _figure(bars, _ROW * len(names) + 110, barmode="stack")
    figure.update_yaxes(autorange="reversed", type="category", dtick=1)
    figure.update_xaxes(title="turns", tickformat=",")
    return figure


def shares(rates: Sequence[Rate]) -> go.Figure:
    """The share of each day that was not allowed, within its interval."""
    days = [rate.name or "" for rate in rates]
    low, share, high = (
        [getattr(rate.share, of) * 100 for rate in rates if rate.share.of] for of in ("low", "share", "high")
    )
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    figure = _figure(
        [
            go.Scatter(x=days, y=low, **edge),
            go.Scatter(
                x=days,
                y=high,
                **{**edge, "showlegend": True},
                fill="tonexty",
                fillcolor="var(--band)",
                name="95 % interval",
            ),
            go.Scatter(
                x=days,
                y=share,
                name="not allowed",
                mode="lines+markers",
                line={"color": "var(--accent)", "width": 2},
                hovertemplate="%{x|%d %b %Y}: %{y:.2f} %<extra></extra>",
            ),
        ],
        300,
    )
    figure.update_yaxes(title="% of the day’s turns", rangemode="tozero")
    return _dated(figure, days)


def category_days(cells: Sequence[Cell], days: Sequence[str]) -> go.Figure:
    """The most frequent categories over the days, the others together."""
    turns: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for cell in cells:
        turns[cell.category][cell.of] = cell.turns
    ordered = sorted(turns, key=lambda category: (-sum(turns[category].values()), category))
    series = list(zip(_labels(ordered[:_SERIES]), map(turns.__getitem__, ordered), strict=False))
    if others := ordered[_SERIES:]:
        together = {day: sum(turns[each].get(day, 0) for each in others) for day in days}
        series.append((f"{len(others)} other{'s' * (len(others) > 1)}", together))
    bars = [
        go.Bar(
            x=list(days),
            y=[by_day.get(day, 0) for day in days],
            name=name,
            marker=_marker(f"var(--series{chr(97 + place)})", _SERIES_PATTERNS[place]),
            hovertemplate="%{x|%d %b %Y}: %{y:,} turns<extra>%{fullData.name}</extra>",
        )
        for place, (name, by_day) in enumerate(series)
    ]
    figure = _figure(bars, 400, barmode="stack")
    figure.update_yaxes(title="turns", tickformat=",")
    return _dated(figure, days)


def scores(histograms: Sequence[Histogram]) -> go.Figure:
    """The scores of one category: a panel for each role, with the thresholds as lines."""
    axes: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    height = 1 / len(histograms)
    for place, one in enumerate(histograms):
        number = str(place + 1) if place else ""
        bottom = 1 - (place + 1) * height
        top = math.log10(max(*one.bins, 10)) + 0.5
        axes[f"xaxis{number}"] = _AXIS | {"anchor": f"y{number}", "range": [0, 1], "dtick": 0.2, "tickformat": ".1f"}
        axes[f"yaxis{number}"] = _AXIS | {
            "anchor": f"x{number}",
            "domain": [bottom + 0.2 * height, bottom + height],
            "type": "log",
            "range": [math.log10(0.6), top],
            "dtick": 1,
            "tickformat": ",",
            "title": {"text": f"{one.role}: turns"},
        }
        drawn = _thresholds(one.thresholds, number)
        lines += [line for line, _ in drawn]
        labels += [label for _, label in drawn]
    axes[f"xaxis{number}"]["title"] = {"text": "score"}
    layout = _layout(_PANEL * len(histograms) + 40) | axes
    layout |= {"shapes": lines, "annotations": labels, "bargap": 0.05, "showlegend": False}
    return go.Figure([_histogram(one, place) for place, one in enumerate(histograms)], layout)


def changes(flips: Sequence[Flip]) -> go.Figure:
    """Of each category, how many turns the second policy judges more strictly, and how many more mildly."""
    stricter: defaultdict[str, int] = defaultdict(int)
    milder: defaultdict[str, int] = defaultdict(int)
    for flip in flips:
        side = stricter if LEVELS.index(flip.after) > LEVELS.index(flip.before) else milder
        side[flip.category or ""] += flip.share.count
    names = sorted(stricter.keys() | milder.keys(), key=lambda name: (-stricter[name] - milder[name], name))
    sides = (("milder", milder, -1, "var(--milder)", "/"), ("stricter", stricter, 1, "var(--block)", ""))
    bars = [
        go.Bar(
            y=_labels(names),
            x=[sign * counts[name] for name in names],
            customdata=[counts[name] for name in names],
            name=side,
            orientation="h",
            marker=_marker(colour, pattern),
            hovertemplate=f"%{{y}}: %{{customdata:,}} turns<extra>{side}</extra>",
        )
        for side, counts, sign, colour, pattern in sides
        if any(counts.values())
    ]
    figure = _figure(bars, _ROW * len(names) + 110, barmode="relative")
    figure.update_yaxes(autorange="reversed", type="category", dtick=1)
    figure.update_xaxes(
        title="← milder · turns · stricter →", tickformat=",", zeroline=True, zerolinecolor="var(--soft)"
    )
    return figure


def _histogram(histogram: Histogram, place: int) -> go.Bar:
    width = 1 / BINS
    number = str(place + 1) if place else ""
    return go.Bar(
        x=[(at + 0.5) * width for at in range(BINS)],
        y=[count or None for count in histogram.bins],
        xaxis=f"x{number}",
        yaxis=f"y{number}",
        width=width,
        marker={"color": "var(--accent)", "line": {"width": 0}},
        customdata=[f"{at * width:.2f}–{(at + 1) * width:.2f}" for at in range(BINS)],
        hovertemplate=f"score %{{customdata}}: %{{y:,}} turns<extra>{html.escape(histogram.role)}</extra>",
    )


def _thresholds(thresholds: Mapping[str, float], number: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Lines and their labels, each on a height of its own, since thresholds may be close to each other."""
    panel = {"xref": f"x{number}", "yref": f"y{number} domain"}
    return [
        (
            panel
            | {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1}
            | {"line": {"color": f"var(--{action})", "dash": _DASHES[action], "width": 2}},
            panel
            | {"x": at, "y": 1 - 0.16 * place, "text": f"{action} {at:g}", "showarrow": False, "yanchor": "top"}
            | {"xanchor": "right" if at > _RIGHT else "left", "bgcolor": "var(--paper)", "opacity": 0.9},
        )
        for place, (action, at) in enumerate(sorted(thresholds.items(), key=lambda item: item[1]))
    ]


def _figure(data: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    return go.Figure(list(data), _layout(height) | layout)


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 12},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0, "traceorder": "normal"},
        "hoverlabel": {"bgcolor": "var(--paper)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "dragmode": False,
        "showlegend": True,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }


def _dated(figure: go.Figure, days: Sequence[str]) -> go.Figure:
    first = max(date.fromisoformat(days[0]), date.min + timedelta(1))
    ends = [f"{first - timedelta(1)}T12:00", f"{days[-1]}T12:00"]
    return figure.update_xaxes(type="date", tickformat="%d %b\n%Y", nticks=6, range=ends)


def _marker(colour: str, pattern: str) -> dict[str, Any]:
    return {
        "color": colour,
        "pattern": {"shape": pattern, "fgcolor": "var(--paper)", "fillmode": "overlay", "size": 6, "solidity": 0.25},
        "line": {"width": 0},
    }


def _labels(names: Sequence[str]) -> list[str]:
    """Short ones, no two the same. Plotly reads some HTML in them."""
    short = [plain(name or "no category", _LABEL) for name in names]
    return [
        html.escape(label if short.count(label) == 1 else f"{label} ({place})") for place, label in enumerate(short, 1)
    ]
