"""`guard rollout …`: a candidate of a policy is tried on the live traffic of a server, put in force, and taken back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli import options
from guard.cli.connection import connected
from guard.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from guard.client import AdminClient
    from guard.v1 import admin_pb2 as pb

app = typer.Typer(
    name="rollout",
    help="Try policies on the live traffic of a running server, and put them in force.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="POLICY", help="Name of a policy in force.")]
Revision = Annotated[
    str, typer.Option(help="Refuse where the candidate is another one; its beginning will do.", show_default=False)
]


def _client() -> "type[AdminClient]":
    from guard.client import AdminClient

    return AdminClient


_command = connected(app, _client, "GUARD_ADMIN_TOKEN")


@_command
def stage(
    client: "AdminClient",
    file: Annotated[Path, typer.Argument(help="The candidate; its name is that of the policy.")],
    percent: Annotated[
        float, typer.Option(min=0, max=100, help="Share of the conversations that it answers; 0 for none of them.")
    ] = 0.0,
    hours: Annotated[float, typer.Option(min=0.001, help="After which it is taken away.")] = 24.0,
    as_json: options.Json = False,
) -> int:
    """Put a candidate beside a policy in force, in place of the one that is there; both judge every turn from now on.

    With --percent 0, in shadow, it answers nobody, and what it would change is counted. Otherwise it answers this share
    of the conversations, always the same ones.
    """
    text, includes = _read(file)
    rollout = client.stage(file.stem, text, includes, percent=percent, ttl_seconds=round(hours * 3600))
    return _show(rollout, as_json)


@_command
def status(client: "AdminClient", as_json: options.Json = False) -> int:
    """Show which revisions are live and which are tried, what these change, and whether the live ones are on disk."""
    from guard.cli import render

    response = client.rollouts()
    if as_json:
        render.print_json(response)
        return 0
    for line in response.differences:
        typer.echo(f"not as on disk: {line}")
    _print(response.rollouts)
    return 0


@_command
def promote(client: "AdminClient", policy: Name, revision: Revision = "", as_json: options.Json = False) -> int:
    """Put a policy's candidate in force, and into its file in the server's directory where that can be written."""
    return _show(client.promote(policy, revision), as_json)


@_command
def withdraw(client: "AdminClient", policy: Name, revision: Revision = "", as_json: options.Json = False) -> int:
    """Take a policy's candidate away; the live revision answers alone."""
    return _show(client.withdraw(policy, revision), as_json)


@_command
def rollback(client: "AdminClient", policy: Name, as_json: options.Json = False) -> int:
    """Put the revision in force that was before the live one, however that came; once more undoes it."""
    return _show(client.rollback(policy), as_json)


def _read(file: Path) -> tuple[str, dict[str, str]]:
    """The text of a policy, and those of the files that it includes. What is wrong with it, the server says."""
    from guard.policy.document import Document

    if not file.name.endswith(".yaml"):
        raise ConfigError(f"{file}: expected a file name such as my-policy.yaml")
    data = Document(file).data
    named = data.get("include") if isinstance(data, dict) else ()
    names = [name for name in named if isinstance(name, str)] if isinstance(named, tuple) else []
    paths = {name: file.with_name(name) for name in names}
    return _text(file), {name: _text(path) for name, path in paths.items() if path.is_file()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"{file}: cannot be read: {error.strerror}") from None


def _show(rollout: "pb.Rollout", as_json: bool) -> int:
    from guard.cli import render

    if as_json:
        render.print_json(rollout)
        return 0
    if rollout.difference:
        typer.echo(f"not as on disk: policy {rollout.policy}: {rollout.difference}")
    _print([rollout])
    return 0


def _print(rollouts: "Sequence[pb.Rollout]") -> None:
    from guard.cli import render

    console = render.terminal()
    table = render.columns("policy", "live", "before", "candidate", "answers", "expires in", "judged", "answered")
    for rollout in rollouts:
        row = [rollout.policy, rollout.live_revision, rollout.previous_revision]
        if rollout.HasField("candidate"):
            candidate = rollout.candidate
            hours, seconds = divmod(candidate.expires_in_seconds, 3600)
            row += [candidate.revision, f"{candidate.percent:g} %", f"{hours}:{seconds // 60:02} h"]
            row += [f"{candidate.verdicts:,}", f"{candidate.answered:,}"]
        table.add_row(*row)
    console.print(table)
    for rollout in rollouts:
        if rollout.candidate.flips:
            console.print(f"what {rollout.policy} {rollout.candidate.revision} changes")
            console.print(render.flips(rollout.candidate))
