"""`guard evaluate`: what a model is worth on labelled rows, alone or beside another."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import options
from guard.cli.progress import progress
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.training.report import Table


def evaluate(
    data: Annotated[list[Path], typer.Argument(help="Labelled rows: .jsonl or .csv, plain or .gz.")],
    model: Annotated[Path | None, typer.Option(help="Directory of a model.", show_default=False)] = None,
    against: Annotated[
        Path | None, typer.Option(help="Directory of a model to compare with.", exists=True, show_default=False)
    ] = None,
    threshold: Annotated[float, typer.Option(help="From which score on a turn counts as unsafe.", min=0, max=1)] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Directory for evaluation.json, evaluation.md and plots.", show_default=False)
    ] = None,
    config: options.Config = None,
) -> None:
    """Measure a model on labelled rows, with 95 % intervals. Needs the extra `train`.

    Rows are Guard's own records {"turns": […], "unsafe": 0}, chats {"messages": […], "label": "safe"}, or a CSV file
    with the columns text and label. Labels are 0 or safe, 1 or unsafe. The last turn is the judged one.
    """
    from guard.settings import Settings

    with options.extra("evaluating"):
        from guard.training import evaluate as measure
        from guard.training import formats, report, served

    def scores(directory: Path | None) -> tuple[dict[str, str], measure.Floats]:
        settings = Settings.load({"model": directory}, os.environ, config)
        with progress("scoring", len(examples)) as scored:
            info, found = served.served(settings, examples, scored)
        return {
            "name": info.revision.name,
            "revision": info.revision.revision,
            "device": info.device,
            "dtype": info.dtype,
            "kernels": info.kernels,
        }, found

    files = {path: formats.read_examples(path) for path in data}
    examples = [example for rows in files.values() for example in rows]
    if not examples:
        raise ConfigError(f"{', '.join(map(str, files))}: there is no labelled row")
    if out is not None:
        _make(out)
    own, found = scores(model)
    evaluated: dict[str, Any] = {
        "model": own,
        "data": [
            {"file": path.name, "rows": len(rows), "unsafe": sum(row.unsafe for row in rows)}
            for path, rows in files.items()
        ],
        "evaluation": measure.evaluate(found, examples, threshold),
        "thresholds": measure.thresholds(found, examples),
    }
    if against is not None:
        other, others = scores(against)
        evaluated["against"] = {"model": other, "evaluation": measure.evaluate(others, examples, threshold)}
        evaluated["difference"] = measure.compare(found, others, examples, threshold)
    _show(report.describe(evaluated), report.sections(evaluated))
    if out is not None:
        report.write(evaluated, out)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error


def _show(description: str, tables: "Iterator[tuple[str, Table]]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # a file or a pipe is as wide as the tables are; on a narrow terminal cells break, and lose nothing
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    console.print(description)
    for heading, table in tables:
        shown = Table(*table.header, title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(shown.columns):
            column.overflow = "fold"
            column.justify = "right" if number else "left"
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
