"""`guard client …`: the same answers from a running server, and thousands of them at once."""

import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from guard.cli import options
from guard.cli.connection import connected
from guard.errors import InputError

if TYPE_CHECKING:
    from guard.client import SyncClient

app = typer.Typer(name="client", help="Ask a running server.", no_args_is_help=True, rich_markup_mode=None)

_WRONG = {3, 5}  # INVALID_ARGUMENT and NOT_FOUND: another try would not help


def _client() -> "type[SyncClient]":
    from guard.client import SyncClient

    return SyncClient


_command = connected(app, _client, "GUARD_TOKEN")


@_command
def check(
    client: "SyncClient",
    text: options.Text = None,
    role: options.Role = "user",
    policy: options.Policy = "",
    as_json: options.Json = False,
) -> int:
    """Judge a text, or one turn of a conversation; see `guard check --help`."""
    from guard.cli import read, render

    request = read.request(text, role, policy)
    return render.answer(request.turns, client.check(request), as_json)


@_command
def conversation(client: "SyncClient", policy: options.Policy = "", as_json: options.Json = False) -> int:
    """Judge every turn of the conversation on standard input; exits with 1 when any is blocked or redirected."""
    from guard.cli import read, render

    request = read.whole(read.request(None, "user", policy))
    return render.answer(request.turns, client.check_conversation(request), as_json)


@_command
def many(client: "SyncClient") -> int:
    """Judge the JSON Lines on standard input, many at a time.

    A line is a conversation as `guard check` takes it, or {"text": "…", "role": "user"}, and may have an "id", which is
    its number else. Answers are JSON Lines too, {"id", "response"} or {"id", "error"}, in the order they finish.

    Exits with 0 when every line got a response, else with 2 or 3. Where the server stops or is lost, each line that was
    sent to it gets a response or an error, and no more lines are read.
    """
    from guard.cli import read, render
    from guard.v1 import moderation_pb2 as pb

    writing = threading.Lock()
    worst = 0

    def write(answer: pb.CheckManyResponse) -> None:
        nonlocal worst
        with writing:
            if answer.HasField("error"):
                worst = max(worst, 2 if answer.error.code in _WRONG else 3)
            sys.stdout.write(render.to_json(answer, indent=None) + "\n")
            sys.stdout.flush()
            advance()

    # Not sys.stdin: the thread that may still wait for a line as we exit would hold what Python then wants to close.
    source = open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115 # for the same reason

    def requests() -> Iterator[pb.CheckManyRequest]:
        for id, request in read.lines(source):
            if isinstance(request, InputError):
                write(pb.CheckManyResponse(id=id, error=pb.Error(code=3, message=str(request))))
            else:
                yield pb.CheckManyRequest(id=id, request=request)

    with render.progress() as advance:
        for answer in client.check_many(requests()):
            write(answer)
    return worst


@_command
def model(client: "SyncClient", as_json: options.Json = False) -> int:
    """Show the model that is served, and how it runs there."""
    from guard.cli import render

    (render.print_json if as_json else render.model)(client.model())
    return 0


@_command
def policies(client: "SyncClient", as_json: options.Json = False) -> int:
    """Show the policies in force."""
    from guard.cli import render

    (render.print_json if as_json else render.policies)(client.policies())
    return 0


@_command
def health(client: "SyncClient") -> int:
    """Exit with 0 when the server is ready to judge, else with 3."""
    serving = client.serving()
    typer.echo("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 3
