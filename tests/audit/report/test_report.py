"""The report of an audit, as people open it."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from guard.audit.report.blocks import percent, plain
from guard.audit.report.intervals import Share
from guard.audit.report.write import write_report
from guard.errors import ConfigError
from tests.audit.report.outputs import PLAIN, Turn, audited, category, policy, rule, violation

HOSTILE = "<script>alert(1)</script>|</td>\n\"'&`*_[x](javascript:1)\u202e"
BAD = Turn(action="flag", violations=[violation()], scores={"S10": 0.6})
DAYS = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2)]


class _Page(HTMLParser):
    """What a browser makes of a page: its elements, the texts of its cells and the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._within == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def opened(out: Path) -> _Page:
    page = _Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    return page


def test_three_files_say_the_same(tmp_path: Path) -> None:
    """The numbers that are returned stand in summary.json, and in both reports to read."""
    out = audited(tmp_path / "out", [BAD, Turn(2)])
    summary = write_report(out)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))
    for said in (opened(out).text, (out / "report.md").read_text()):
        assert "Of 2 turns in 2 conversations, 50 % (9–91 %) were not allowed: 1 flagged." in said
    assert sorted(path.name for path in out.iterdir()) == [
        "audit.json",
        "manifest.jsonl",
        "parts",
        "report.html",
        "report.md",
        "summary.json",
    ]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    """No element names anything outside the file, the policy for its content forbids it, and plotly is in it once."""
    out = audited(tmp_path / "out", [BAD])
    write_report(out)
    page = opened(out)
    assert not [each for _, found in page.elements for each in found if each in ("src", "srcset", "action", "data")]
    assert {found["href"][0] for _, found in page.elements if found.get("href")} == {"#"}  # type: ignore[index]
    policies = [found["content"] for _, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
    ]
    assert sum("plotly.js v" in script[:500] for script in page.scripts) == 1
    assert page.elements.count(("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})) == 1


def test_links_lead_to_sections(tmp_path: Path) -> None:
    """Each entry of the contents has its section."""
    out = audited(tmp_path / "out", [BAD], compare={"name": "other", **PLAIN})
    write_report(out)
    elements = opened(out).elements
    ids = {found["id"] for tag, found in elements if tag == "section"}
    assert {(found["href"] or "")[1:] for tag, found in elements if tag == "a"} == ids
    assert "changes" in ids


def test_hostile_words_are_only_words(tmp_path: Path) -> None:
    """Whatever ids, sources, languages, categories, rules, reasons and texts hold, it makes no element and no cell."""
    turns = [
        Turn(
            place,
            id=HOSTILE,
            source=HOSTILE,
            language="x" * 500,
            time=day,
            text=HOSTILE,
            policy=HOSTILE,
            scores={"S10": 0.6},
            action="flag",
            violations=[violation(HOSTILE), rule(HOSTILE)],
            compare=("allow", ()),
        )
        for place, day in enumerate(DAYS)
    ]
    told = policy(HOSTILE, {HOSTILE: category(["S10"], {"flag": 0.5})})
    out = audited(
        tmp_path / "out",
        turns,
        policies={HOSTILE: told},
        compare={"name": HOSTILE, **told},
        rejects=[(HOSTILE, 1, HOSTILE)],
        text=True,
    )
    write_report(out, text=True)
    page = opened(out)
    assert len(page.scripts) == len([tag for tag, _ in page.elements if tag == "script"]) == 3
    assert "<script>alert(1)</script>" in page.text
    assert not any("\u202e" in word for word in page.words)
    figures = json.loads(page.scripts[0])
    assert "<script" not in json.dumps(figures)
    lines = (out / "report.md").read_text().splitlines()
    assert not any("<script" in line for line in lines)
    for above, below in pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert len(_cells(above)) == len(_cells(below))


def _cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line)


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [Turn()],
        [BAD],
        [Turn(place, scores=None, action="block") for place in range(3)],
        [Turn(time=DAYS[0], language="en", source="web")],
        [Turn(1, time=DAYS[0]), Turn(2, time=DAYS[1])],
        [Turn(violations=[rule("links", "redirect")], action="redirect")],
    ],
    ids=["none", "one", "one bad", "all degraded", "one day", "two quiet days", "a rule alone"],
)
@pytest.mark.parametrize("compared", [False, True])
def test_every_audit_has_a_report(tmp_path: Path, turns: list[Turn], compared: bool) -> None:
    """However little was judged, and however little it tells of itself."""
    out = audited(tmp_path / "out", turns, compare={"name": "other", **PLAIN} if compared else None)
    write_report(out)
    charts = {found["id"] for _, found in opened(out).elements if found.get("class") == "chart"}
    assert charts == json.loads(opened(out).scripts[0]).keys()


def test_a_time_in_the_first_year_is_drawn(tmp_path: Path) -> None:
    """As some languages write none."""
    times = [datetime(1, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)]
    out = audited(tmp_path / "out", [Turn(number, time=time) for number, time in enumerate(times)])
    write_report(out)
    assert (out / "report.html").exists()


def test_limits_are_noted(tmp_path: Path) -> None:
    """What a reader must know before trusting the numbers stands before them."""
    turns = [Turn(1, scores=None, coverage=(5, 9)), Turn(2, shadow=True)]
    rejects = [("a.jsonl", 1, "bad")]
    write_report(audited(tmp_path / "out", turns, rejects=rejects, complete=False), text=True)
    said = (tmp_path / "out" / "report.md").read_text().split("## Totals")[0]
    for words in (
        "not finished",
        "not counted in any rate: 1.",
        "without the model’s answer: 1.",
        "too long for the model to be shown everything: 1.",
        "allows everything: 1.",
        "run without --with-text",
    ):
        assert words in said


def test_a_whole_audit_has_no_notes(tmp_path: Path) -> None:
    """Where nothing limits what it tells, nothing is said of limits."""
    out = audited(tmp_path / "out", [Turn()])
    write_report(out)
    assert "Note:" not in (out / "report.md").read_text()


def test_texts_stand_there_only_where_asked_for(tmp_path: Path) -> None:
    """The report without them holds none, also where the audit kept them."""
    out = audited(tmp_path / "out", [Turn(action="flag", violations=[violation()], text="a secret")], text=True)
    write_report(out)
    assert not any("a secret" in path.read_text() for path in out.glob("*.[hmj]*"))
    write_report(out, text=True)
    assert "a secret" in opened(out).text


def test_another_report_replaces_the_first(tmp_path: Path) -> None:
    """An audit that went on is told anew, and the same audit to the same bytes."""
    out = audited(tmp_path / "out", [BAD, Turn(2, time=DAYS[0])])
    write_report(out)
    first = [(out / name).read_bytes() for name in ("report.html", "report.md", "summary.json")]
    write_report(out)
    assert [(out / name).read_bytes() for name in ("report.html", "report.md", "summary.json")] == first


def test_no_audit(tmp_path: Path) -> None:
    """A folder without an audit gets no report."""
    with pytest.raises(ConfigError, match="there is no audit"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "of", "said"),
    [
        (0, 0, "–"),
        (0, 12, "0 % (0–24 %)"),
        (12, 12, "100 % (76–100 %)"),
        (7, 120, "5.8 % (2.9–11.6 %)"),
        (2100, 100_000, "2.10 % (2.01–2.19 %)"),
        (3, 10**8, "0.0000030 % (0.0000010–0.0000088 %)"),
    ],
)
def test_shares_have_the_decimals_that_they_bear(count: int, of: int, said: str) -> None:
    """As many as the interval is wide."""
    assert percent(Share.make(count, of)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("two\nlines\tand\x00 more", "two lines and more"), ("x" * 90, "x" * 80 + "…"), ("a\u200db\u202ec", "a\u200db c")],
)
def test_foreign_words_are_made_plain(text: str, said: str) -> None:
    """On one line, short, and not able to turn what stands beside them."""
    assert plain(text) == said
