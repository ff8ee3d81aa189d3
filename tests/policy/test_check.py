"""What the parts of a policy ask of each other, and what is said where one of them is missing or idle."""

from pathlib import Path

import pytest

from guard.errors import PolicyError
from guard.policy.read import read_policy
from tests.policy.files import CALIBRATION, CRISIS, WHOLE, write

# Each replaces one piece of the whole policy by one mistake.
MISTAKES = {
    "unknown reply of a rule": (
        "reply: house-rules\ncategories",
        "reply: house-rule\ncategories",
        "whole.yaml:19:12: rules.card-number.reply: expected one of crisis-line, house-rules, found 'house-rule'"
        "; did you mean house-rules?",
    ),
    "unknown reply of a threshold": (
        "at: 0.75, reply: house-rules",
        "at: 0.75, reply: home",
        "whole.yaml:33:53: categories.hate.thresholds.user.redirect.reply: expected one of crisis-line, house-rules, "
        "found 'home'",
    ),
    "unknown category of a rule": (
        "category: leaks",
        "category: leak",
        "whole.yaml:14:15: rules.secrets.category: expected one of crime, hate, leaks, self-harm, found 'leak'"
        "; did you mean leaks?",
    ),
    "a rule without terms": (
        "    terms: [Project Falcon, αβγ]\n",
        "    terms: []\n",
        "whole.yaml:10:5: rules.secrets: expected terms, or a pattern in their place, found neither",
    ),
    "a rule with two of them": (
        "    terms: [Project Falcon, αβγ]\n",
        "    terms: [Project Falcon]\n    pattern: falcon\n",
        "whole.yaml:10:5: rules.secrets: expected terms, or a pattern in their place, found both",
    ),
    "a redirect to nowhere": (
        "    reply: house-rules\ncategories",
        "categories",
        "whole.yaml:16:5: rules.card-number: expected a reply beside `action: redirect`, found none",
    ),
    "a reply to nothing": (
        "action: block",
        "action: block\n    reply: house-rules",
        "whole.yaml:10:5: rules.secrets: expected a reply beside `action: redirect` alone, found house-rules",
    ),
    "a rule for nobody": (
        "roles: [agent]",
        "roles: []",
        "whole.yaml:12:12: rules.secrets.roles: expected at least one entry, found an empty list",
    ),
    "a term without a word": (
        "αβγ",
        "'!?'",
        "whole.yaml:10:29: rules.secrets.terms[1]: expected a word, found '!?'",
    ),
    "what RE2 has not": (
        r"(?i)card\s*\d{4}",
        r"(?<=card)\d{4}",
        r"whole.yaml:16:14: rules.card-number.pattern: expected a pattern of RE2, found '(?<=card)\d{4}': "
        "invalid perl operator: (?<=",
    ),
    "what matches everything": (
        r"(?i)card\s*\d{4}",
        r"\d*",
        r"whole.yaml:16:14: rules.card-number.pattern: expected a pattern of RE2, found '\d*': "
        "it matches the empty text, and so every text",
    ),
    "unknown key of a rule": (
        "    except: [project",
        "    exept: [project",
        "whole.yaml:11:5: rules.secrets.exept: expected one of terms, pattern, except, roles, action, reply, category, "
        "found 'exept'; did you mean except?",
    ),
    "an overlay of an unknown category": (
        "      hate:\n        user: {block",
        "      hat:\n        user: {block",
        "whole.yaml:42:7: overlays[0].thresholds.hat: expected one of crime, hate, leaks, self-harm, found 'hat'"
        "; did you mean hate?",
    ),
    "an overlay of an unknown role": (
        "tool: {flag",
        "tools: {flag",
        "whole.yaml:48:9: overlays[1].thresholds.hate.tools: expected one of user, agent, system, tool, found 'tools'"
        "; did you mean tool?",
    ),
    "an overlay of something else": (
        "  - when: {app: kids}\n",
        "  - when: {app: kids}\n    mode: shadow\n",
        "whole.yaml:41:5: overlays[0].mode: expected one of when, thresholds, found 'mode'",
    ),
    "an overlay for everyone": (
        "when: {app: kids}",
        "when: {}",
        "whole.yaml:40:11: overlays[0].when: expected at least one entry, found an empty mapping",
    ),
    "redirect above block": (
        "at: 0.75",
        "at: 0.95",
        "whole.yaml:33:13: categories.hate.thresholds.user: expected redirect to be at most block, "
        "found redirect 0.95 and block 0.9",
    ),
    "targets that descend": (
        "{max_fpr: 0.03}, block: {max_fpr: 0.01}",
        "{max_fpr: 0.01}, block: {max_fpr: 0.03}",
        "whole.yaml:38:13: categories.crime.thresholds.user: expected flag to be at most block, "
        "found flag 0.6 and block 0.3",
    ),
    "a target that was not measured": (
        "max_fpr: 0.01}",
        "max_fpr: 0.001}",
        "whole.yaml:38:44: categories.crime.thresholds.user.block: expected a false-positive rate of at least 0.009, "
        "the best that was measured for user turns, found {max_fpr: 0.001}",
    ),
    "a target of a weighted score": (
        "flag: 0.25",
        "flag: {max_fpr: 0.01}",
        "whole.yaml:27:21: categories.leaks.thresholds.agent.flag: expected a number, since what is measured is no "
        "`score: weighted`, found {max_fpr: 0.01}",
    ),
    "two targets": (
        "{max_fpr: 0.03}",
        "{max_fpr: 0.03, min_recall: 0.9}",
        "whole.yaml:38:20: categories.crime.thresholds.user.flag: expected one entry, found a mapping",
    ),
    "a target of nothing": (
        "{max_fpr: 0.03}",
        "{max_fpr: 0}",
        "whole.yaml:38:30: categories.crime.thresholds.user.flag.max_fpr: expected a number above 0, found 0",
    ),
    "weights without `weighted`": (
        "    score: weighted\n",
        "",
        "whole.yaml:24:14: categories.leaks.hazards: expected a list of hazard codes, or `score: weighted` beside "
        "their weights, found a mapping",
    ),
    "a weight of nothing": (
        "S8: 0.5",
        "S8: 0",
        "whole.yaml:25:29: categories.leaks.hazards.S8: expected a number above 0, found 0",
    ),
    "a history in words": (
        "history: 2",
        "history: all",
        "whole.yaml:4:10: history: expected a whole number, found 'all'",
    ),
    "a file that is not there": (
        "[crisis_include.yaml]",
        "[crisis_include.yaml, other_include.yaml]",
        "whole.yaml:2:32: include[1]: cannot be included: other_include.yaml:1:1: cannot be read: "
        "No such file or directory",
    ),
    "a file twice": (
        "[crisis_include.yaml]",
        "[crisis_include.yaml, crisis_include.yaml]",
        "whole.yaml:2:32: include[1]: expected each file once, found 'crisis_include.yaml' again",
    ),
    "a policy that is included": (
        "[crisis_include.yaml]",
        "[crisis_include.yaml, whole.yaml]",
        "whole.yaml:2:32: include[1]: expected a file name such as crisis_include.yaml, found 'whole.yaml'",
    ),
    "a name that an included file has": (
        "  house-rules: Please",
        "  crisis-line: Call.\n  house-rules: Please",
        "crisis_include.yaml:2:3: replies.crisis-line: expected a name that whole.yaml has nowhere else",
    ),
}


def refusal(path: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        read_policy(path, CALIBRATION)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_the_whole_language_is_read(tmp_path: Path) -> None:
    """Nothing in a policy that uses all of it is a problem, or suspicious."""
    reading = read_policy(write(tmp_path), CALIBRATION)
    assert reading.warnings == ()
    assert list(reading.spec.categories) == ["self-harm", "leaks", "hate", "crime"]


@pytest.mark.parametrize(("piece", "mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_placed_and_named(tmp_path: Path, piece: str, mistake: str, message: str) -> None:
    """The message says where the mistake is, what was expected there and what was found."""
    assert piece in WHOLE
    assert refusal(write(tmp_path, WHOLE.replace(piece, mistake, 1))) == message


def test_a_mistake_in_an_included_file_is_placed_there(tmp_path: Path) -> None:
    """Also one that only shows once the files are together; and no fragment includes another."""
    crisis = "include: [more_include.yaml]\n" + CRISIS.replace("reply: crisis-line", "reply: crisis")
    assert refusal(write(tmp_path, crisis=crisis)).splitlines() == [
        "crisis_include.yaml:1:1: include: expected one of replies, rules, categories, found 'include'",
        "crisis_include.yaml:9:55: categories.self-harm.thresholds.user.redirect.reply: expected one of crisis-line, "
        "house-rules, found 'crisis'; did you mean crisis-line?",
    ]


def test_mistakes_of_shape_hide_no_others(tmp_path: Path) -> None:
    """What of a file is sound is checked as if the rest were sound too."""
    whole = WHOLE.replace("title: Leaks", "titel: Leaks").replace("category: leaks", "category: leak")
    assert [line.split(": ")[1] for line in refusal(write(tmp_path, whole)).splitlines()] == [
        "rules.secrets.category",
        "categories.leaks.title",
        "categories.leaks.titel",
    ]


def test_without_a_calibration_targets_are_refused(tmp_path: Path) -> None:
    """A policy that asks for a rate needs a model that was measured."""
    with pytest.raises(PolicyError) as caught:
        read_policy(write(tmp_path))
    assert [line.partition(": expected ")[2] for line in str(caught.value).splitlines()] == [
        "a number, since the model has no curve of S1, S2 for user turns, found {max_fpr: 0.03}",
        "a number, since the model has no curve of S1, S2 for user turns, found {max_fpr: 0.01}",
        "a number, since the model has no curve of S11 for user turns, found {min_recall: 0.6}",
    ]


# Each replaces one piece of the whole policy by something that loads, and does nothing.
IDLE = {
    "a threshold that is out of reach": (
        "{S7: 0.75, S8: 0.5}",
        "{S7: 0.25, S8: 0.125}",
        "whole.yaml:27:34: categories.leaks.thresholds.agent.block: it is never reached: the category's score is at "
        "most 0.375",
    ),
    "an exception that meets nothing": (
        "[project falcon 9]",
        "[falcon 9]",
        "whole.yaml:11:14: rules.secrets.except[0]: it excepts nothing: the rule matches no part of it",
    ),
    "terms that an earlier rule has": (
        "    except: [project falcon 9]\n    roles: [agent]\n    action: block\n    category: leaks\n",
        "    roles: [agent]\n    action: block\n    category: leaks\n"
        "  falcon: {terms: [the Project  FALCON], roles: [agent], action: flag}\n",
        "whole.yaml:14:3: rules.falcon: it changes no verdict: secrets matches all that it matches, for the same "
        "roles, and is as strict",
    ),
    "a pattern that an earlier rule has": (
        "    reply: house-rules\ncategories",
        "    reply: house-rules\n  cards: {pattern: '(?i)card\\s*\\d{4}', roles: [user], action: flag}\ncategories",
        "whole.yaml:20:3: rules.cards: it changes no verdict: card-number matches all that it matches, for the same "
        "roles, and is as strict",
    ),
    "a reply that nobody gives": (
        "replies:\n",
        "replies:\n  idle: Nobody says this.\n",
        "whole.yaml:7:3: replies.idle: no rule and no threshold redirects to it",
    ),
}


@pytest.mark.parametrize(("piece", "idle", "message"), IDLE.values(), ids=IDLE)
def test_what_does_nothing_is_told(tmp_path: Path, piece: str, idle: str, message: str) -> None:
    """As a warning: the policy loads."""
    assert piece in WHOLE
    path = write(tmp_path, WHOLE.replace(piece, idle, 1))
    assert [line.replace(f"{tmp_path}/", "") for line in read_policy(path, CALIBRATION).warnings] == [message]
