"""`guard train` and `guard distill`: a model directory, made by a recipe or of another model."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import options
from guard.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guard.training.finetune import Progress

_BENCHMARK_ROWS = 300  # of each file

_Out = typer.Option(help="Where the model directory goes.")
_Benchmarks = typer.Option(help="Directory of labelled rows that only measure the model.", show_default=False)


def train(
    data: Annotated[
        Path,
        typer.Option(
            help="Directory of labelled conversations, JSON Lines; a file of rows with --head-only or --lora."
        ),
    ],
    out: Annotated[Path, _Out],
    base: Annotated[Path | None, options.Base] = None,
    work: Annotated[Path | None, options.Work] = None,
    steps: Annotated[int | None, options.Steps] = None,
    recipe: Annotated[Path | None, options.Recipe] = None,
    benchmarks: Annotated[Path | None, _Benchmarks] = None,
    compiled: Annotated[bool, options.Compiled] = True,
    head_only: Annotated[bool, typer.Option("--head-only", help="Only add a category of your own to a model.")] = False,
    origin: Annotated[
        str | None, typer.Option("--from", help="The model to add it to: a directory, or `default`, the embedded one.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Name that policies list it by, among their hazards.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; by default guard, with --head-only that of the other one.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Only fine-tune a Llama Guard checkpoint.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="With --lora: of what each matrix learns; 16.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=1e-9, help="With --lora: the highest; 0.0002.")] = None,
) -> None:
    """Train a model, calibrate it, and write it as a directory to serve. Needs the extra `train`.

    It takes --base and --work; or, with --head-only, --from and --category, to teach a model one category more, from
    some 200 rows as `guard evaluate` takes them: label 1 says that the last turn is of the category, 0 that it is not.
    The model's other scores stay as they are.

    Or, with --lora and --base, it teaches a Llama Guard checkpoint such rows: label 1 says that the last turn is
    unsafe. What comes of it is a checkpoint as Hugging Face has it. With --work a stopped run goes on.
    """
    shared: dict[str, object] = {"--base": base, "--work": work, "--steps": steps}
    planned: dict[str, object] = {"--recipe": recipe, "--benchmarks": benchmarks, "--no-compile": not compiled or None}
    added: dict[str, object] = {"--from": origin, "--category": category}
    if lora:
        _refuse(planned | {"--head-only": head_only or None} | added | {"--name": name}, "not with --lora")
        typer.echo(json.dumps(_lora(data, out, base, work, steps, rank, learning_rate)))
        return
    _refuse({"--rank": rank, "--learning-rate": learning_rate}, "not without --lora")
    if head_only:
        _refuse(shared | planned, "not with --head-only")
    else:
        _refuse(added, "not without --head-only")
    if origin is not None and category is not None:
        with options.extra("training"):
            from guard.settings import Settings
            from guard.training import formats, head
        model = Settings().model if origin == "default" else Path(origin)
        found = head.add_category(model, formats.read_examples(data), category, out, name)
    elif base is not None and work is not None:
        found = _train(data, out, base, work, (), steps, recipe, benchmarks, compiled, name)
    else:
        raise ConfigError("needs --base and --work, --lora with --base, or --head-only with --from and --category")
    typer.echo(json.dumps(found))


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raises ConfigError for options that have a value."""
    if strange := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(strange)}: {why}")


def _lora(
    data: Path,
    out: Path,
    base: Path | None,
    work: Path | None,
    steps: int | None,
    rank: int | None,
    learning_rate: float | None,
) -> dict[str, Any]:
    """What the run came to."""
    if base is None:
        raise ConfigError("--lora needs --base")
    with options.extra("training"):
        from guard.training import formats, lora
    default = lora.Plan()
    plan = lora.Plan(steps or default.steps, rank or default.rank, learning_rate or default.learning_rate)
    examples = formats.read_examples(data)
    with _reported() as report:
        return lora.train(base, examples, out, plan, work=work, report=report)


def distill(
    teacher: Annotated[
        list[Path], typer.Option(help="A model of Guard; the mean of several is learned.", exists=True, file_okay=False)
    ],
    data: Annotated[Path, options.Data],
    out: Annotated[Path, _Out],
    base: Annotated[Path, options.Base],
    work: Annotated[Path, options.Work],
    steps: Annotated[int | None, options.Steps] = None,
    recipe: Annotated[Path | None, options.Recipe] = None,
    benchmarks: Annotated[Path | None, _Benchmarks] = None,
    compiled: Annotated[bool, options.Compiled] = True,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "guard",
) -> None:
    """Train as `guard train` does, with teachers for rows whose label is missing or doubted. Needs the extra `train`.

    Of a source, the recipe says with `unlabelled` how many rows without a label a teacher's probabilities label, and
    with `taught` which share of the other labels they stand in for. Give the student a base of its own, smaller or not.
    """
    typer.echo(json.dumps(_train(data, out, base, work, teacher, steps, recipe, benchmarks, compiled, name)))


def _train(
    data: Path,
    out: Path,
    base: Path,
    work: Path,
    teachers: Sequence[Path],
    steps: int | None,
    recipe: Path | None,
    benchmarks: Path | None,
    compiled: bool,
    name: str | None,
) -> dict[str, Any]:
    """What the model is worth on the rows its recipe holds out."""
    with options.extra("training"):
        from guard.training import pipeline, processes
        from guard.training.calibrate import check
        from guard.training.data import load_benchmarks, load_examples, read_recipe
    recipe = recipe or options.RECIPE
    check(load_examples(read_recipe(recipe), data, "validation"))  # rather than after hours
    unseen = load_benchmarks(benchmarks, _BENCHMARK_ROWS) if benchmarks else {}
    with _reported() as report:
        pipeline.train(recipe, data, base, work, teachers=teachers, steps=steps, compiled=compiled, report=report)
    if not processes.first():
        raise typer.Exit
    released = pipeline.release(recipe, data, work, out, name=name or "guard", benchmarks=unseen)
    found: dict[str, Any] = released["held_out"]["unsafe"]
    return found


@contextmanager
def _reported() -> "Iterator[Callable[[Progress], None]]":
    """What takes reports of a run: a bar where stderr is a terminal, otherwise a line for each."""
    if not sys.stderr.isatty():
        yield say
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.description}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preparing rows", total=None)

        def show(progress: "Progress") -> None:
            said = f"loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s"
            bar.update(task, total=progress.steps, completed=progress.step, description=said)

        yield show


def say(progress: "Progress", name: str = "") -> None:
    """A line on stderr for a report of a run."""
    typer.echo(
        f"{name}step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, "
        f"{progress.tokens_per_second:,.0f} tokens a second, {progress.seconds_left / 60:.0f} minutes left",
        err=True,
    )
