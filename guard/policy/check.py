"""What the parts of a policy ask of each other: names that must be there, orders that must hold, parts that act."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Protocol

from guard.policy.calibration import Calibration, Unresolvable
from guard.policy.compile import resolve
from guard.policy.document import KEY, Loc
from guard.policy.messages import found, one_of
from guard.policy.rules import BadPattern, compile_pattern, words
from guard.policy.schema import CategorySpec, PolicySpec, RuleSpec, ThresholdsSpec
from guard.types import Action, Role


class Report(Protocol):
    """Where problems and warnings go, and what is defined in a section of the policy, be it sound or not."""

    def report(self, loc: Loc, problem: str) -> None: ...

    def warn(self, loc: Loc, warning: str) -> None: ...

    def names(self, section: str) -> set[str]: ...


def check(policy: PolicySpec, to: Report, calibration: Calibration) -> None:
    """Reports every problem and every warning; a policy without problems compiles."""
    if not to.names("categories") and not to.names("rules"):
        to.report(("categories",), "expected categories or rules, found neither")
    _check_rules(policy, to)
    _check_thresholds(policy, to, calibration)
    for name in policy.replies.keys() - _replies(policy):
        to.warn(("replies", name, KEY), "no rule and no threshold redirects to it")


def _check_rules(policy: PolicySpec, to: Report) -> None:
    for name, rule in policy.rules.items():
        loc = "rules", name
        _check_name(to, (*loc, "category"), "categories", rule.category)
        _check_name(to, (*loc, "reply"), "replies", rule.reply)
        sound = [_is_sound(to, (*loc, key, index), term) for key, index, term in _phrases(rule)]
        if _compiles(to, loc, rule) and all(sound):
            for index, exception in enumerate(rule.exceptions):
                if not _meets(rule, exception):
                    to.warn((*loc, "except", index), "it excepts nothing: the rule matches no part of it")
    sound_rules = [
        (name, rule) for name, rule in policy.rules.items() if all(words(term) for _, _, term in _phrases(rule))
    ]
    for index, (name, rule) in enumerate(sound_rules):
        for earlier, other in sound_rules[:index]:
            if _shadows(other, rule):
                to.warn(
                    ("rules", name, KEY),
                    f"it changes no verdict: {earlier} matches all that it matches, "
                    "for the same roles, and is as strict",
                )
                break


def _phrases(rule: RuleSpec) -> Iterator[tuple[str, int, str]]:
    for key, phrases in (("terms", rule.terms), ("except", rule.exceptions)):
        for index, phrase in enumerate(phrases):
            yield key, index, phrase


def _is_sound(to: Report, loc: Loc, term: str) -> bool:
    if sound := bool(words(term)):
        return sound
    to.report(loc, f"expected a word, found {found(term)}")
    return False


def _compiles(to: Report, loc: Loc, rule: RuleSpec) -> bool:
    try:
        if rule.pattern is not None:
            compile_pattern(rule.pattern)
    except BadPattern as error:
        to.report((*loc, "pattern"), f"expected a pattern of RE2, found {found(rule.pattern)}: {error}")
        return False
    return True


def _meets(rule: RuleSpec, exception: str) -> bool:
    """Whether there is anything in an exception that the rule would match."""
    if rule.pattern is not None:
        return compile_pattern(rule.pattern).search(exception) is not None
    return any(_holds(words(exception), words(term)) for term in rule.terms)


def _shadows(earlier: RuleSpec, later: RuleSpec) -> bool:
    """Whether the earlier rule matches whenever the later one does, and then says the same or something stricter."""
    if earlier.terms and later.terms:
        terms = [words(term) for term in earlier.terms]
        matches = all(any(_holds(words(term), shorter) for shorter in terms) for term in later.terms)
    else:
        matches = earlier.pattern == later.pattern is not None
    return (
        matches
        and set(later.roles) <= set(earlier.roles)
        and set(map(words, earlier.exceptions)) <= set(map(words, later.exceptions))
        and Action[earlier.action.upper()] >= Action[later.action.upper()]
        and later.category in (None, earlier.category)
    )


def _holds(phrase: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(phrase[start : start + len(part)] == part for start in range(len(phrase) - len(part) + 1))


def _check_thresholds(policy: PolicySpec, to: Report, calibration: Calibration) -> None:
    for loc, category, role, thresholds in _judged(policy, to):
        scores = []
        for action, threshold, reply in thresholds.steps():
            here = (*loc, action, "at") if action == "redirect" else (*loc, action)
            _check_name(to, (*loc, "redirect", "reply"), "replies", reply)
            try:
                score = resolve(calibration, Role(role), category, threshold)
            except Unresolvable as error:
                to.report(here, f"expected {error}, found {_written(threshold)}")
                continue
            scores.append((action, score))
            if score > (most := _highest(category)):
                to.warn(here, f"it is never reached: the category's score is at most {most:.6g}")
        for (mild, low), (strict, high) in pairwise(scores):
            if low > high:
                to.report(
                    loc, f"expected {mild} to be at most {strict}, found {mild} {low:.6g} and {strict} {high:.6g}"
                )


def _judged(policy: PolicySpec, to: Report) -> Iterator[tuple[Loc, CategorySpec, str, ThresholdsSpec]]:
    """Every role's thresholds of every category, in the policy itself and in its overlays, and where they stand."""
    for name, category in policy.categories.items():
        for role, thresholds in category.thresholds.items():
            yield ("categories", name, "thresholds", role), category, role, thresholds
    for index, overlay in enumerate(policy.overlays):
        for name, by_role in overlay.thresholds.items():
            loc = "overlays", index, "thresholds", name
            _check_name(to, (*loc, KEY), "categories", name)
            for role, thresholds in by_role.items() if name in policy.categories else ():
                yield (*loc, role), policy.categories[name], role, thresholds


def _written(target: Mapping[str, float]) -> str:
    return "".join(f"{{{name}: {share}}}" for name, share in target.items())


def _check_name(to: Report, loc: Loc, section: str, name: str | None) -> None:
    known = sorted(to.names(section))
    if name is None or name in known:
        return
    to.report(loc, one_of(known, name) if known else f"expected a name of the policy's {section}, which has none")


def _highest(category: CategorySpec) -> float:
    """The most that its score can be."""
    return min(1.0, sum(category.hazards.values())) if isinstance(category.hazards, dict) else 1.0


def _replies(policy: PolicySpec) -> set[str]:
    """Those that something redirects to."""
    by_role = [category.thresholds for category in policy.categories.values()]
    by_role += [thresholds for overlay in policy.overlays for thresholds in overlay.thresholds.values()]
    redirects = [thresholds.redirect for roles in by_role for thresholds in roles.values()]
    return {rule.reply for rule in policy.rules.values() if rule.reply} | {one.reply for one in redirects if one}
