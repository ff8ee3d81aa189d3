"""Labels that come back: how they are read, what they tell of all turns, and which thresholds they propose."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from guard.audit.output import read_facts
from guard.audit.records import Place
from guard.audit.review.agree import Reviewed, agree, alpha
from guard.audit.review.sample import Case, Sample, draw, texts_of
from guard.audit.review.sheet import Label, Labels, read_labels, write_review
from guard.audit.review.strata import Choice, Facts
from guard.cli import audit_agree
from guard.errors import ConfigError, GuardError
from guard.training.formats import read_examples
from guard.types import Action, Role
from tests.audit.review.reviewed import Judged, write_audit


def traffic(conversations: int) -> list[Judged]:
    random = Random(3)
    turns = []
    for number in range(conversations):
        score = round(random.random() ** 3, 6)
        kind = random.choice(("S10", "S1"))
        turns.append(Judged(f"c{number}", "user", f"turn {number}", {"unsafe": score, kind: score}))
    return turns


def reviewed_audit(folder: Path, *, size: int = 120) -> tuple[Path, Sample]:
    out = write_audit(folder / "out", traffic(1000), text=True)
    sample = draw(out, Choice(size=size), texts_of(out))
    write_review(out / "review", sample, read_facts(out))
    return out, sample


def filled(path: Path, labels: Mapping[int, str], heading: str = "case,label,categories") -> Path:
    path.write_text("\n".join([heading, *(f"{case},{label}" for case, label in labels.items()), ""]))
    return path


def truth(sample: Sample) -> dict[int, str]:
    """Harmful are scores from 0.5 on, of the kind that scores highest."""
    kinds = {case.number: max(case.hazards, key=lambda code: case.hazards[code]) for case in sample.cases}
    return {
        case.number: f"harmful,{kinds[case.number]}" if case.unsafe >= 0.5 else "harmless," for case in sample.cases
    }


def run(*arguments: str | Path) -> str:
    """`guard audit agree`; raises what it raises."""
    app = typer.Typer()
    app.command()(audit_agree.agree)
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])
    if isinstance(found.exception, GuardError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def case(number: int, stratum: str, size: int, action: Action = Action.ALLOW) -> Case:
    return Case(number, Place("", number), "", 0, Role.USER, "", "shop", stratum, size, action, (), 0.5, {})


def told(sample: Sample, *sheets: Mapping[int, Label]) -> Reviewed:
    return Reviewed(sample, [Labels(str(number), sheet) for number, sheet in enumerate(sheets)])


Stratum = tuple[Action, int, int, float]  # action, turns, drawn, share of harm
POPULATIONS: Mapping[str, list[Stratum]] = {
    "ordinary": [
        (Action.ALLOW, 100_000, 160, 0.002),
        (Action.ALLOW, 10_000, 27, 0.03),
        (Action.ALLOW, 2000, 13, 0.2),
        (Action.FLAG, 800, 128, 0.7),
        (Action.FLAG, 300, 52, 0.5),
        (Action.BLOCK, 200, 20, 0.9),
    ],
    "clean": [
        (Action.ALLOW, 100_000, 177, 0.0),
        (Action.ALLOW, 10_000, 17, 0.001),
        (Action.ALLOW, 2000, 6, 0.02),
        (Action.FLAG, 300, 80, 0.9),
        (Action.BLOCK, 200, 16, 1.0),
    ],
    "many strata": [
        (Action.ALLOW, 30_000, 150, 0.004),
        *[(Action.ALLOW, 200 * n, 3 + n, 0.02) for n in range(1, 7)],
        *[(Action.FLAG, 30 * n, 3 * n, 0.5 + 0.04 * n) for n in range(1, 11)],
    ],
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_intervals_hold_what_they_promise(name: str) -> None:
    """Of 120 reviews of made-up audits about 95 % tell intervals with the true rate in them, whatever is rare."""
    random = np.random.default_rng(5)
    population = POPULATIONS[name]
    cases = [
        case(1000 * place + number, str(place), size, action)
        for place, (action, size, drawn, _) in enumerate(population)
        for number in range(drawn)
    ]
    sample = Sample("", tuple(cases), sum(size for _, size, _, _ in population), 0)
    held = {"precision": 0, "recall": 0, "fpr": 0}
    for _ in range(120):
        harm = [int(random.binomial(size, share)) for _, size, _, share in population]
        found = dict[int, Label]()
        for place, (_, size, drawn, _) in enumerate(population):
            hits = random.permutation(size)[:drawn] < harm[place]
            found |= {1000 * place + number: Label(bool(hit)) for number, hit in enumerate(hits)}
        reviewed = told(sample, found)
        rates = reviewed.strata.rates(reviewed.actions(Action.FLAG), reviewed.harm())
        acted = [action is not Action.ALLOW for action, *_ in population]
        true = sum(hits for hits, is_acted in zip(harm, acted, strict=True) if is_acted)
        flagged = sum(one[1] for one, is_acted in zip(population, acted, strict=True) if is_acted)
        is_so = {
            "precision": true / flagged,
            "recall": true / sum(harm),
            "fpr": (flagged - true) / (sample.turns - sum(harm)),
        }
        for rate, value in is_so.items():
            low, high = getattr(rates, rate).interval
            held[rate] += low <= value <= high
    assert all(count / 120 >= 0.9 for count in held.values()), held


def test_cases_count_for_the_turns_that_they_stand_for() -> None:
    """One in 10 of what was flagged is harmless, and 1 in 100 of what was allowed is not."""
    labels = {n: Label(n % 10 > 0) for n in range(100)} | {100 + n: Label(n == 0) for n in range(100)}
    cases = [case(n, "flagged", 1000, Action.FLAG) for n in range(100)]
    cases += [case(100 + n, "allowed", 10_000) for n in range(100)]
    sample = Sample("", tuple(cases), 11_000, 0)
    reviewed = told(sample, labels)
    rates = reviewed.strata.rates(reviewed.actions(Action.FLAG), reviewed.harm())
    assert rates.precision
    assert rates.recall
    assert rates.fpr
    assert (rates.precision.value, rates.recall.value, rates.fpr.value) == pytest.approx((0.9, 0.9, 100 / 10_000))
    assert (rates.precision.rows, rates.recall.rows, rates.fpr.rows) == (100, 91, 109)
    assert list(reviewed.strata.weights[[0, -1]]) == [10, 100]


def test_strata_without_labels_are_stood_in_for() -> None:
    """By those of the same role and decision; where there are none, it is said."""
    cases = [case(1, "far", 100), case(2, "near", 50), case(3, "flagged", 10, Action.FLAG)]
    sample = Sample("", tuple(cases), 160, 0)
    facts: Facts = {"policies": {}}
    reviewed = told(sample, {1: Label(False), 3: Label(True)})
    assert list(reviewed.strata.weights) == [150, 10]
    assert agree(reviewed, facts).notes == (
        "50 turns are in strata without a label; others of the same role and decision stand in",
    )
    assert agree(told(sample, {3: Label(True)}), facts).notes == (
        "150 turns are left out: no turn of that role and decision has a label",
    )


def test_a_sample_of_some_turns_tells_precision_alone() -> None:
    """What was not drawn from may hold any harm."""
    sample = Sample("", (case(1, "flagged", 10, Action.FLAG),), 10, 0, is_whole=False)
    found = agree(told(sample, {1: Label(True)}), {"policies": {}})
    assert found.about[0].rates.precision
    assert (found.about[0].rates.recall, found.about[0].rates.fpr) == (None, None)
    assert found.notes[-1].startswith("the sample is of some turns only")


def test_most_reviewers_are_right() -> None:
    """Ties, blanks and doubts are left out and counted; kinds are what half of those who name any say."""
    yes, no, unsure = Label(True, frozenset({"S10"})), Label(False), Label(None)
    sample = Sample("", tuple(case(n, "all", 10) for n in range(1, 7)), 10, 0)
    reviewed = told(
        sample,
        {1: yes, 2: yes, 3: unsure, 4: no, 5: Label(True, frozenset({"S1"}))},
        {1: no, 2: no, 3: unsure, 4: unsure, 5: yes},
        {1: yes, 5: yes},
    )
    assert [one.number for one in reviewed.cases] == [1, 4, 5]
    assert reviewed.labels == (yes, no, yes)
    found = agree(reviewed, {"policies": {}})
    assert (found.labelled, found.harmful, found.ties, found.unsure, found.blank) == (3, 2, 1, 1, 1)
    assert found.shared == 3
    assert found.agreeing == pytest.approx(1 / 3)
    assert found.reviewers == {"0": 5, "1": 5, "2": 2}


def test_alpha_is_krippendorffs() -> None:
    """0.095 for the binary example of his Computing Krippendorff's Alpha-Reliability (2011), section A."""
    one, other = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    assert alpha([(bool(a), bool(b)) for a, b in zip(one, other, strict=True)]) == pytest.approx(0.095, abs=5e-4)


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=4), max_size=20))
def test_alpha_is_one_where_all_agree(votes: list[list[bool]]) -> None:
    """And below where they do not; where every label is the same, nobody can tell."""
    found = alpha(votes)
    if len({vote for of in votes for vote in of}) < 2:
        assert found is None
    else:
        assert found is not None
        assert (found == 1) == all(len(set(of)) == 1 for of in votes)
        assert found <= 1


@pytest.mark.parametrize(
    "text",
    [
        b"case,label,categories\n1,harmful,S10 x1\n2,HARMLESS,\n3,unsure,\n4,,\n",
        b'\xef\xbb\xbfCase;Label;Categories;comment\r\n1; 1 ;S10, X1;"two\r\nlines; of it"\r\n2;no;;\r\n3;?;;\r\n\r\n',
        "case\tlabel\tcategories\n1\tyes\tS10+X1\n2\tsafe\t\n3\tUnsure\t\n".encode("utf-16"),
        "label,comment,case,categories\nunsafe,für,1,x1;s10\nfalse,,2,\n?,,3,\n".encode("cp1252"),
    ],
)
def test_labels_are_read_as_people_send_them(tmp_path: Path, text: bytes) -> None:
    """From the page, or a spreadsheet with its separators, encodings and capitals; what is blank is none."""
    out, sample = reviewed_audit(tmp_path)
    (tmp_path / "ann.csv").write_bytes(text)
    labels = read_labels(tmp_path / "ann.csv", sample, read_facts(out))
    assert labels == Labels(
        str(tmp_path / "ann.csv"), {1: Label(True, frozenset({"S10", "X1"})), 2: Label(False), 3: Label(None)}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,verdict\n1,harmful\n", ":1: there is no column label"),
        ("case,label\n1,harmful\n2,maybe my secret\n", ":3: label: expected harmless, harmful, unsure or nothing"),
        ('case,comment,label\n1,"a\nb",0\n999,,0\n', ":4: case: expected a number from 1 to 120"),
        ("case,label\n1,0\n1,1\n", ":3: case: 1 is labelled above already"),
        ("case,label\n1,0,S1\n", ":2: has more fields than the first line"),
        ("sheet,case,label\nother,1,0\n", ":2: sheet: expected SHEET: the row is of another sample"),
    ],
)
def test_labels_that_cannot_be_read_are_said(tmp_path: Path, text: str, message: str) -> None:
    """With file and line, and never with what stands there."""
    out, sample = reviewed_audit(tmp_path)
    path = tmp_path / "ann.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        run(out, path)
    assert str(caught.value) == f"{path}{message.replace('SHEET', sample.id)}"


def test_kinds_that_nobody_knows_are_said(tmp_path: Path) -> None:
    """With those that there are, the policy's own among them."""
    out, _ = reviewed_audit(tmp_path)
    with pytest.raises(ConfigError, match=r"ann\.csv:2: categories: expected any of S1, S10, X1, rivals, S2, .*, with"):
        run(out, filled(tmp_path / "ann.csv", {1: "harmful,S99"}))


def test_an_empty_sheet_is_said(tmp_path: Path) -> None:
    """As is a folder that has no sample."""
    out, _ = reviewed_audit(tmp_path)
    with pytest.raises(ConfigError, match=r"^there is no label yet: harmless or harmful, in the column label$"):
        run(out, out / "review" / "sheet.csv")
    with pytest.raises(ConfigError, match=r"^a sheet is given twice; each is one reviewer's$"):
        run(out, out / "review" / "sheet.csv", out / "review" / "sheet.csv")
    with pytest.raises(ConfigError, match=r"key\.parquet: cannot be read; is that where `guard audit sample` wrote\?$"):
        run(out, out / "review" / "sheet.csv", "--from", tmp_path)


def test_a_review_is_told_and_written_down(tmp_path: Path) -> None:
    """In a table, as JSON and as Markdown; the rates are those of the whole audit."""
    out, sample = reviewed_audit(tmp_path)
    sheet = filled(tmp_path / "ann.csv", truth(sample))
    said = run(out, sheet)
    harmful = sum(one.unsafe >= 0.5 for one in sample.cases)
    assert said.splitlines()[0] == f"120 turns are labelled, {harmful} of them harmful"
    assert said.splitlines()[-1] == f"written: {out}/review/agreement.md, {out}/review/agreement.json"
    found = json.loads((out / "review" / "agreement.json").read_text())
    assert json.loads(run(out, sheet, "--json")) == found
    rates = {one["decision"]: one["rates"] for one in found["about"]}
    assert list(rates) == ["not allowed", "block", "hate", "violence", "rivals"]
    turns = [(one.scores or {})["unsafe"] for one in traffic(1000)]
    flagged = [one for case, one in zip(traffic(1000), turns, strict=True) if is_flagged(case.scores or {})]
    low, high = rates["not allowed"]["recall"]["interval"]
    assert low <= sum(one >= 0.5 for one in flagged) / sum(one >= 0.5 for one in turns) <= high
    low, high = rates["not allowed"]["precision"]["interval"]
    assert low <= sum(one >= 0.5 for one in flagged) / len(flagged) <= high
    assert found["bands"][-1]["harmful"]["value"] == 1
    assert "| not allowed | all | " in (out / "review" / "agreement.md").read_text()


def is_flagged(scores: Mapping[str, float]) -> bool:
    return scores.get("S10", 0) >= 0.4 or scores.get("S1", 0) >= 0.6


def test_thresholds_are_proposed_with_what_they_do(tmp_path: Path) -> None:
    """As `guard policy fit` finds them on the same rows, which are written for it with their weights."""
    out, sample = reviewed_audit(tmp_path)
    sheet = filled(tmp_path / "ann.csv", truth(sample))
    said = run(out, sheet, "--min-recall", "0.95", "--category", "violence")
    command = f"guard policy fit shop.yaml {out}/review/labels.jsonl --min-recall 0.95 --category violence"
    assert f"to write them into the policy: {command}" in said
    proposal = json.loads((out / "review" / "agreement.json").read_text())["proposal"]
    (one,) = proposal["thresholds"]
    assert (one["category"], one["role"], one["action"], one["was"]) == ("violence", "user", "block", 0.6)
    assert 0.5 <= one["threshold"] < 0.7  # of which chance decides: the sample is small
    assert one["rates"]["recall"]["value"] >= 0.95
    assert one["rates"]["fpr"]["value"] == 0
    rows = read_examples(out / "review" / "labels.jsonl")
    assert [(row.conversation.turns, row.unsafe) for row in rows] == [
        (one.turns, one.unsafe >= 0.5) for one in sample.cases
    ]
    assert sum(row.weight for row in rows) == pytest.approx(1000)


def test_what_one_category_cannot_have_the_others_can(tmp_path: Path) -> None:
    """A category of one's own is fitted by itself; a block below its flag is said, and not proposed."""
    out, sample = reviewed_audit(tmp_path)
    sheet = filled(tmp_path / "ann.csv", truth(sample))
    said = run(out, sheet, "--max-fpr", "0.3")
    assert "note: hate of user turns: block would be 0." in said
    assert "note: rivals is left as it is: fit it by itself, with --category rivals" in said
    proposal = json.loads((out / "review" / "agreement.json").read_text())["proposal"]
    assert [one["category"] for one in proposal["thresholds"]] == ["violence"]


def test_labels_without_texts_propose_and_write_no_rows(tmp_path: Path) -> None:
    """And it is said what is missing."""
    out = write_audit(tmp_path / "out", traffic(300))
    sample = draw(out, Choice(size=60))
    write_review(out / "review", sample, read_facts(out))
    said = run(out, filled(tmp_path / "ann.csv", truth(sample)), "--max-fpr", "0.01", "--category", "violence")
    assert "violence  user  block   0.6" in said
    assert "note: labels for `guard policy fit` need texts: draw the sample --with-text" in said
    assert not (out / "review" / "labels.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-fpr", "0.1", "--min-recall", "0.9"), "expected either --max-fpr or --min-recall, found both"),
        (("--max-fpr", "1"), "max-fpr: should lie between 0 and 1, found 1"),
        (("--max-fpr", "0.1", "--policy", "shoe"), "policy: expected one of shop, found 'shoe'; did you mean shop?"),
        (
            ("--max-fpr", "0.1", "--category", "hat"),
            "category: expected one of hate, rivals, violence, found 'hat'; did you mean hate?",
        ),
    ],
)
def test_what_cannot_be_proposed_is_said(tmp_path: Path, arguments: Iterable[str], message: str) -> None:
    """In one line."""
    out, sample = reviewed_audit(tmp_path)
    with pytest.raises(GuardError) as caught:
        run(out, filled(tmp_path / "ann.csv", truth(sample)), *arguments)
    assert str(caught.value) == message


def test_a_sample_of_some_turns_proposes_nothing(tmp_path: Path) -> None:
    """Its rates are not those of the traffic."""
    out = write_audit(tmp_path / "out", traffic(300))
    sample = draw(out, Choice(size=20, action=Action.BLOCK))
    write_review(out / "review", replace(sample), read_facts(out))
    with pytest.raises(ConfigError, match=r"^thresholds need a sample of all turns, drawn without --only and --cat"):
        run(out, filled(tmp_path / "ann.csv", truth(sample)), "--max-fpr", "0.1")
