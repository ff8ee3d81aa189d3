"""The command line: one file a command, each of which imports what it needs when it is run.

Exit codes   0  done; of checks: allowed or flagged
             1  of checks: blocked or redirected; of tests of policies: some failed; of a replay: not as it was logged;
                of an audit: the rest of an input could not be read
             2  the request, a file or a setting is wrong
             3  no answer: the server is not there, is overloaded or is stopping, or the model failed
           130  stopped by a signal
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from guard.cli import audit, client, fit, policy, replay, rollout, study
from guard.cli.calibrate import calibrate, quantize
from guard.cli.check import check
from guard.cli.evaluate import evaluate
from guard.cli.serve import serve
from guard.cli.sidecar import sidecar
from guard.cli.synthesize import synthesize
from guard.cli.train import distill, train
from guard.cli.unseal import unseal
from guard.errors import GuardError, Unanswered

app = typer.Typer(
    name="guard",
    help="Safety moderation of conversations.",
    epilog="Exit codes: 0 done (allowed or flagged), 1 not allowed, 2 something given is wrong, 3 no answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(serve)
app.command()(sidecar)
app.command()(check)
app.add_typer(client.app)
policy.app.command()(fit.fit)
policy.app.command()(replay.replay)
policy.app.command()(replay.diff)
app.add_typer(policy.app)
app.add_typer(audit.app)
app.command()(unseal)
app.add_typer(rollout.app)
app.command()(train)
app.command()(distill)
app.add_typer(study.app)
app.command()(evaluate)
app.command()(calibrate)
app.command()(quantize)
app.command()(synthesize)


def main() -> None:
    """The `guard` command. What users got wrong is one line a problem on stderr, and never a traceback."""
    try:
        app()
    except GuardError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(3 if isinstance(error, Unanswered) else 2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("guard-moderation"))
        raise typer.Exit


@app.callback()
def _guard(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
