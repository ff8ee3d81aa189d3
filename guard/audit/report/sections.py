"""What the report of an audit says, section by section."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard.audit.report import charts
from guard.audit.report.blocks import Block, Chart, Heat, Quote, Section, Table, Value, Words, percent, plain
from guard.audit.report.cases import Case, Histogram
from guard.audit.report.finished import LEVELS
from guard.audit.report.flips import Flips
from guard.audit.report.intervals import Share
from guard.audit.report.rates import Rate
from guard.audit.report.summary import Summary
from guard.types import HAZARDS, Role

_FLIPS_SHOWN = 100
_SHARE = "share (95 % interval)"


def sections(summary: Summary) -> Iterator[Section]:
    yield _section("totals", "Totals", _totals(summary))
    yield _section("categories", "Categories", _categories(summary))
    yield _section("rates", "Who, where and when", _rates(summary))
    if summary.by_day:
        yield _section("days", "Days", _days(summary))
    yield _section("scores", "Scores", _scores(summary.histograms))
    yield _section("cases", "Cases to look at", _cases(summary))
    if summary.flips:
        yield _section("changes", "Changes under another policy", _changes(summary, summary.flips))
    yield _section("rejected", "Rejected rows", _rejected(summary))
    yield _section("in-force", "What was in force", _in_force(summary.in_force))
    yield _section("words", "What the words mean", _glossary())


def _section(name: str, title: str, blocks: Iterator[Block]) -> Section:
    return Section(name, title, tuple(blocks))


def _totals(summary: Summary) -> Iterator[Block]:
    turns, totals = summary.turns, summary.totals
    yield Table(
        ("turns", "count", "share (95 % interval)"),
        [
            *((action, turns.actions[action], Share.make(turns.actions[action], turns.turns)) for action in LEVELS),
            ("not allowed", turns.not_allowed.count, turns.not_allowed),
        ],
    )
    speed = f", {totals.turns_per_second:,} turns a second" if totals.turns_per_second else ""
    yield Table(
        ("in all", "count"),
        [
            ("conversations", totals.conversations),
            ("conversations with a turn that was not allowed", totals.conversations_not_allowed.count),
            ("turns", turns.turns),
            ("turns that the model could not answer (degraded)", turns.degraded),
            ("turns that the model was not shown wholly", turns.partly_seen),
            ("turns without a time", turns.without_time),
            ("rows that were rejected", totals.rejected),
            ("inputs that could not be read to the end", totals.incomplete),
            ("tokens that the model read", totals.tokens),
        ],
    )
    yield Words(f"The judging took {_duration(totals.seconds)}{speed}.")


def _categories(summary: Summary) -> Iterator[Block]:
    if not summary.by_category:
        yield Words("No turn violates any category.")
        return
    yield Words(
        "How many turns each category was found in, by the strictest action that follows from it. A turn may count in "
        "several categories. Shares are of all turns, whichever policy judged them."
    )
    levels = [level for level in LEVELS[1:] if level != "redirect" or any(one.redirect for one in summary.by_category)]
    yield Chart("Turns by category", {"": charts.categories(summary.by_category)})
    yield Table(
        ("category", "share of turns (95 % interval)", *levels),
        [
            (one.category or "no category", one.share, *(getattr(one, level) for level in levels))
            for one in summary.by_category
        ],
    )
    yield _matrix(summary)
    if summary.by_rule:
        yield Table(
            ("rule", "share of turns (95 % interval)", "category", *LEVELS[1:]),
            [
                (one.rule, one.share, one.category or "none", one.flag, one.redirect, one.block)
                for one in summary.by_rule
            ],
            "Rules that matched the text",
        )


def _matrix(summary: Summary) -> Table:
    shares = {(cell.category, cell.of): cell.share for cell in summary.category_by_role if cell.share}
    roles = [rate.name or "" for rate in summary.by_role]
    highest = max(share.share or 0 for share in shares.values())

    def heat(share: Share | None) -> Heat:
        return Heat(percent(share, interval=False), (share.share or 0) / highest) if share else Heat("–", 0)

    return Table(
        ("category", *roles),
        [
            (one.category or "no category", *(heat(shares.get((one.category, role))) for role in roles))
            for one in summary.by_category
        ],
        "By category and role, in % of the turns of that role",
    )


def _rates(summary: Summary) -> Iterator[Block]:
    yield Words(
        "How many of the turns were not allowed. The bar is the share, the thin line its interval. Where the intervals "
        "of two rows are apart, chance alone hardly explains the difference. Each table has a scale of its own."
    )
    for what, rates in (
        ("role", summary.by_role),
        ("policy", summary.by_policy),
        ("language", summary.by_language),
        ("source", summary.by_source),
    ):
        if [rate.name for rate in rates] == [""]:
            yield Words(f"By {what}: the inputs tell none.")
        elif rates:
            yield _rate_table(what, rates, f"By {what}")


def _rate_table(what: str, rates: Sequence[Rate], title: str, is_folded: bool = False) -> Table:
    return Table(
        (what, _SHARE, "not allowed", "turns"),
        [(_name(rate), rate.share, rate.share.count, rate.share.of) for rate in rates],
        title,
        is_folded,
    )


def _name(rate: Rate) -> str:
    if rate.name is None:
        return f"and {rate.names:,} other{'s' * (rate.names != 1)}"
    return rate.name or "not told"


def _days(summary: Summary) -> Iterator[Block]:
    dated = [rate for rate in summary.by_day if rate.name]
    if not dated:
        yield Words("The inputs tell no times.")
        return
    yield Words(
        "Days are those of UTC."
        + f" {summary.turns.without_time:,} turns tell no time." * bool(summary.turns.without_time)
    )
    if len(dated) > 1:
        yield Chart("Share of turns not allowed, by day", {"": charts.shares(dated)})
    if len(dated) > 1 and summary.category_by_day:
        days = [rate.name or "" for rate in dated]
        yield Chart("Violations by day and category", {"": charts.category_days(summary.category_by_day, days)})
        yield _day_matrix(summary, days)
    yield _rate_table("day", summary.by_day, "By day", len(dated) > 1)


def _day_matrix(summary: Summary, days: Sequence[str]) -> Table:
    turns = {(cell.of, cell.category): cell.turns for cell in summary.category_by_day}
    names = [one.category for one in summary.by_category]
    highest = max(turns.values())
    return Table(
        ("day", *(name or "no category" for name in names)),
        [
            (day, *(Heat(f"{turns.get((day, name), 0):,}", turns.get((day, name), 0) / highest) for name in names))
            for day in days
        ],
        "Turns by day and category",
        is_folded=True,
    )


def _scores(histograms: Sequence[Histogram]) -> Iterator[Block]:
    grouped: dict[tuple[str, str], list[Histogram]] = {}
    for histogram in histograms:
        if histogram.turns:
            grouped.setdefault((histogram.policy, histogram.category), []).append(histogram)
    if not grouped:
        yield Words("The model scored no turn.")
        return
    yield Words(
        "A score says how sure the model is, from 0 (harmless) to 1. Most scores are close to 0, so the bars grow by "
        "powers of ten: each line of the grid stands for ten times as many turns as the one below. The upright lines "
        "are the policy’s thresholds: it acts on what is right of them. Where many turns are close to a line, a "
        "small change of the threshold changes a lot."
    )
    many = len({policy for policy, _ in grouped}) > 1
    yield Chart(
        "How many turns have which score",
        {
            f"{policy}: {category}" if many else category: charts.scores(some)
            for (policy, category), some in grouped.items()
        },
        pick="Category",
    )
    yield Table(
        ("category", "role", "turns", "highest", "thresholds"),
        [
            (
                f"{one.policy}: {one.category}" if many else one.category,
                one.role,
                one.turns,
                one.highest,
                _steps(one.thresholds),
            )
            for one in histograms
        ],
        "Scores and thresholds of each category and role",
        is_folded=True,
    )


def _cases(summary: Summary) -> Iterator[Block]:
    if not summary.has_text:
        yield Words("Turns are counted from 0; the place is the input and the row in it.")
    if not summary.most_certain and not summary.most_doubtful:
        yield Words("No score is above a threshold or close to it.")
        return
    yield Words(
        "A few turns to read first. The most certain ones show what the policy is for; the most doubtful ones, whether "
        "its thresholds are where they should be. At most two are of one category and action."
    )
    above = [case for case in summary.most_doubtful if case.above]
    below = [case for case in summary.most_doubtful if not case.above]
    for title, cases in (
        ("Most certain: furthest above the threshold", summary.most_certain),
        ("Most doubtful: just above the threshold", above),
        ("Most doubtful: just below the threshold, so that the action was not taken", below),
    ):
        if cases:
            yield Table(_case_header(summary), [_case(summary, case) for case in cases], title, as_cards=True)


def _case_header(summary: Summary) -> tuple[str, ...]:
    text = ("text",) if summary.has_text else ()
    return ("conversation", "turn", "finding", "score", "place", *text)


def _case(summary: Summary, case: Case) -> tuple[Value, ...]:
    text = (Quote(case.text or ""),) if summary.has_text else ()
    finding = f"{case.category}: {case.action if case.above else 'no ' + case.action}"
    return (case.id, f"{case.turn}, {case.role}", finding, _beside(case), f"{case.input}:{case.row}", *text)


def _beside(case: Case) -> str:
    """Score and threshold, with as many decimals as tell them apart."""
    apart = next((n for n in range(3, 9) if abs(case.score - case.threshold) >= 10**-n), 9)
    return f"{case.score:.{apart}f} {'≥' if case.above else '<'} {case.threshold:g}"


def _changes(summary: Summary, flips: Flips) -> Iterator[Block]:
    name = plain((summary.in_force.get("compare") or {}).get("name", "the other policy"))
    yield Words(
        f"The policy {name} was given the same scores. It decides otherwise about {percent(flips.verdicts)} of the "
        f"turns: more strictly about {flips.stricter:,}, more mildly about {flips.milder:,}."
    )
    highest = max((max(row) for row in _without_diagonal(flips)), default=0) or 1
    yield Table(
        ("now ↓ then →", *LEVELS),
        [
            (
                LEVELS[before],
                *(Heat(f"{count:,}", 0 if before == after else count / highest) for after, count in enumerate(row)),
            )
            for before, row in enumerate(flips.matrix)
        ],
        f"Turns by what was decided (rows) and what {name} decides (columns)",
    )
    about = [flip for flip in flips.flips if flip.category is not None]
    if about:
        yield Chart("Findings that change, by category", {"": charts.changes(about)})
    shown = flips.flips[:_FLIPS_SHOWN]
    if shown:
        yield Table(
            (
                "about",
                "role",
                "before",
                "after",
                "turns",
                "share of the role (95 % interval)",
                "some, as ID/TURN",
            ),
            [
                (
                    "verdict" if flip.category is None else flip.category or "no category",
                    flip.role,
                    flip.before,
                    flip.after,
                    flip.share.count,
                    flip.share,
                    Quote(", ".join(flip.ids[:3])),
                )
                for flip in shown
            ],
            "All changes"
            if len(shown) == len(flips.flips)
            else f"The first {len(shown)} of {len(flips.flips)} kinds of change",
            is_folded=True,
            as_cards=True,
        )


def _without_diagonal(flips: Flips) -> list[list[int]]:
    return [[count for after, count in enumerate(row) if after != before] for before, row in enumerate(flips.matrix)]


def _rejected(summary: Summary) -> Iterator[Block]:
    if not summary.totals.rejected:
        yield Words("Every row could be judged.")
        return
    yield Words(
        "Rows that could not be judged, by the reason; N stands for numbers. All of them are listed in rejects.jsonl."
    )
    yield Table(
        ("reason", "rows", "the first places, as INPUT:ROW"),
        [(one.reason, one.count, Quote(", ".join(one.places[:3]))) for one in summary.rejected],
        as_cards=True,
    )


def _in_force(facts: Mapping[str, Any]) -> Iterator[Block]:
    model, compare = facts.get("model") or {}, facts.get("compare")
    policies = dict(facts.get("policies") or {})
    rows: list[tuple[Value, ...]] = [
        ("Guard", str(facts.get("version", "unknown"))),
        ("model", " ".join(str(model[key]) for key in ("name", "revision", "dtype") if model.get(key))),
        *([("judged by the server", str(facts["server"]))] if facts.get("server") else []),
        *((f"policy {name}", _policy(told)) for name, told in policies.items()),
        *([(f"compared with {compare['name']}", _policy(compare))] if compare else []),
        ("each row’s policy", str(facts.get("policy") or "as the row says")),
    ]
    yield Table(("what", "which"), rows)
    yield Table(
        ("input", "bytes", "changed last"),
        [
            (str(one.get("url", "")), one.get("size"), str(one.get("modified") or ""))
            for one in facts.get("inputs") or []
        ],
        "Inputs",
        is_folded=True,
    )
    if compare:
        policies.setdefault(compare["name"], compare)
    for name, told in policies.items():
        yield Table(
            ("category", "title", "looks at", *(role.value for role in Role)),
            [_category(category, spec) for category, spec in told["categories"].items()],
            f"Thresholds of the policy {plain(name)}",
            is_folded=True,
            as_cards=True,
        )


def _policy(told: Mapping[str, Any]) -> str:
    shadow = ", in shadow mode" if told.get("shadow") else ""
    return f"revision {told.get('revision', '')}{shadow}"


def _category(name: str, spec: Mapping[str, Any]) -> tuple[Value, ...]:
    looks_at = ", ".join(HAZARDS.get(code, code) for code in spec["hazards"]) or "the overall score"
    steps = [_steps(spec["thresholds"].get(role.value, {})) for role in Role]
    return name, str(spec.get("title", "")), looks_at, *(step or "not judged" for step in steps)


def _steps(thresholds: Mapping[str, float]) -> str:
    return ", ".join(f"{action} {at:g}" for action, at in sorted(thresholds.items(), key=lambda step: step[1]))


def _glossary() -> Iterator[Block]:
    yield Table(
        ("word", "meaning"),
        [
            ("turn", Quote("One message of a conversation: of the user, the agent, a tool, or the operator (system).")),
            ("allow", Quote("Nothing was found; the turn passes.")),
            ("flag", Quote("The turn passes and is marked, for someone to look at.")),
            ("redirect", Quote("Another reply is shown in place of the turn.")),
            ("block", Quote("The turn is not shown.")),
            ("not allowed", Quote("Flagged, redirected or blocked.")),
            ("category", Quote("One thing that a policy looks for, such as hate.")),
            ("score", Quote("How sure the model is that a turn belongs to a category, from 0 to 1.")),
            ("threshold", Quote("From this score on the policy acts; it differs by category and role.")),
            ("rule", Quote("Words or a pattern that a policy looks for in the text, without the model.")),
            ("degraded", Quote("The model gave no answer, and the policy's setting for that case decided.")),
            ("shadow", Quote("A policy on trial: it tells what it finds and allows everything.")),
            ("token", Quote("A piece of a word, as the model reads it.")),
        ],
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
