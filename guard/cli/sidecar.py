"""`guard sidecar`: Envoy in front of a generation backend, with Guard beside it, in one command."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from guard.cli import options
from guard.cli.serve import parameters
from guard.errors import ConfigError
from guard.service.sidecar import Sidecar, bootstrap, running
from guard.settings import Settings
from guard.types import Action, Role

if TYPE_CHECKING:
    from guard.service.server import Server
    from guard.telemetry import Telemetry

_HERE = {"listen": "127.0.0.1:50051", "http": "127.0.0.1:9090"}
_MARGIN = 2**16  # of a message's size, for what stands in it beside a body


def sidecar(config: Path | None, print_config: bool, **flags: str | bool | None) -> None:
    """Put Guard in front of a generation backend: its clients talk to Envoy, which asks Guard.

    The options from --listen on are those of `guard serve`, which here listens on this machine alone unless they say
    otherwise.
    """
    given = {name: value for name in Sidecar.model_fields if (value := flags.pop(name)) is not None}
    try:
        chosen = Sidecar.model_validate(given)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError("\n".join(_describe(problem) for problem in problems)) from None
    settings = Settings.load(flags, os.environ, config)
    unsaid = {name: address for name, address in _HERE.items() if name not in settings.model_fields_set}
    settings = settings.model_copy(update=unsaid)
    if settings.tls_cert is not None:
        raise ConfigError("tls_cert: Envoy asks the Guard beside it in plain text, on this machine")
    is_open = _is_open(chosen, settings)
    if print_config:
        address = chosen.guard or settings.listen.replace("0.0.0.0", "127.0.0.1")
        typer.echo(json.dumps(_bootstrap(chosen, address, is_open, settings), indent=2))
    else:
        asyncio.run(_run(chosen, is_open, settings))


async def _run(sidecar: Sidecar, is_open: bool, settings: Settings) -> None:
    from guard.service import server

    @asynccontextmanager
    async def envoy(address: str, telemetry: "Telemetry") -> AsyncIterator[Awaitable[None]]:
        config = _bootstrap(sidecar, address, is_open, settings)
        async with running(config, telemetry.log, settings.drain_seconds) as running_envoy:
            yield running_envoy.ended()

    def beside(server: "Server", telemetry: "Telemetry") -> Any:
        return envoy(f"127.0.0.1:{server.grpc_port}", telemetry)

    if sidecar.guard is None:
        await server.serve(settings, beside=beside)
        return
    from guard.telemetry import Telemetry

    stopping = server.stop_signal()
    async with envoy(sidecar.guard, Telemetry.start(settings.log_level)) as ended:
        await server.first(stopping.wait(), ended)


def _bootstrap(sidecar: Sidecar, guard: str, is_open: bool, settings: Settings) -> dict[str, Any]:
    return bootstrap(sidecar, guard, is_open, max(1, settings.max_message_bytes - _MARGIN))


def _is_open(sidecar: Sidecar, settings: Settings) -> bool:
    """Whether all passes while no Guard answers; that of another machine is taken to know the same policies."""
    if sidecar.fail != "policy":
        return sidecar.fail == "open"
    from guard.policy.calibration import Calibration
    from guard.policy.store import PolicyStore

    policies = PolicyStore.load(settings.policies, settings.default_policy, Calibration.read(settings.model))
    on_error = policies.get(sidecar.policy).on_error
    return max(on_error[Role.USER], on_error[Role.AGENT]) == Action.ALLOW


def _describe(problem: Any) -> str:
    name = "--" + str(problem["loc"][0]).replace("_", "-")
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}"


_print = Annotated[bool, typer.Option("--print-config", help="Print Envoy's configuration, and do nothing.")]
_switch = Annotated[bool, typer.Option(help=Sidecar.model_fields["optimistic"].description)]
_own = {parameter.name: parameter for parameter in parameters(Sidecar)}
_own["optimistic"] = _own["optimistic"].replace(annotation=_switch, default=False)
sidecar.__signature__ = Signature(  # type: ignore[attr-defined]  # where typer looks for options
    [
        *_own.values(),
        Parameter("print_config", Parameter.KEYWORD_ONLY, default=False, annotation=_print),
        Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=options.Config),
        *parameters(Settings),
    ]
)
