"""`guard audit …`: months of logs through a policy, and a report on what was found."""

import codecs
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from guard.cli import options
from guard.cli.audit_agree import agree
from guard.cli.audit_progress import Shown, shown
from guard.cli.audit_sample import Out, sample
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.audit.inputs import Input
    from guard.audit.judge import Judging
    from guard.audit.output import Totals
    from guard.audit.stop import Stop
    from guard.client import Tls
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


app.command()(sample)
app.command()(agree)


@app.command()
def report(
    out: Out,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Show the beginnings of texts, where the audit kept them.")
    ] = False,
) -> None:
    """Write the report of an audit anew, also while it is not finished."""
    with options.extra("a report", "audit"):
        from guard.audit.report.write import write_report

    write_report(out, text=with_text)
    typer.echo(f"written: {', '.join(str(out / name) for name in ('report.html', 'report.md', 'summary.json'))}")


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
        str, typer.Option(metavar="NAME|FILE", help="A second policy: what would it change?", show_default=False)
    ] = "",
    shape: Annotated[str | None, typer.Option(help="conversations, rows, pairs or texts.", show_default=False)] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="FIELD=COLUMN",
            help="Where a field is; FIELD= nowhere. May be given again.",
            show_default=False,
        ),
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
        str, typer.Option(metavar="HOST:PORT", help="Have a running server judge, in bulk.", show_default=False)
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
        from guard.audit.inputs import STDIN, find_inputs
        from guard.audit.output import is_complete, open_output
        from guard.audit.read import Logs, facts_of
        from guard.audit.read import sample as first_rows
        from guard.audit.report.write import write_report
        from guard.audit.rows import Limits
        from guard.audit.run import run as audit
        from guard.audit.shapes import detect
    from guard.client import Tls
    from guard.settings import Settings

    found = find_inputs(inputs, format, out)
    limits = Limits(_known(encoding), max_row_bytes)
    logs = Logs(found, detect(first_rows(found, limits), shape, mapping or (), roles or ()), limits, out / "spool")
    typer.echo(f"{_counted(found)}; {logs.shape.described()}", err=True)
    if dry_run:
        return
    if STDIN in [each.url for each in found] and engine == "ray":
        raise ConfigError("engine: other machines cannot read this one's standard input")
    if server:
        trusted = Tls(tls_ca.read_bytes() if tls_ca else None) if tls or tls_ca else None
        judging, in_force = _remote(server, token, trusted, policy, compare, text=with_text)
    else:
        settings = Settings.load({"policies": policies, "model": model}, os.environ, config)
        by_row = not policy and "policy" in logs.shape.columns
        judging, in_force = _here(settings, policy, compare, engine, workers, by_row=by_row, text=with_text)
    facts = {
        "version": version("guard-moderation"),
        "engine": engine,
        **facts_of(logs),
        "server": server or None,
        "policy": policy or None,
        "with_text": with_text,
        **in_force,
    }
    with _stoppable(out) as stop, open_output(out, facts, judging.schema) as output, shown(progress) as tell:
        if not is_complete(out):
            if logs.is_spread:
                typer.echo("sorting turns into conversations, which comes before all else", err=True)
            logs.gather(stop)
            for now in audit(logs, judging, output, stop, max_bad):
                tell(now)
        totals = output.totals
    logs.forget()
    write_report(out)
    typer.echo(_told(totals, out))
    if totals.incomplete:
        raise typer.Exit(1)


def _here(
    settings: "Settings", policy: str, compare: str, engine: Engine, workers: int | None, *, by_row: bool, text: bool
) -> "tuple[Judging, Mapping[str, Any]]":
    """By the model in this process, or those of a cluster; and what was in force."""
    from guard.audit.recipe import Recipe, policy_facts
    from guard.audit.run import Local
    from guard.cli.policy import find
    from guard.engine.moderator import model_thread
    from guard.policy.bundle import Signatures
    from guard.policy.document import read_file
    from guard.policy.store import policy_files

    signed = Signatures(settings.policies_key).open(settings.policies) if settings.policies_key and not policy else None
    known = [find(policy)] if policy else policy_files(settings.policies, signed)
    default = known[0].stem if policy else settings.default_policy
    recipe, judging_by, compared = Recipe.read(
        settings,
        [path for path in known if by_row or path.stem == default],
        default,
        by_row=by_row,
        compare=find(compare) if compare else None,
        text=text,
        source=signed.read if signed else read_file,
    )
    judging: Judging
    if engine == "ray":
        with options.extra("a cluster", "ray"):
            from guard.audit.cluster import Cluster
        judging = cluster = Cluster(recipe, workers)
        model = cluster.model
    else:
        thread = model_thread()
        judge, model = thread.submit(recipe.judge).result()
        judging = Local(judge, thread)
    return judging, {
        "model": {"name": model.revision.name, "revision": model.revision.revision, "dtype": model.dtype},
        "policies": {one.name: policy_facts(one) for one in judging_by.policies},
        "compare": {"name": compared.name, **policy_facts(compared)} if compared else None,
    }


def _remote(
    server: str, token: str | None, tls: "Tls | None", policy: str, compare: str, *, text: bool
) -> "tuple[Judging, Mapping[str, Any]]":
    """By a server, with its policies; and what is in force there."""
    from guard.audit.remote import Remote
    from guard.client import SyncClient

    if compare:
        raise ConfigError("compare: a server judges by one policy; compare afterwards, with guard policy diff on DIR")
    remote = Remote(SyncClient(server, token=token, tls=tls), policy, text=text)
    return remote, remote.in_force


@contextmanager
def _stoppable(out: Path) -> "Iterator[Stop]":
    """SIGTERM and Ctrl-C ask it to stop, and what is judged is kept; the second one stops it at once."""
    from guard.audit.stop import Stop, Stopped

    stop = Stop()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.ask()

    is_main = threading.current_thread() is threading.main_thread()  # elsewhere nobody is told of signals
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        yield stop
    except (Stopped, KeyboardInterrupt):
        typer.echo(f"stopped; the same command goes on with {out}", err=True)
        raise typer.Exit(130) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"encoding: there is no '{encoding}'") from None


def _counted(inputs: "Sequence[Input]") -> str:
    size = sum(each.size or 0 for each in inputs)
    return f"{len(inputs):,} input{'s' * (len(inputs) != 1)}, {size / 2**20:,.1f} MiB"


def _told(totals: "Totals", out: Path) -> str:
    share = f" ({totals.refused / totals.turns:.2%})" if totals.turns else ""
    bad = (
        f"; {totals.rejected:,} row{'s' * (totals.rejected != 1)} rejected, see {out / 'rejects.jsonl'}"
        if totals.rejected
        else ""
    )
    lost = (
        f"; {totals.incomplete:,} input{'s' * (totals.incomplete != 1)} could not be read to the end"
        if totals.incomplete
        else ""
    )
    return (
        f"{totals.conversations:,} conversations, {totals.turns:,} turns, {totals.refused:,} not allowed{share}{bad}"
        f"{lost}; report: {out / 'report.html'}"
    )
