"""`guard calibrate` and `guard quantize`: a model directory fitted to one's own rows, or made fit for int8."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import options
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.training.data import Example

Data = Annotated[list[Path], typer.Argument(help="Labelled rows, as `guard evaluate` takes them.")]
Model = Annotated[Path | None, typer.Option(help="Directory of a model; by default the embedded one.")]
Out = Annotated[Path, typer.Option(help="Where the new model directory goes.")]


def calibrate(
    data: Data,
    out: Out,
    model: Model = None,
    prior: Annotated[
        float | None,
        typer.Option(
            help="Share of unsafe turns where the model will serve; by default that among the rows.",
            min=0.0001,
            max=0.9999,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fit a model's probabilities and thresholds to labelled rows. Needs the extra `train`.

    Use rows that the model was not trained on. Unsafe ones that do not say which kind of harm they are fit the overall
    score alone.
    """
    pipeline, source, examples = _prepare(data, model, out)
    typer.echo(json.dumps(pipeline.recalibrate(source, examples, out, prior)["unsafe"]))


def quantize(data: Data, out: Out, model: Model = None) -> None:
    """Make a model fit for products of int8, and measure on labelled rows whether it is. Needs the extra `train`.

    It is served so only if its AUPRC falls by at most 0.003 and at most 1 % of its verdicts change. A Llama Guard
    checkpoint as Hugging Face has it will do, and a new directory of its kind comes of it.
    """
    pipeline, source, examples = _prepare(data, model, out)
    typer.echo(json.dumps(pipeline.quantise(source, examples, out)))


def _prepare(data: list[Path], model: Path | None, out: Path) -> "tuple[Any, Path, list[Example]]":
    from guard.settings import Settings

    with options.extra("calibrating or quantising"):
        from guard.training import formats, pipeline
    source = model or Settings().model
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out}: is the model to start from")
    return pipeline, source, [example for path in data for example in formats.read_examples(path)]
