"""`guard audit sample`: turns of an audit for people to judge, with a sheet to do it on."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from guard.cli import options

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of an audit.", exists=True, file_okay=False)]


def sample(
    out: Out,
    size: Annotated[int, typer.Option(help="How many turns are drawn.", min=1)] = 400,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Also tell apart: language, source, policy or day.", show_default=False),
    ] = None,
    only: Annotated[
        Literal["allow", "flag", "redirect", "block"] | None,
        typer.Option(help="Only turns with this action; recall needs all.", show_default=False),
    ] = None,
    category: Annotated[str, typer.Option(help="Only turns that violate it.", show_default=False)] = "",
    to: Annotated[Path | None, typer.Option(help="Directory for the sheet.", show_default="OUT/review")] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Show what was said, from the inputs if need be; else only where.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Another one draws other turns.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a sheet that is there.")] = False,
) -> None:
    """Draw judged turns for people to label, so that few labels tell precision and recall. Needs the extra `audit`.

    The same OUT and seed give the same sample. The sheet shows neither scores nor verdicts: sheet.html in a browser,
    or sheet.csv in a spreadsheet, whose `label` is harmless, harmful or unsure. `guard audit agree` reads it back.
    """
    with options.extra("drawing a sample", "audit"):
        from guard.audit.output import read_facts
        from guard.audit.read import read_again
        from guard.audit.review.sample import draw, texts_of
        from guard.audit.review.sheet import write_review
        from guard.audit.review.strata import Choice
    from guard.types import Action

    facts = read_facts(out)
    choice = Choice(size, seed, tuple(by or ()), Action[only.upper()] if only else None, category)
    texts = (texts_of(out) if facts["with_text"] else read_again(facts, out)) if with_text else None
    drawn = draw(out, choice, texts)
    review = to or out / "review"
    write_review(review, drawn, facts, force=force)
    typer.echo(f"{len(drawn.cases):,} of {drawn.turns:,} judged turns, from {len(drawn.weights)} strata")
    if drawn.left_out:
        typer.echo(f"note: {drawn.left_out:,} turns are left out: no model scored them, or no threshold is for them")
    if not with_text:
        typer.echo("note: the sheet says where turns stand, not what they say; --with-text shows it")
    typer.echo(f"written: {review / 'sheet.html'}, {review / 'sheet.csv'}")
