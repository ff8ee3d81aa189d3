"""`guard audit agree`: what people say of a sample, and what that tells of the policy and its thresholds."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guard.cli import options, render
from guard.cli.audit_sample import Out
from guard.errors import ConfigError, InputError

if TYPE_CHECKING:
    from guard.audit.agree import Agreement, Reviewed
    from guard.audit.estimate import Share
    from guard.audit.strata import Facts
    from guard.policy.compile import Policy
    from guard.training.data import Example
    from guard.training.fit import Fitted, Target
    from guard.types import Role

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
        from guard.audit.agree import Reviewed
        from guard.audit.agree import agree as told_by
        from guard.audit.sample import read_facts
        from guard.audit.sheet import read_key, read_labels

    targets: list[Target] = [("max_fpr", max_fpr)] if max_fpr is not None else []
    targets += [("min_recall", min_recall)] if min_recall is not None else []
    if len(targets) > 1:
        raise ConfigError("expected either --max-fpr or --min-recall, found both")
    for kind, share in targets:
        if not 0 < share < 1:
            raise InputError(kind.replace("_", "-"), f"should lie between 0 and 1, found {share:g}")
    facts, folder = read_facts(out), review or out / "review"
    sample = read_key(folder)
    reviewed = Reviewed(sample, [read_labels(path, sample, facts) for path in sheets])
    agreement = told_by(reviewed, facts)
    proposal = (
        _Proposal(reviewed, facts, policy, targets[0], category, role, action, folder / "labels.jsonl")
        if targets
        else None
    )
    found = agreement.as_json() | ({"proposal": proposal.as_json()} if proposal else {})
    _write(folder, found, _markdown(agreement, proposal))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(agreement, proposal, folder)


class _Proposal:
    """Thresholds that keep to a target on the labels, and what they then do to all audited turns."""

    def __init__(
        self,
        reviewed: "Reviewed",
        facts: "Facts",
        name: str,
        target: "Target",
        category: str | None,
        role: str | None,
        action: str | None,
        labels: Path,
    ) -> None:
        with options.extra("proposing thresholds"):
            from guard.training import fit as fitting
        from guard.audit.agree import policy_of, scores_of
        from guard.policy.messages import one_of
        from guard.types import Action, Role

        if not reviewed.sample.is_whole:
            raise ConfigError("thresholds need a sample of all turns, drawn without --only and --category")
        names = sorted(facts["policies"])
        if (name or len(names) > 1) and name not in names:
            raise InputError("policy", one_of(names, name or None))
        policy = policy_of(facts, name or names[0])
        if category is not None and category not in facts["policies"][policy.name]["categories"]:
            raise InputError("category", one_of(sorted(facts["policies"][policy.name]["categories"]), category))
        chosen = dict(_examples(reviewed, policy, category))
        examples = list(chosen.values())
        scores = [scores_of(reviewed.cases[place]) for place in chosen]
        self.fitted: list[Fitted] = []
        notes = list[str]()
        for one, judged in _asked(policy, category, Role(role) if role else None):
            of = Action[action.upper()] if action else None
            try:
                fitted, said = fitting.fit(one, examples, scores, target, category=category, role=judged, action=of)
            except ConfigError as error:  # the others stand
                fitted, said = [], [str(error)]
            self.fitted += fitted
            notes += said
        self.notes = list(dict.fromkeys(notes))
        categories = {one.name: one for one in policy.categories}
        self.rates = [
            reviewed.reaching(categories[one.category], one.role, one.threshold, meant=category is not None)
            for one in self.fitted
        ]
        self.command = ""
        if examples and all(len(example.conversation.turns) and example.id for example in examples):
            _write_rows(labels, examples)
            given = {"--category": category, "--role": role, "--action": action}
            more = [word for option, value in given.items() if value for word in (option, value)]
            words = ["guard", "policy", "fit", f"{policy.name}.yaml", str(labels)]
            self.command = shlex.join([*words, f"--{target[0].replace('_', '-')}", f"{target[1]:g}", *more])

    def as_json(self) -> dict[str, object]:
        thresholds = [
            {
                "category": one.category,
                "role": one.role.value,
                "action": one.action.name.lower(),
                "was": one.before,
                "threshold": one.threshold,
                "rates": asdict(rates),
            }
            for one, rates in zip(self.fitted, self.rates, strict=True)
        ]
        return {"thresholds": thresholds, "notes": self.notes, "command": self.command}

    def table(self) -> Table:
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
            for one, rates in zip(self.fitted, self.rates, strict=True)
        ]
        return ("category", "role", "action", "was", "proposed", "FPR (95 %)", "recall (95 %)"), rows


def _asked(policy: "Policy", category: str | None, role: "Role | None") -> "Iterator[tuple[Policy, Role]]":
    """The policy with one of its categories at a time, and each of the roles that the category judges."""
    for one in policy.categories:
        for judged in one.thresholds:
            if category in (None, one.name) and role in (None, judged):
                own = {name: head for name, head in policy.own.items() if name == one.name}
                yield replace(policy, categories=(one,), own=own), judged


def _examples(reviewed: "Reviewed", policy: "Policy", category: str | None) -> "Iterator[tuple[int, Example]]":
    """Labelled cases that `guard policy fit` takes, by their place; without an id where there is no text.

    For a category of the policy's own a label is about that one; for others, harm of that kind alone says nothing.
    """
    from guard.training.data import Example
    from guard.types import HAZARDS, Conversation, Turn

    own = category if category in policy.own else None
    for place, (case, label) in enumerate(zip(reviewed.cases, reviewed.labels, strict=True)):
        hazards = label.kinds.intersection(HAZARDS)
        is_other = own not in label.kinds if own else not hazards
        if case.policy != policy.name or (label.harmful and label.kinds and is_other):
            continue
        turns = case.turns or (Turn(case.role, ""),)
        yield (
            place,
            Example(
                f"case-{case.number}" if case.turns else "",
                "review",
                case.language or "und",
                Conversation(turns, len(turns) - 1),
                bool(label.harmful),
                None if label.harmful and (own or not hazards) else hazards,
                weight=float(reviewed.strata.weights[place]),
            ),
        )


def _write_rows(path: Path, examples: "Sequence[Example]") -> None:
    rows = [
        {
            "messages": [{"role": turn.role.value, "content": turn.text} for turn in example.conversation.turns],
            "label": int(example.unsafe),
            "lang": example.lang,
            "categories": sorted(example.hazards or ()),
            "weight": round(example.weight, 6),
        }
        for example in examples
    ]
    _put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def _share(share: "Share | None") -> str:
    """In per cent, and by how many labels."""
    if share is None:
        return "–"
    low, high = share.interval
    return f"{share.value:.2%} ({100 * low:.2f} – {100 * high:.2f}) by {share.rows}"


def _show(agreement: "Agreement", proposal: _Proposal | None, folder: Path) -> None:
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
        show(proposal.table())
    if proposal and proposal.command:
        console.print(f"to write them into the policy: {proposal.command}", soft_wrap=True)
    elif proposal and proposal.fitted:
        console.print("note: labels for `guard policy fit` need texts: draw the sample --with-text", soft_wrap=True)
    console.print(f"written: {folder / 'agreement.md'}, {folder / 'agreement.json'}", soft_wrap=True)


def _markdown(agreement: "Agreement", proposal: _Proposal | None) -> str:
    def lines() -> Iterator[str]:
        yield f"# Review of sample {agreement.sheet}"
        yield from _summary(agreement)
        yield from map(_table, _tables(agreement))
        yield from agreement.notes
        if proposal:
            yield "## Proposed thresholds"
            yield from [_table(proposal.table())] if proposal.fitted else []
            yield from proposal.notes
            yield from [f"`{proposal.command}`"] if proposal.command else []

    return "\n\n".join(lines()) + "\n"


def _table(table: Table) -> str:
    heading, rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows))


def _write(folder: Path, found: dict[str, object], page: str) -> None:
    _put(folder / "agreement.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    _put(folder / "agreement.md", page)


def _put(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
