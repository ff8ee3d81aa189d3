"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Text = Annotated[
    str | None,
    typer.Argument(
        help="What is said in the one turn; - or nothing: a JSON conversation on standard input.", show_default=False
    ),
]
Role = Annotated[Literal["user", "agent"], typer.Option(help="Who says it.")]
Policy = Annotated[str, typer.Option(help="The policy to judge by, if not the default one.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the answer in protobuf's JSON mapping.")]
Config = Annotated[
    Path | None,
    typer.Option(help="A TOML file of settings; GUARD_* variables and flags stand above it.", show_default=False),
]
