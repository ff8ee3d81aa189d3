"""Thresholds that a review proposes: fitted to its labels as `guard policy fit` does, from logged scores."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guard.cli import options
from guard.errors import ConfigError, InputError
from guard.types import Action, Role

if TYPE_CHECKING:
    from guard.audit.review.agree import Reviewed
    from guard.audit.review.estimate import Rates
    from guard.audit.review.strata import Facts
    from guard.policy.compile import Policy
    from guard.training.data import Example
    from guard.training.fit import Fitted, Target


@dataclass(frozen=True, slots=True)
class Asked:
    """What thresholds are to keep to, and which are asked for; a policy is named where the audit has several."""

    target: "Target"
    policy: str = ""
    category: str | None = None
    role: Role | None = None
    action: Action | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Thresholds, and what each then does to all audited turns. `command` is empty where no texts are there."""

    fitted: "tuple[tuple[Fitted, Rates], ...]"
    notes: tuple[str, ...]
    command: str

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
            for one, rates in self.fitted
        ]
        return {"thresholds": thresholds, "notes": self.notes, "command": self.command}


def propose(reviewed: "Reviewed", facts: "Facts", asked: Asked, rows: Path) -> Proposal:
    """Writes the labelled conversations to `rows`, where there are texts. Raises ConfigError and InputError."""
    with options.extra("proposing thresholds"):
        from guard.training import fit as fitting
    from guard.audit.review.agree import scores_of

    policy = _policy(reviewed, facts, asked)
    chosen = dict(_examples(reviewed, policy, asked.category))
    examples = list(chosen.values())
    scores = [scores_of(reviewed.cases[place]) for place in chosen]
    fitted: list[Fitted] = []
    notes = list[str]()
    for one, role in _each(policy, asked):
        try:
            found, said = fitting.fit(
                one, examples, scores, asked.target, category=asked.category, role=role, action=asked.action
            )
        except ConfigError as error:  # the others stand
            found, said = [], [str(error)]
        fitted += found
        notes += said
    command = ""
    if examples and all(example.id for example in examples):
        _write_rows(rows, examples)
        command = _command(policy, asked, rows)
    categories = {one.name: one for one in policy.categories}
    meant = asked.category is not None
    rates = [reviewed.reaching(categories[one.category], one.role, one.threshold, meant=meant) for one in fitted]
    return Proposal(tuple(zip(fitted, rates, strict=True)), tuple(dict.fromkeys(notes)), command)


def _policy(reviewed: "Reviewed", facts: "Facts", asked: Asked) -> "Policy":
    from guard.audit.review.agree import policy_of
    from guard.policy.messages import one_of

    if not reviewed.sample.is_whole:
        raise ConfigError("thresholds need a sample of all turns, drawn without --only and --category")
    names = sorted(facts["policies"])
    if (asked.policy or len(names) > 1) and asked.policy not in names:
        raise InputError("policy", one_of(names, asked.policy or None))
    policy = policy_of(facts, asked.policy or names[0])
    categories = sorted(one.name for one in policy.categories)
    if asked.category is not None and asked.category not in categories:
        raise InputError("category", one_of(categories, asked.category))
    return policy


def _command(policy: "Policy", asked: Asked, rows: Path) -> str:
    kind, share = asked.target
    words = ["guard", "policy", "fit", f"{policy.name}.yaml", str(rows), f"--{kind.replace('_', '-')}", f"{share:g}"]
    action = asked.action and asked.action.name.lower()
    given = {"--category": asked.category, "--role": asked.role, "--action": action}
    return shlex.join([*words, *(word for option, value in given.items() if value for word in (option, value))])


def _each(policy: "Policy", asked: Asked) -> "Iterator[tuple[Policy, Role]]":
    """The policy with one of its categories at a time, and each of the roles that the category judges."""
    for one in policy.categories:
        for judged in one.thresholds:
            if asked.category in (None, one.name) and asked.role in (None, judged):
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
    put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def put(path: Path, text: str) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
