"""`guard serve`: the service. Its flags are the fields of the settings, and their help what the settings say."""

import asyncio
import os
from collections.abc import Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from guard.cli import options
from guard.settings import Settings


def serve(config: Path | None, **flags: str | None) -> None:
    """Serve gRPC, and metrics over HTTP, until told to stop.

    Every flag can also be given as a variable of the environment, --max-turns as GUARD_MAX_TURNS, or as a line of the
    TOML file, max_turns = 1000.
    """
    settings = Settings.load(flags, os.environ, config)
    from guard.service import server

    asyncio.run(server.serve(settings))


def parameters(kind: type[BaseModel]) -> Iterator[Parameter]:
    """An option for each field of a model; all are text, and None where they were not given."""
    for name, schema in kind.model_json_schema()["properties"].items():
        form = schema.get("anyOf", [schema])[0]
        known = "|".join(form["enum"]) if "enum" in form else form.get("format", form["type"])
        is_shown = schema.get("default") is not None and "format" not in form  # where shipped files lie is no help
        default = f"[default: {schema['default']}]" if is_shown else ""
        help = f"{schema.get('description', '')} {default}".strip()
        option = typer.Option(f"--{name.replace('_', '-')}", help=help, metavar=f"<{known}>", show_default=False)
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option])


_config = Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=options.Config)
serve.__signature__ = Signature([_config, *parameters(Settings)])  # type: ignore[attr-defined]  # where typer looks for options
