"""`guard policy fit`: teaches a model a policy's own categories, and fits thresholds to labelled rows."""

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guard.cli import options, render
from guard.cli.policy import Model, calibration
from guard.cli.progress import progress
from guard.errors import ConfigError, InputError

if TYPE_CHECKING:
    from guard.policy.schema import PolicySpec
    from guard.training.data import Example
    from guard.training.fit import Fitted, Share, Target


def fit(
    policy: Annotated[Path, typer.Argument(help="The policy's file.", exists=True, dir_okay=False)],
    rows: Annotated[
        list[Path] | None,
        typer.Argument(help="Labelled rows to fit thresholds to: .jsonl or .csv, plain or .gz.", show_default=False),
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Share of harmless rows that may reach the threshold.", show_default=False)
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(help="Share of rows of the category that must reach it.", show_default=False)
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="Only this one; a label of 1 without categories is about it.", show_default=False),
    ] = None,
    role: Annotated[
        Literal["user", "agent", "system", "tool"] | None, typer.Option(help="Only turns of it.", show_default=False)
    ] = None,
    action: Annotated[
        Literal["flag", "redirect", "block"] | None,
        typer.Option(help="Which threshold to fit; by default the strictest that a role has.", show_default=False),
    ] = None,
    model: Model = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; show what would be written.")] = False,
) -> None:
    """Teach the model a policy's own categories, and fit thresholds to labelled rows. Needs the extra `train`.

    Categories with `examples` are learned into NAME_heads.safetensors beside the policy, where they are new or changed.
    With rows, as `guard evaluate` takes them, and --max-fpr or --min-recall, thresholds are fitted to them and written
    into the policy's file; overlays stay as they are. Intervals are of 95 %.
    """
    from guard.policy.compile import compile_policy
    from guard.policy.heads import heads_file, write_heads
    from guard.policy.messages import one_of
    from guard.policy.read import read_policy
    from guard.settings import Settings
    from guard.types import Action, Role

    target = _target(rows or [], max_fpr, min_recall)
    settings = Settings.load({"model": model}, os.environ)
    measured = calibration(settings.model)
    reading = read_policy(policy, measured)
    if category is not None and category not in reading.spec.categories:
        raise InputError("category", one_of(sorted(reading.spec.categories), category))
    with options.extra("fitting"):
        from guard.model.checkpoint import read_checkpoint
        from guard.training import fit as fitting
        from guard.training.served import served_under
    taught = fitting.teach(policy, reading.spec, reading.heads, read_checkpoint(settings.model))
    heads = {**reading.heads, **{name: head for name, (head, _) in taught.items()}}
    for name, (_, found) in taught.items():
        low, high = found["intervals"]["auprc"]
        typer.echo(
            f"{name}: learned from {found['positives']} of it and {found['rows'] - found['positives']} others; "
            f"AUPRC {found['auprc']:.3f} ({low:.3f} – {high:.3f}) on rows held out in turn"
        )
    if taught and not dry_run:
        write_heads(policy, {name: head for name, head in heads.items() if name in reading.spec.categories})
        typer.echo(f"written: {heads_file(policy)}")
    if target is None:
        if not taught:
            typer.echo("nothing to learn; thresholds are fitted to rows, with --max-fpr or --min-recall")
        return
    served = compile_policy(policy.stem, reading.spec, measured, heads, reading.examples)
    examples = _unseen(policy, reading.spec, _read(rows or []), category)
    with progress("scoring", len(examples)) as scored:
        scores = served_under(served, settings, examples, scored)
    fitted, notes = fitting.fit(
        served,
        examples,
        scores,
        target,
        category=category,
        role=Role(role) if role else None,
        action=Action[action.upper()] if action else None,
    )
    if not fitted and not notes:
        raise ConfigError("no threshold of the policy is asked for")
    if fitted:
        _show(fitted)
    for note in (*notes, *(_doubt(one, target) for one in fitted if _rows(one, target) < one.needed)):
        typer.echo(f"warning: {note}")
    _write(policy, reading.spec, fitted, dry_run=dry_run)


def _target(rows: list[Path], max_fpr: float | None, min_recall: float | None) -> "Target | None":
    given: list[Target] = []
    if max_fpr is not None:
        given.append(("max_fpr", max_fpr))
    if min_recall is not None:
        given.append(("min_recall", min_recall))
    if len(given) != bool(rows):
        raise ConfigError("thresholds need rows, and either --max-fpr or --min-recall")
    for kind, share in given:
        if not 0 < share < 1:
            raise InputError(kind.replace("_", "-"), f"should lie between 0 and 1, found {share:g}")
    return given[0] if given else None


def _read(rows: list[Path]) -> "list[Example]":
    from guard.training.formats import read_examples

    examples = [example for path in rows for example in read_examples(path)]
    if not examples:
        raise ConfigError(f"{', '.join(map(str, rows))}: there is no labelled row")
    return examples


def _unseen(policy: Path, spec: "PolicySpec", examples: "list[Example]", category: str | None) -> "list[Example]":
    """Without the examples that the category was learned from, whose scores promise too much."""
    from guard.training.formats import read_examples

    learned_from = category and spec.categories[category].examples
    if not learned_from or not policy.with_name(learned_from).exists():
        return examples
    seen = {example.conversation for example in read_examples(policy.with_name(learned_from))}
    unseen = [example for example in examples if example.conversation not in seen]
    if len(unseen) < len(examples):
        typer.echo(f"warning: {len(examples) - len(unseen)} rows are left out, as {category} was learned from them")
    if not unseen:
        raise ConfigError(f"{category} was learned from every row; thresholds need other ones")
    return unseen


def _show(fitted: "list[Fitted]") -> None:
    table = render.columns("category", "role", "action", "was", "now (95 %)", "FPR (95 %)", "recall (95 %)")
    for one in fitted:
        low, high = one.interval
        now = f"{one.threshold:.4g} ({low:.4g} – {high:.4g})"
        action = one.action.name.lower()
        table.add_row(one.category, one.role, action, f"{one.before:.4g}", now, _share(one.fpr), _share(one.recall))
    render.terminal().print(table)


def _share(share: "Share") -> str:
    """In per cent, and of how many."""
    if not share.rows:
        return "no rows"
    low, high = share.interval
    return f"{share.value:.2%} ({100 * low:.2f} – {100 * high:.2f}) of {share.rows}"


def _rows(one: "Fitted", target: "Target") -> int:
    return one.fpr.effective if target[0] == "max_fpr" else one.recall.effective


def _doubt(one: "Fitted", target: "Target") -> str:
    kind, share = target
    rows = _rows(one, target)
    least = 1 - 0.05 ** (1 / rows)  # what may still be, where it was never seen
    what, may = ("harmless rows", least) if kind == "max_fpr" else ("rows of it", 1 - least)
    says = f"a rate of {share:.3g}" if kind == "max_fpr" else f"a recall of {share:.3g}"
    return (
        f"{one.category} of {one.role} turns: {rows} {what} are too few for {says}, and tell at best "
        f"{may:.2g} with 95 % confidence; it takes {one.needed}"
    )


def _write(policy: Path, spec: "PolicySpec", fitted: "list[Fitted]", *, dry_run: bool) -> None:
    from guard.policy.edit import edited

    before, after = edited(policy, spec, {one.loc: one.threshold for one in fitted})
    for path, text in after.items():
        if dry_run:
            old, new = before[path].splitlines(keepends=True), text.splitlines(keepends=True)
            typer.echo("".join(difflib.unified_diff(old, new, str(path), str(path))), nl=False)
            continue
        try:
            path.write_text(text, encoding="utf-8", newline="")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        typer.echo(f"written: {path}")
