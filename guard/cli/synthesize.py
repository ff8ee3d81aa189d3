"""`guard synthesize`: examples of a category by a generation backend, the most telling first, for people to review."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from guard.cli import options
from guard.cli.progress import progress
from guard.errors import ConfigError, Unanswered

if TYPE_CHECKING:
    from guard.training.data import Record


def synthesize(
    category: Annotated[Path, typer.Option(help="A YAML file: title, definition, examples.", show_default=False)],
    backend: Annotated[
        str, typer.Option(help="An OpenAI-compatible API, e.g. http://localhost:8000/v1.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option(help="The backend's model, if it has several.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(help="How many texts to gather.", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Where they go; must not be there yet.")] = Path("synthesised.jsonl"),
    keep_at_least: Annotated[
        float, typer.Option(help="Leave out what the classifier disagrees with by less.", min=0, max=1)
    ] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds that a reply may take, before it is given up.", min=1)] = 300,
    config: options.Config = None,
) -> None:
    """Have examples of a category written, for you to review. Needs the extra `train`.

    Half of the texts are to belong to the category, half only to look alike. None is labelled: set "unsafe" to 0 or 1
    where you have looked. First come those of which the classifier thinks otherwise than was asked for.

    The category, its definition and its examples are sent to the backend, with OPENAI_API_KEY if that is set.
    """
    from guard.settings import Settings

    with options.extra("synthesising"):
        from guard.training import synthesize as synthesis
        from guard.training.served import served

    settings = Settings.load({}, os.environ, config)
    wanted = synthesis.read_category(category)
    writer = synthesis.Backend(backend, model, os.environ.get("OPENAI_API_KEY"), seconds=timeout)
    records: list[Record] = []
    with _new(out) as file, progress("gathering", count) as advance:

        def keep(record: "Record") -> None:
            records.append(record)
            file.write(record.model_dump_json() + "\n")
            advance()

        try:
            unused = asyncio.run(synthesis.gather(wanted, writer, count, keep))
        finally:  # what is there when the backend fails, or somebody presses Ctrl-C, is worth as much
            if records:
                _, scores = served(settings, [record.example() for record in records])
                telling = synthesis.ranked(records, scores[:, 0], keep_at_least)
                synthesis.write(telling, out)
                typer.echo(f"{out}: {len(telling)} texts to review, of {len(records)} gathered")
            else:
                out.unlink()
    told = ", ".join(f"{number} {reason}" for reason, number in unused.most_common())
    if not records:
        raise Unanswered(f"the backend wrote nothing that can be used: {told}")
    if told:
        typer.echo(f"not used: {told}", err=True)


@contextmanager
def _new(path: Path) -> Iterator[TextIO]:
    """A file that was not there, written line by line."""
    try:
        file = path.open("x", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    with file:
        yield file
