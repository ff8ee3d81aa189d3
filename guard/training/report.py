"""What guard.training.evaluate found, as tables: for a terminal, and in Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.training.evaluate import LENGTHS, METRICS
from guard.training.plots import draw
from guard.types import HAZARDS

FIGURES = (
    "Figures are in per cent, with 95 % intervals. FPR is the share of harmless rows whose score reaches {threshold}, "
    "recall that of the unsafe ones, ECE the expected calibration error."
)
TITLES = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "f1": "F1",
    "fpr": "FPR",
    "recall": "recall",
    "recall_at_fpr_0.01": "recall at 1 % FPR",
    "ece": "ECE",
    "changed": "changed",
}
_SECTIONS = {
    "by_role": "role",
    "by_language": "language",
    "by_length": "characters",
    "by_source": "source",
    "hazards": "hazard",
}


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names a row; the others are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        rule = ("---", *["---:"] * (len(self.header) - 1))
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)) + "\n"


def write(report: Mapping[str, Any], directory: Path) -> None:
    """`evaluation.json`, and the same to read: `evaluation.md` and its plots."""
    (directory / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    curves = {label(report["model"]): report["evaluation"]["curves"]}
    if "against" in report:
        curves[label(report["against"]["model"])] = report["against"]["evaluation"]["curves"]
    plots = "\n".join(f"![{name}]({name})" for name in draw(curves, directory))
    parts = "\n".join(f"## {heading}\n\n{table.markdown()}" for heading, table in sections(report))
    text = f"# {' against '.join(curves)}\n\n{describe(report)}\n\n{plots}\n\n{parts}"
    (directory / "evaluation.md").write_text(text, encoding="utf-8")


def describe(report: Mapping[str, Any]) -> str:
    """What was measured, and how to read it."""
    rows = ", ".join(f"{data['file']} ({data['unsafe']:,} unsafe of {data['rows']:,})" for data in report["data"])
    return f"Rows: {rows}. {FIGURES.format(threshold=report['evaluation']['threshold'])}"


def label(model: Mapping[str, str]) -> str:
    return f"{model['name']} {model['revision'][:8]}"


def sections(report: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """The tables of a report, with their headings."""
    evaluation = report["evaluation"]
    if "against" in report:
        first, second = (
            (label(found["model"]), found["evaluation"]["unsafe"]) for found in (report, report["against"])
        )
        yield "Side by side", side_by_side(first, second, report["difference"]["unsafe"])
        for heading, table in slices(report["difference"]):
            yield f"Difference, {heading}", table
    yield from slices(evaluation)
    if any("unsafe" in heads for heads in report["thresholds"].values()):
        yield "Operating points", operating_points(report["thresholds"])


def slices(found: Mapping[str, Any], sections: Sequence[str] = tuple(_SECTIONS)) -> Iterator[tuple[str, Table]]:
    """All rows, then each of the sections of what `evaluate` or `compare` found."""
    yield "all rows", metrics("", {"unsafe": found["unsafe"]})
    for section in sections:
        if found[section]:
            name = _SECTIONS[section]
            yield f"by {name}", metrics(name, {title(section, key): own for key, own in found[section].items()})


def metrics(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line of metrics, or of differences, for each of several sets of rows."""
    differences = any("changed" in found for found in rows.values())
    columns = ("changed", *METRICS) if differences else METRICS
    return Table(
        (name, "rows", "positive", *(TITLES[column] for column in columns)),
        tuple(
            (
                key,
                f"{found['rows']:,}",
                f"{found['positives']:,}",
                *(cell(found, column, signed=differences and column != "changed") for column in columns),
            )
            for key, found in rows.items()
        ),
    )


def side_by_side(
    first: tuple[str, Mapping[str, Any]], second: tuple[str, Mapping[str, Any]], difference: Mapping[str, Any]
) -> Table:
    """Two models' metrics, by name, on the same rows."""
    return Table(
        ("", first[0], second[0], "difference"),
        tuple(
            (TITLES[name], cell(first[1], name), cell(second[1], name), cell(difference, name, signed=True))
            for name in METRICS
            if name in difference
        ),
    )


def operating_points(thresholds: Mapping[str, Any]) -> Table:
    """The thresholds on `unsafe` for each false-positive rate."""
    return Table(
        ("role", "FPR of at most", "threshold", "FPR", "recall"),
        tuple(
            (
                role,
                f"{100 * point['max_fpr']:g}",
                f"{point['threshold']:.4f}",
                cell(point, "fpr"),
                cell(point, "recall"),
            )
            for role, heads in thresholds.items()
            if "unsafe" in heads
            for point in heads["unsafe"]["points"]
        ),
    )


def disguises(found: Mapping[str, Any]) -> Table:
    """What `guard.training.evaluate.under` found, the plain rows first; earlier versions told no change."""
    titles = {"recall": "recall", "change": "beside plain", "fpr": "FPR"}
    told = [name for name in titles if any(name in own for own in found.values())]
    rows = (
        (name.replace("_", " "), *(cell(own, column, signed=column == "change") for column in told))
        for name, own in found.items()
    )
    return Table(("disguise", *(titles[column] for column in told)), tuple(rows))


def cell(found: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    """A metric and its interval in per cent; nothing where it could not be computed."""
    if name not in found:
        return ""
    value, low, high = (
        f"{100 * number:{'+' if signed else ''}.1f}" for number in (found[name], *found["intervals"][name])
    )
    return f"{value} ({low}{' to ' if signed else '–'}{high})"


def title(section: str, key: str) -> str:
    """What a slice is called."""
    if section == "by_length":
        after = LENGTHS.index(int(key)) + 1
        return f"{key} to {LENGTHS[after] - 1}" if after < len(LENGTHS) else f"{key} or more"
    return f"{key} {HAZARDS[key]}" if section == "hazards" else key
