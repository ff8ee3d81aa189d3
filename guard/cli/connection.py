"""What the commands that ask a running server share: where it is, and who asks."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from guard.client import AdminClient, SyncClient

_Kind = Callable[[], "type[AdminClient | SyncClient]"]
_Ask = Callable[..., int]


def connected(app: typer.Typer, kind: _Kind, token_variable: str) -> Callable[[_Ask], _Ask]:
    """Adds commands to `app` that have a client of that kind as their first argument, and return the exit code.

    They have options for the connection beside their own; the token may be given in the variable of that name.
    """

    def connect(
        server: Annotated[str, typer.Option(envvar="GUARD_SERVER", metavar="HOST:PORT")] = "127.0.0.1:50051",
        token: Annotated[str | None, typer.Option(envvar=token_variable, show_default=False)] = None,
        timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 10.0,
        tls: Annotated[bool, typer.Option("--tls", help="Encrypt, and trust the authorities of this machine.")] = False,
        tls_ca: Annotated[Path | None, _pem("Encrypt, and trust these authorities instead.")] = None,
        tls_cert: Annotated[Path | None, _pem("Certificate of this client, for mutual TLS.")] = None,
        tls_key: Annotated[Path | None, _pem("Its key.")] = None,
    ) -> "AdminClient | SyncClient":
        """The client that the options describe."""
        from guard.client import Tls

        files = (tls_ca, tls_cert, tls_key)
        pems = (file.read_bytes() if file else None for file in files)
        return kind()(server, token=token, tls=Tls(*pems) if tls or any(files) else None, timeout=timeout)

    shared = inspect.signature(connect).parameters

    def add(ask: _Ask) -> _Ask:
        _, *own = inspect.signature(ask).parameters.values()

        def command(**given: Any) -> None:
            with connect(**{name: given.pop(name) for name in shared}) as client:
                raise typer.Exit(ask(client, **given))

        command.__doc__ = ask.__doc__
        command.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
        app.command(ask.__name__)(command)
        return ask

    return add


def _pem(help: str) -> Any:
    return typer.Option(help=help, exists=True, dir_okay=False, show_default=False)
