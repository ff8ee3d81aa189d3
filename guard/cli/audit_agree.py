"""`guard audit agree`: what people say of a sample, and what that tells of the policy and its thresholds."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guard.cli import options, render
from guard.cli.audit_proposal import Asked, Proposal, propose, put
from guard.cli.audit_sample import Out
from guard.errors import ConfigError, InputError
from guard.types import Action, Role

if TYPE_CHECKING:
    from guard.audit.review.agree import Agreement
    from guard.audit.review.estimate import Share
    from guard.training.fit import Target

Row = Sequence[str]
Table = tuple[Row, list[Row]]
"""A heading and rows."""


def agree(
    out: Out,
    sheets: Annotated[list[Path], typer.Argument(metavar="SHEET...", help="Filled-in sheets, one of each reviewer.")],
    review: Annotated[
        Path | None, typer.Option("--from", help="Where the sample was written.", show_default="OUT/review")
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Propose thresholds that this share of harmless turns reaches.")
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(help="Propose thresholds that this share of a category's turns reaches.")
    ] = None,
    policy: Annotated[str, typer.Option(help="Whose thresholds, where rows name theirs.", show_default=False)] = "",
    category: Annotated[
        str | None,
        typer.Option(help="Only its thresholds; harmful without a kind is about it.", show_default=False),
    ] = None,
    role: Annotated[
        Literal["user", "agent", "system", "tool"] | None, typer.Option(help="Only of its turns.", show_default=False)
    ] = None,
    action: Annotated[
        Literal["flag", "redirect", "block"] | None,
        typer.Option(help="Which threshold; by default the strictest that a role has.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what agreement.json holds.")] = False,
) -> None:
    """Tell from labels how right the audited policy is: precision, recall, and what thresholds would do better.

    Rates are of all audited turns, not of the sample; intervals are of 95 %. Blank and unsure labels are left out, and
    of several reviewers most are right. Proposals need the extra `train`; the others `audit`. Writes agreement.json and
    agreement.md beside the sheet, and labels.jsonl for `guard policy fit` where it holds texts.
    """
    with options.extra("reading a review", "audit"):
        from guard.audit.output import read_facts
        from guard.audit.review.agree import Reviewed
        from guard.audit.review.agree import agree as told_by
        from guard.audit.review.sheet import read_key, read_labels

    targets: list[Target] = [("max_fpr", max_fpr)] if max_fpr is not None else []
    targets += [("min_recall", min_recall)] if min_recall is not None else []
    if len(targets) > 1:
        raise ConfigError("expected either --max-fpr or --min-recall, found both")
    for kind, share in targets:
        if not 0 < share < 1:
            raise InputError(kind.replace("_", "-"), f"should lie between 0 and 1, found {share:g}")
    if len(set(sheets)) < len(sheets):
        raise ConfigError("a sheet is given twice; each is one reviewer's")
    facts, folder = read_facts(out), review or out / "review"
    sample = read_key(folder)
    reviewed = Reviewed(sample, [read_labels(path, sample, facts) for path in sheets])
    agreement = told_by(reviewed, facts)
    proposal = None
    if targets:
        of = Action[action.upper()] if action else None
        asked = Asked(targets[0], policy, category, Role(role) if role else None, of)
        proposal = propose(reviewed, facts, asked, folder / "labels.jsonl")
    found = agreement.as_json() | ({"proposal": proposal.as_json()} if proposal else {})
    _write(folder, found, _markdown(agreement, proposal))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(agreement, proposal, folder)


def _summary(agreement: "Agreement") -> Iterator[str]:
    left = {"unsure": agreement.unsure, "blank": agreement.blank, "with as many for as against": agreement.ties}
    said = ", ".join(f"{count} {what}" for what, count in left.items() if count)
    yield (
        f"{agreement.labelled} turns are labelled, {agreement.harmful} of them harmful"
        + f"; left out: {said}" * bool(said)
    )
    if agreement.agreeing is not None:
        told = "" if agreement.alpha is None else f"; Krippendorff's alpha {agreement.alpha:.2f}"
        yield f"{len(agreement.reviewers)} reviewers agree on {agreement.agreeing:.0%} of {agreement.shared}{told}"


def _tables(agreement: "Agreement") -> Iterator[Table]:
    yield (
        ("decision", "role", "precision (95 %)", "recall (95 %)", "FPR (95 %)"),
        [
            (
                one.decision,
                one.role or "all",
                _share(one.rates.precision),
                _share(one.rates.recall),
                _share(one.rates.fpr),
            )
            for one in agreement.about
        ],
    )
    yield (
        ("score of unsafe", "mean", "harmful (95 %)"),
        [(f"from {band.begins:g}", f"{band.score:.2%}", _share(band.harmful)) for band in agreement.bands],
    )


def _thresholds(proposal: Proposal) -> Table:
    rows: list[Row] = [
        (
            one.category,
            one.role.value,
            one.action.name.lower(),
            f"{one.before:.4g}",
            f"{one.threshold:.4g}",
            _share(rates.fpr),
            _share(rates.recall),
        )
        for one, rates in proposal.fitted
    ]
    return ("category", "role", "action", "was", "proposed", "FPR (95 %)", "recall (95 %)"), rows


def _share(share: "Share | None") -> str:
    """In per cent, and by how many labels."""
    if share is None:
        return "–"
    low, high = share.interval
    return f"{share.value:.2%} ({100 * low:.2f} – {100 * high:.2f}) by {share.rows}"


def _show(agreement: "Agreement", proposal: Proposal | None, folder: Path) -> None:
    console = render.terminal()

    def show(table: Table) -> None:
        heading, rows = table
        shown = render.columns(*heading)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)

    for line in _summary(agreement):
        console.print(line, soft_wrap=True)
    for table in _tables(agreement):
        show(table)
    for note in (*agreement.notes, *(proposal.notes if proposal else ())):
        console.print(f"note: {note}", soft_wrap=True)
    if proposal and proposal.fitted:
        show(_thresholds(proposal))
    if proposal and proposal.command:
        console.print(f"to write them into the policy: {proposal.command}", soft_wrap=True)
    elif proposal and proposal.fitted:
        console.print("note: labels for `guard policy fit` need texts: draw the sample --with-text", soft_wrap=True)
    console.print(f"written: {folder / 'agreement.md'}, {folder / 'agreement.json'}", soft_wrap=True)


def _markdown(agreement: "Agreement", proposal: Proposal | None) -> str:
    def lines() -> Iterator[str]:
        yield f"# Review of sample {agreement.sheet}"
        yield from _summary(agreement)
        yield from map(_table, _tables(agreement))
        yield from agreement.notes
        if proposal:
            yield "## Proposed thresholds"
            yield from [_table(_thresholds(proposal))] if proposal.fitted else []
            yield from proposal.notes
            yield from [f"`{proposal.command}`"] if proposal.command else []

    return "\n\n".join(lines()) + "\n"


def _table(table: Table) -> str:
    heading, rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows))


def _write(folder: Path, found: dict[str, object], page: str) -> None:
    put(folder / "agreement.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    put(folder / "agreement.md", page)
