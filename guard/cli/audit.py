"""`guard audit …`: months of logs through a policy, and a report on what was found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from guard.cli import options
from guard.cli.audit_progress import Shown, shown
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.audit.inputs import Source
    from guard.audit.judge import Judging
    from guard.audit.run import Progress
    from guard.settings import Settings

Engine = Literal["local", "ray"]


class _Audit(TyperGroup):
    """A group whose `run` need not be said: `guard audit logs/` is `guard audit run logs/`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="audit",
    cls=_Audit,
    help="Judge months of logs: guard audit INPUT... --out DIR, which is short for guard audit run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def run(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Files, globs, folders, URLs, or - for standard input.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the audit; one that is there is gone on with.")],
    policy: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="Judges all; without it the one that a row names.", show_default=False),
    ] = "",
    policies: Annotated[
        Path | None, typer.Option(help="Directory of the policies that rows name.", show_default=False)
    ] = None,
    compare: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A second policy, to tell what it would change.", show_default=False)
    ] = "",
    shape: Annotated[
        str | None, typer.Option(help="turns, messages, sharegpt, rows, pairs or text.", show_default=False)
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FIELD=COLUMN", help="Where a field is; may be given again.", show_default=False),
    ] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="WORD=ROLE", help="Who a word stands for, bot=agent.", show_default=False),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="jsonl, json, csv, tsv or parquet, whatever the ending.", show_default=False)
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text.")] = "utf-8",
    max_row_bytes: Annotated[int, typer.Option(help="A longer row is rejected.", min=1)] = 16 * 2**20,
    max_bad: Annotated[
        int | None, typer.Option(help="Stop once more rows are rejected.", min=0, show_default=False)
    ] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Write texts beside their verdicts.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be read, and stop.")] = False,
    engine: Annotated[Engine, typer.Option(help="This process, or a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Of ray: actors; by default one a GPU or machine.", min=1, show_default=False)
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Have a running server judge, in its bulk lane.", show_default=False)
    ] = "",
    token: Annotated[str | None, typer.Option(envvar="GUARD_TOKEN", show_default=False, help="Of --server.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Of --server: encrypt.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Of --server: encrypt, and trust these authorities.", show_default=False)
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Directory of a model.", show_default=False)] = None,
    config: options.Config = None,
    progress: Annotated[Shown, typer.Option(help="On stderr; json is a line each second.")] = "auto",
) -> None:
    """Judge every turn of the conversations in logs, and write verdicts, rejected rows and a report.

    Needs the extra `audit`. Stopped at any moment, the same command goes on where it was; a change of arguments that
    would change the verdicts is refused. The formats and shapes of input are in docs/audit.md.

    Exits with 0 when all was read, with 1 when the rest of an input could not be.
    """
    with options.extra("auditing", "audit"):
        from guard.audit import inputs as reading
        from guard.audit.output import open_output
        from guard.audit.report import write_report
        from guard.audit.run import run as audit
