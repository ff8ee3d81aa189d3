"""A sample for review: what is drawn, how it is weighed, and what reviewers are shown of it."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from guard.audit.output import read_facts
from guard.audit.review.sample import allocate, draw, texts_of
from guard.audit.review.sheet import read_key, write_review
from guard.audit.review.strata import Choice, Stratum
from guard.cli.audit_sample import sample
from guard.errors import ConfigError, GuardError, InputError
from guard.types import Action, Role, Turn
from tests.audit.review.reviewed import Judged, write_audit

HOSTILE = "</script><script>alert(1)</script> =1+1 \u2028"


def traffic(conversations: int) -> list[Judged]:
    """Mostly harmless turns of users and agents, in two languages."""
    random = Random(7)
    turns = []
    for number in range(conversations):
        for role in ("user", "agent", "user"):
            score = random.random() ** 4
            scores = {"unsafe": score, "S10": score * random.random(), "S1": score * random.random()}
            turns.append(Judged(f"c{number}", role, f"{role} says {number}", scores, ("en", "de")[number % 2]))
    return turns


def run(*arguments: str | Path) -> str:
    """`guard audit sample`; raises what it raises."""
    app = typer.Typer()
    app.command()(sample)
    found = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(found.exception, GuardError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def sheet(out: Path) -> list[dict[str, str]]:
    with (out / "review" / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def shown(out: Path) -> list[dict[str, object]]:
    """The cases of the page."""
    page = (out / "review" / "sheet.html").read_text()
    assert page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert data
    cases: list[dict[str, object]] = json.loads(data[1])["cases"]
    return cases


@given(
    st.lists(
        st.tuples(st.sampled_from(("user", "agent")), st.booleans(), st.integers(1, 500), st.floats(0, 1)), min_size=1
    ),
    st.integers(1, 1000),
)
def test_every_stratum_gets_some_cases(strata: list[tuple[str, bool, int, float]], size: int) -> None:
    """Two where it has them, none more than it has; and all that were asked for where there are so many."""
    of = [Stratum(str(place), *one) for place, one in enumerate(strata)]
    if size < sum(min(2, one.size) for one in of):
        with pytest.raises(InputError, match=r"^size: expected at least \d+, as there are \d+ strata, found \d+$"):
            allocate(of, size)
        return
    sizes = allocate(of, size)
    assert sum(sizes) == min(size, sum(one.size for one in of))
    assert all(min(2, one.size) <= drawn <= one.size for one, drawn in zip(of, sizes, strict=True))


def test_doubtful_turns_are_drawn_more_often() -> None:
    """Within a role and decision, by the deviation of labels; the roles and decisions have as many each."""
    of = [
        Stratum("sure", "user", True, 1000, 0.01),
        Stratum("doubtful", "user", True, 1000, 0.5),
        Stratum("flagged", "user", False, 1000, 0.9),
    ]
    sure, doubtful, flagged = allocate(of, 200)
    assert flagged == pytest.approx(100, abs=1)
    assert doubtful / sure == pytest.approx(0.5 / (0.01 * 0.99) ** 0.5, rel=0.1)


def test_the_weights_of_a_sample_add_up_to_the_audit(tmp_path: Path) -> None:
    """Over all parts; of each stratum the size is that of its turns, and everything drawn is there once."""
    out = write_audit(tmp_path / "out", traffic(200), part=97)
    drawn = draw(out, Choice(size=80, by=("language",)))
    assert len(drawn.cases) == 80
    assert len({(case.place, case.turn) for case in drawn.cases}) == 80
    assert sum(drawn.weights[case.stratum] for case in drawn.cases) == pytest.approx(drawn.turns) == 600
    assert {case.stratum.split(" / ")[-1] for case in drawn.cases} == {"en", "de"}
    assert all(case.stratum.startswith(f"{case.role} / {case.action.name.lower()} / ") for case in drawn.cases)
    assert [case.number for case in drawn.cases] == list(range(1, 81))


def test_the_same_audit_gives_the_same_sample(tmp_path: Path) -> None:
    """However it is cut into parts; another seed gives another one."""
    one = write_audit(tmp_path / "one", traffic(100))
    other = write_audit(tmp_path / "other", traffic(100), part=41)
    drawn = draw(one, Choice(size=50))
    assert draw(other, Choice(size=50)) == drawn
    again = draw(one, Choice(size=50, seed=1))
    assert again.id != drawn.id
    assert {case.id for case in again.cases} != {case.id for case in drawn.cases}


def test_a_policy_in_shadow_is_reviewed_as_if_it_were_in_force(tmp_path: Path) -> None:
    """What it would have said is what is judged."""
    live = draw(write_audit(tmp_path / "live", traffic(100)), Choice(size=50))
    shadow = draw(write_audit(tmp_path / "shadow", traffic(100), shadow=True), Choice(size=50))
    assert shadow == live
    assert {case.action for case in shadow.cases} == {Action.ALLOW, Action.FLAG, Action.BLOCK}


def test_turns_that_nobody_judged_are_left_out(tmp_path: Path) -> None:
    """What no model scored, and roles without thresholds; a rule's turns are in, whoever speaks."""
    turns = [
        Judged("a"),
        Judged("b", scores=None),
        Judged("c", "system"),
        Judged("d", "tool", rule="card number"),
    ]
    drawn = draw(write_audit(tmp_path / "out", turns), Choice())
    assert (drawn.turns, drawn.left_out) == (2, 2)
    assert {case.stratum for case in drawn.cases} == {"user / allow / far", "tool / block / card number"}


def test_ids_that_come_again_in_other_files_are_drawn_one_by_one(tmp_path: Path) -> None:
    """As those of daily exports do."""
    turns = [Judged(str(row), input=f"{day}.jsonl", row=row) for day in range(30) for row in range(1, 101)]
    drawn = draw(write_audit(tmp_path / "out", turns), Choice(size=30))
    assert len(drawn.cases) == 30
    assert len({case.place.row for case in drawn.cases}) > 10


def test_only_some_turns_can_be_drawn(tmp_path: Path) -> None:
    """By action or category; such a sample says that it is not of all."""
    out = write_audit(tmp_path / "out", traffic(100))
    blocked = draw(out, Choice(size=20, action=Action.BLOCK))
    assert {case.action for case in blocked.cases} == {Action.BLOCK}
    violent = draw(out, Choice(size=20, category="violence"))
    assert all("violence" in case.violated for case in violent.cases)
    assert not blocked.is_whole
    assert not violent.is_whole


def test_the_sheet_is_blind_and_in_no_order(tmp_path: Path) -> None:
    """It has the texts with what was said before, and neither scores nor verdicts; its key has all, and reads back."""
    out = write_audit(tmp_path / "out", traffic(100), text=True)
    said = run(out, "--with-text", "--size", "60")
    assert said.splitlines()[0] == "60 of 300 judged turns, from 10 strata"
    rows = sheet(out)
    assert list(rows[0]) == ["sheet", "case", "role", "context", "text", "label", "categories", "comment"]
    key = read_key(out / "review")
    assert key == draw(out, Choice(size=60), texts_of(out))
    for row, case in zip(rows, key.cases, strict=True):
        assert case.turns is not None
        assert (row["sheet"], row["text"], row["role"]) == (key.id, case.turns[-1].text, case.role)
        assert row["context"] == "\n\n".join(f"{turn.role}: {turn.text}" for turn in case.turns[:-1])
        assert len(case.turns) == case.turn + 1
    runs = sum(one.action != other.action for one, other in zip(key.cases, key.cases[1:], strict=False))
    assert runs > 10
    assert all(case.keys() == {"case", "role", "left_out", "context", "text"} for case in shown(out))


def test_without_texts_the_sheet_has_places(tmp_path: Path) -> None:
    """And it says so; nobody's text is in any of the files."""
    out = write_audit(tmp_path / "out", traffic(30), text=True)
    assert "note: the sheet says where turns stand, not what they say; --with-text shows it" in run(out, "--size", "30")
    assert not any(b"user says" in path.read_bytes() for path in (out / "review").glob("sheet.*"))
    assert all(case.turns is None for case in read_key(out / "review").cases)
    assert all(case.keys() == {"case", "role", "input", "row", "id", "turn"} for case in shown(out))
    row = sheet(out)[0]
    assert row["input"] == "logs.jsonl"
    assert {"row", "id", "turn"} <= row.keys()
    assert "text" not in row


def test_what_people_wrote_is_text_wherever_it_is_shown(tmp_path: Path) -> None:
    """Neither markup in the page nor a formula in a spreadsheet; long texts are cut, and it is said."""
    turns = [Judged("a", text=HOSTILE), Judged("b", text="=SUM(A1)"), Judged("c", text="x" * 40_000)]
    out = write_audit(tmp_path / "out", turns, text=True)
    run(out, "--with-text")
    assert HOSTILE in {case["text"] for case in shown(out)}
    texts = {row["text"] for row in sheet(out)}
    assert texts == {HOSTILE, "'=SUM(A1)", "x" * 30_000 + " … (10,000 more characters)"}


def test_texts_may_come_from_the_inputs(tmp_path: Path) -> None:
    """By the place where a conversation begins; one that is gone is an error that names it."""
    out = write_audit(tmp_path / "out", [Judged("a"), Judged("a", "agent")])
    turns: Sequence[Turn] = (Turn(Role.USER, "hi"), Turn(Role.AGENT, "ho"))
    drawn = draw(out, Choice(), lambda places: dict.fromkeys(places, turns))
    assert sorted(case.turns or () for case in drawn.cases) == [turns[:1], turns]
    with pytest.raises(ConfigError, match=r"^logs\.jsonl:1: the conversation is not there any more$"):
        draw(out, Choice(), lambda _: {})


def test_a_sheet_that_is_there_is_kept(tmp_path: Path) -> None:
    """Labels may be in it; unless it is said to be replaced."""
    out = write_audit(tmp_path / "out", traffic(20))
    run(out, "--size", "30")
    with pytest.raises(ConfigError, match=r"there is a sheet, and labels may be in it; write another one --to DIR"):
        run(out, "--size", "30")
    before = read_key(out / "review")
    run(out, "--size", "30", "--seed", "1", "--to", tmp_path / "else")
    run(out, "--size", "30", "--seed", "1", "--force")
    assert read_key(out / "review") == read_key(tmp_path / "else") != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--by", "langauge"),
            "by: expected one of language, source, policy, day, found 'langauge'; did you mean language?",
        ),
        (("--category", "hat"), "category: expected one of hate, rivals, violence, found 'hat'; did you mean hate?"),
        (("--size", "3"), "size: expected at least 19, as there are 10 strata, found 3"),
        (("--only", "redirect"), "OUT: no turn is judged as asked for"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """In one line."""
    out = write_audit(tmp_path / "out", traffic(100))
    with pytest.raises(GuardError) as caught:
        run(out, *arguments)
    assert re.sub(r"at least \d+", "at least 19", str(caught.value).replace(str(out), "OUT")) == message


def test_a_folder_that_is_no_audit_is_said(tmp_path: Path) -> None:
    """So is one without a whole part, and a part that is damaged."""
    with pytest.raises(ConfigError, match=r"there is no audit, since there is no audit\.json$"):
        run(tmp_path)
    out = write_audit(tmp_path / "out", traffic(10))
    (out / "parts" / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"out: a part cannot be read: "):
        run(out)
    (out / "manifest.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"out: nothing is judged yet$"):
        run(out)


def test_the_sizes_of_strata_are_counted(tmp_path: Path) -> None:
    """Each case knows how many turns are in its stratum."""
    out = write_audit(tmp_path / "out", traffic(100))
    drawn = draw(out, Choice(size=300))
    assert Counter(case.stratum for case in drawn.cases) == {case.stratum: case.size for case in drawn.cases}
    write_review(tmp_path / "review", drawn, read_facts(out))
    assert read_key(tmp_path / "review") == drawn
