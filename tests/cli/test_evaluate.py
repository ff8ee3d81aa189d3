"""`guard evaluate`, of a model of random weights."""

import json
from pathlib import Path

import numpy as np

from guard.model.turn_classifier import TurnClassifier
from guard.training.evaluate import METRICS, metrics
from guard.training.formats import read_examples
from tests.cli.command import guard
from tests.training.tiny import colours
from tests.training.untrained import write_model

PNG = b"\x89PNG"


async def test_what_is_measured_is_what_is_served(tmp_path: Path) -> None:
    """Two models side by side: on the terminal, as JSON, and as a page with plots; by the scores that they serve."""
    first, second = write_model(tmp_path / "first", 1), write_model(tmp_path / "second", 2)
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.csv"
    rows.write_text("".join(json.dumps(row) + "\n" for row in colours(40)))
    table.write_text("text,label\nred,unsafe\ngreen,safe\n")
    result = await guard(
        "evaluate",
        *(rows, table, "--model", first, "--against", second, "--threshold", "0.6", "--out", tmp_path / "out"),
    )
    assert (result.code, result.err) == (0, "")
    headings = [line.strip() for line in result.out.splitlines()]
    assert headings.index("Side by side") < headings.index("Difference, all rows") < headings.index("by language")
    assert "rows.jsonl (20 unsafe of 40), table.csv (1 unsafe of 2)" in result.out
    assert "…" not in result.out  # no figure is cut short

    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    examples = [example for path in (rows, table) for example in read_examples(path)]
    for path, own in ((first, found), (second, found["against"])):
        model = TurnClassifier(path, "cpu", own["model"]["dtype"])
        assert own["model"]["revision"] == model.info.revision.revision
        served = [model.score(model.tokenise(example.conversation))[0][0].unsafe for example in examples]
        expected = metrics(np.array(served), np.array([example.unsafe for example in examples]), 0.6)
        assert own["evaluation"]["unsafe"] == expected
    difference, own, other = (
        part["unsafe"] for part in (found["difference"], found["evaluation"], found["against"]["evaluation"])
    )
    assert all(abs(difference[name] - own[name] + other[name]) < 2e-4 for name in METRICS)

    page = (tmp_path / "out/evaluation.md").read_text()
    for plot in ("precision-recall.png", "reliability.png", "scores.png"):
        assert f"({plot})" in page
        assert (tmp_path / "out" / plot).read_bytes()[:4] == PNG
        assert (tmp_path / "out" / plot).stat().st_size < 60_000


async def test_a_wrong_row_is_an_error_of_one_line(tmp_path: Path) -> None:
    """It is told by file, line and key, before any model is loaded."""
    (tmp_path / "mine.csv").write_text("text,label\nhello,perhaps\n")
    result = await guard("evaluate", tmp_path / "mine.csv")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {tmp_path / 'mine.csv'}:2: label: should be 0, 1, safe or unsafe\n"


async def test_files_without_labels_are_refused(tmp_path: Path) -> None:
    """There is nothing to measure."""
    (tmp_path / "none.jsonl").write_text("")
    result = await guard("evaluate", tmp_path / "none.jsonl")
    assert (result.code, result.err) == (2, f"error: {tmp_path / 'none.jsonl'}: there is no labelled row\n")
