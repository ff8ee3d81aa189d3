"""`guard policy replay` and `guard policy diff`: what policies say about yesterday's verdicts, without a model."""

import html
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.policy import Model, Named, calibration, load
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.policy.replay import Report

Log = Annotated[list[Path], typer.Option("--on", metavar="LOG", help="A decision log; more of them may follow.")]
More = Annotated[list[Path] | None, typer.Argument(metavar="[LOG]...", show_default=False)]
Only = Annotated[
    str, typer.Option("--policy", metavar="NAME", help="Only what a policy of this name judged.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write the report there.", show_default=False)
]

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
td.ids {{ font: 12px monospace; color: #666; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
{notes}
<table>
<thead><tr><th>about<th>role<th>before<th>after<th>verdicts<th>share<th>some of them</thead>
{rows}
</table>
</html>
"""


def replay(
    policy: Named,
    on: Log,
    more: More = None,
    only: Only = "",
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Judge logged verdicts again under a policy, from their scores and without a model.

    Exits with 1 where a verdict that was logged under this very revision does not come out as it was logged.
    """
    from guard.policy.replay import replay

    logs = [*on, *(more or ())]
    served = load(policy, calibration(model))
    with _progress(logs) as done:
        report = replay(served, logs, only, done)
    summary = (
        f"{served.name} {served.revision}, {report.turns.total():,} verdicts: {report.same:,} of this revision, "
        f"{report.differing.count:,} of them differ from what was logged"
    )
    _print(summary, report, as_json)
    if report.differing.count:
        typer.echo(f"error: not replayed as logged: {' '.join(report.differing.ids)} …", err=True)
        raise typer.Exit(1)


def diff(
    old: Named,
    new: Named,
    on: Log,
    more: More = None,
    only: Only = "",
    model: Model = None,
    page: Html = None,
    as_json: Json = False,
) -> None:
    """Tell what a policy would change: logged turns judged under OLD and under NEW, from their scores.

    Each line is a change of the verdict, of a category or of a rule, for turns of a role; its share is that of all
    verdicts on turns of this role.
    """
    from guard.policy.replay import diff

    logs = [*on, *(more or ())]
    measured = calibration(model)
    before, after = load(old, measured), load(new, measured)
    with _progress(logs) as done:
        report = diff(before, after, logs, only, done)
    flipped = sum(found.count for change, found in report.changes.items() if change.about == "verdict")
    summary = (
        f"{before.name} {before.revision} → {after.name} {after.revision}: "
        f"{flipped:,} of {report.turns.total():,} verdicts change"
    )
    if page:
        try:
            page.write_text(_html(summary, report), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{page}: cannot be written: {error.strerror}") from None
    _print(summary, report, as_json)


def _progress(logs: list[Path]) -> AbstractContextManager[Callable[[], None]]:
    from guard.cli.progress import progress

    return progress("logs", len(logs))


def _print(summary: str, report: "Report", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_json(report), indent=2, ensure_ascii=False))
        return
    from guard.cli import render

    console = render.terminal()
    console.print(summary, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if report.changes:
        table = render.columns("about", "role", "before", "after", "verdicts", "share", "for example")
        for change, found, share in report.by_size():
            table.add_row(*change, f"{found.count:,}", f"{share:.3%}", found.ids[0])
        console.print(table)


def _as_json(report: "Report") -> dict[str, object]:
    return {
        "verdicts": dict(report.turns),
        "same_revision": report.same,
        "differing": {"count": report.differing.count, "ids": report.differing.ids},
        "notes": report.notes,
        "changes": [
            {**change._asdict(), "count": found.count, "share": share, "ids": found.ids}
            for change, found, share in report.by_size()
        ],
    }


def _html(title: str, report: "Report") -> str:
    rows = [
        "<tr>"
        + "".join(f"<td>{html.escape(word)}" for word in change)
        + f'<td class="number">{found.count:,}<td class="number">{share:.3%}'
        + f'<td class="ids">{html.escape(" ".join(found.ids))}'
        for change, found, share in report.by_size()
    ]
    notes = [f"<p>{html.escape(note)}</p>" for note in report.notes]
    return _PAGE.format(title=html.escape(title), notes="\n".join(notes), rows="\n".join(rows))
