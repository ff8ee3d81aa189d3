"""Answers as a terminal shows them, and as JSON; whether they came from a server or from this process."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from guard.types import HAZARDS
from guard.v1 import admin_pb2 as admin_pb
from guard.v1 import moderation_pb2 as pb

Checked = pb.CheckResponse | pb.CheckConversationResponse

_STYLES = {
    pb.ACTION_ALLOW: "green",
    pb.ACTION_FLAG: "yellow",
    pb.ACTION_REDIRECT: "magenta",
    pb.ACTION_BLOCK: "bold red",
}
_LEVELS = (pb.ACTION_FLAG, pb.ACTION_REDIRECT, pb.ACTION_BLOCK)
_NOT_PASSING = {pb.ACTION_REDIRECT, pb.ACTION_BLOCK}
_BAR = 16  # cells of a score of 1
_EIGHTHS = ("", *"▏▎▍▌▋▊▉")
_LEAST = 0.01  # a hazard below it is not worth a line
_MOST = 5  # lines of hazards


def terminal() -> Console:
    """Standard output; in colours, and as wide as it is, where it is a terminal."""
    return Console(markup=False, highlight=False, emoji=False)


def print_json(message: Message) -> None:
    sys.stdout.write(to_json(message) + "\n")


def to_json(message: Message, indent: int | None = 2) -> str:
    """Protobuf's JSON mapping, with the fields that hold their default; the same for the same message."""
    return MessageToJson(message, indent=indent, always_print_fields_with_no_presence=True, sort_keys=True)


@contextmanager
def progress() -> Iterator[Callable[[], None]]:
    """A line on stderr, where that is a terminal and stdout is not; what it gives is called for each answer."""
    columns = TextColumn("{task.completed:,} answered"), TimeElapsedColumn()
    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False, disable=not shown) as bar:
        task = bar.add_task("", total=None)
        yield lambda: bar.advance(task)


def answer(turns: Sequence[pb.Turn], response: Checked, as_json: bool) -> int:
    """Prints what was decided about `turns`. Returns 1 where any of them does not pass, else 0."""
    if as_json:
        print_json(response)
    else:
        _verdicts(turns, response)
    verdicts = [response.verdict] if isinstance(response, pb.CheckResponse) else response.verdicts
    return int(any(verdict.action in _NOT_PASSING for verdict in verdicts))


def _verdicts(turns: Sequence[pb.Turn], response: Checked) -> None:
    """One verdict in full, or one line for each of several."""
    console = terminal()
    if isinstance(response, pb.CheckResponse):
        verdict = response.verdict
        console.print(_action(verdict.action), _role_name(turns[verdict.turn].role), "turn")
        if verdict.HasField("reply"):
            console.print(Text(f"{verdict.reply.name}: {verdict.reply.text}", _STYLES[verdict.action]), soft_wrap=True)
        for caveat in _caveats(verdict):
            console.print(caveat)
        console.print(_scores(verdict))
    else:
        console.print(_turns(turns, response.verdicts))
    provenance, timings = response.provenance, response.timings
    console.print(
        f"policy {provenance.policy} {provenance.policy_revision:.12}, "
        f"model {provenance.model} {provenance.model_revision:.12}\n"
        f"queue {timings.queue_ms:.1f} ms, tokenise {timings.tokenise_ms:.1f} ms, model {timings.model_ms:.1f} ms\n"
        f"decision {response.decision_id}",
        style="dim",
        soft_wrap=True,
    )


class Streamed:
    """A turn while it is written: green what may be shown, dim what is not judged, red what was cut; and its scores.

    On a terminal the same lines change, elsewhere each verdict is a line of its own.
    """

    def __init__(self) -> None:
        self._console = terminal()
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, text: str, response: pb.CheckStreamResponse) -> None:
        if not self._console.is_terminal:
            self._line(response)
            return
        end = response.cut.offset if response.HasField("cut") else response.release
        shown = Text(text[: response.release], "green")
        shown.append(text[response.release : end], "strike bold red").append(text[end:], "dim")
        parts: list[Text | Table] = [shown]
        if response.HasField("verdict"):
            parts += [_action(response.verdict.action), *_caveats(response.verdict), _scores(response.verdict)]
            if response.verdict.HasField("reply"):
                parts.append(Text(response.verdict.reply.text, _STYLES[response.verdict.action]))
        self._live.update(Group(*parts), refresh=True)

    def _line(self, response: pb.CheckStreamResponse) -> None:
        if not response.HasField("verdict"):
            return
        verdict = response.verdict
        cut = f"cut at {response.cut.offset}" if response.HasField("cut") else ""
        score = f"{verdict.scores.unsafe:.3f}" if verdict.HasField("scores") else ""
        self._console.print(f"{response.judged:>6} judged", _action(verdict.action), score, cut)


def model(response: pb.GetModelResponse) -> None:
    """What is served and how it runs."""
    table = columns("", "")
    table.add_row("model", f"{response.name} {response.revision}")
    table.add_row("parameters", f"{response.parameters:,}")
    table.add_row("longest input", f"{response.max_tokens:,} tokens")
    table.add_row("runs on", f"{response.device}, {response.dtype}, {response.kernels}")
    table.add_row("hazards", ", ".join(map(_hazard, response.hazards)))
    terminal().print(table)


def policies(response: pb.ListPoliciesResponse) -> None:
    """The policies in force, and from which score on each of them acts."""
    console = terminal()
    for policy in response.policies:
        default = ", the default" if policy.name == response.default_policy else ""
        table = columns("category", "role", "flag", "redirect", "block", "hazards")
        for category in policy.categories:
            for role, thresholds in _by_role(category.thresholds):
                levels = [thresholds.get(action, "") for action in _LEVELS]
                table.add_row(category.name, role, *levels, " ".join(category.hazards) or "unsafe")
        console.print(Text(policy.name, style="bold"), f"{policy.revision}{default}. {policy.description}")
        console.print(table)


def flips(candidate: admin_pb.Candidate) -> Table:
    """What a candidate changes."""
    table = columns("about", "live", "candidate", "verdicts", "share")
    for flip in candidate.flips:
        share = flip.count / candidate.verdicts
        table.add_row(flip.about, _action(flip.live), _action(flip.candidate), f"{flip.count:,}", f"{share:.3%}")
    return table


def _scores(verdict: pb.Verdict) -> Table:
    """The thresholds that were reached, then the scores that matter, highest first."""
    table = columns("", "score", "", "threshold", "action")
    for violation in verdict.violations:
        if violation.rule:
            table.add_row(_what(violation), "", "", "", _action(violation.action))
        else:
            score = _score(violation.score, _STYLES[violation.action])
            table.add_row(_what(violation), *score, f"≥ {violation.threshold:.2f}", _action(violation.action))
    if verdict.violations:
        table.add_row()
    if verdict.HasField("scores"):
        table.add_row("unsafe", *_score(verdict.scores.unsafe))
        highest = sorted(verdict.scores.hazards.items(), key=lambda item: -item[1])[:_MOST]
        for code, hazard in highest:
            if hazard >= _LEAST:
                table.add_row(f"{code:<3} {HAZARDS.get(code, '')}", *_score(hazard))
    return table


def _turns(turns: Sequence[pb.Turn], verdicts: Iterable[pb.Verdict]) -> Table:
    table = columns("turn", "", "unsafe", "", "action", "violations")
    for verdict in verdicts:
        role = _role_name(turns[verdict.turn].role)
        score = _score(verdict.scores.unsafe) if verdict.HasField("scores") else ("", "")
        violations = [
            _what(violation) if violation.rule else f"{_what(violation)} {violation.score:.3f}"
            for violation in verdict.violations
        ]
        remarks = "; ".join([*violations, *map(str, _caveats(verdict))])
        table.add_row(str(verdict.turn), role, *score, _action(verdict.action), remarks)
    return table


def columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=any(names), header_style="dim")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _action(action: pb.Action.ValueType) -> Text:
    return Text(pb.Action.Name(action).removeprefix("ACTION_").lower(), style=_STYLES[action])


def _what(violation: pb.Violation) -> str:
    """A category, or a rule and the category that it counts as."""
    if not violation.rule:
        return violation.category
    return f"rule {violation.rule}" + (f" ({violation.category})" if violation.category else "")


def _role_name(role: pb.Role.ValueType) -> str:
    return pb.Role.Name(role).removeprefix("ROLE_").lower()


def _hazard(hazard: pb.Hazard) -> str:
    """A category of the model's own has no other title than its name."""
    return hazard.code if hazard.title == hazard.code else f"{hazard.code} {hazard.title}"


def _score(score: float, style: str = "cyan") -> tuple[str, Text]:
    eighths = round(score * _BAR * 8)
    bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
    return f"{score:.3f}", Text(bar.ljust(_BAR), style)


def _caveats(verdict: pb.Verdict) -> Iterator[Text]:
    """What a reader must know before trusting the verdict."""
    if verdict.degraded:
        yield Text("degraded: the model could not answer, the policy's on_error or a rule decided", "magenta")
    if verdict.shadow:
        yield Text("shadow: the policy allows everything, and tells what it found", "magenta")
    coverage = verdict.coverage
    if coverage.seen < coverage.total:
        yield Text(f"the model saw {coverage.seen:,} of {coverage.total:,} tokens", "magenta")


def _by_role(thresholds: Iterable[pb.Threshold]) -> Iterable[tuple[str, Mapping[pb.Action.ValueType, str]]]:
    roles: dict[str, dict[pb.Action.ValueType, str]] = {}
    for threshold in thresholds:
        roles.setdefault(_role_name(threshold.role), {})[threshold.action] = f"{threshold.score:.2f}"
    return roles.items()
