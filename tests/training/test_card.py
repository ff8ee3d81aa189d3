import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.errors import ConfigError
from guard.model.checkpoint import read_checkpoint
from guard.training.card import DEPTHS, LEFT_OUT, language_verdict, write_card
from guard.training.data import Example
from guard.training.evaluate import HEADS, evaluate, thresholds, under
from guard.types import Conversation, Role, Turn
from tests.training.untrained import write_model

RECIPE = Path(__file__).parents[2] / "guard/model/default/recipe.yaml"
PLOTS = ("precision-recall.png", "reliability.png", "scores.png", "loss.png")


def _example(number: int, unsafe: bool) -> Example:
    """French is rare; everything harmless in German is taken for unsafe, and nothing unsafe in Italian."""
    lang = ("en", "de", "it", "fr" if number < 40 else "en")[number % 4]
    conversation = Conversation((Turn((Role.USER, Role.AGENT)[number % 3 // 2], "hello"),), 0)
    return Example(str(number), "words", lang, conversation, unsafe, frozenset({"S1"} if unsafe else ()))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with all that a card is written from; of the scores a third at most survives a disguise."""
    write_model(tmp_path)
    shutil.copy(RECIPE, tmp_path / "recipe.yaml")
    random = np.random.default_rng(1)
    examples = [_example(number, bool(random.random() < 0.4)) for number in range(600)]
    right = np.array([{"de": 1.0, "it": 0.0}.get(example.lang, float(example.unsafe)) for example in examples])
    unsafe = np.clip(0.1 + 0.8 * right + random.normal(size=len(right)) / 20, 0, 1)
    scores = np.repeat(unsafe[:, None], len(HEADS), axis=1)
    evaluation = {
        "held_out": evaluate(scores, examples),
        "benchmarks": {"others": evaluate(scores[:100], examples[:100])},
        "thresholds": thresholds(scores, examples),
        "int8": {
            form: {"rows": 10, "auprc_lost": 0.001, "verdicts_changed": 0.01, "unsafe_mean_difference": 0.005}
            for form in ("weights", "products")
        },
        "disguised": under({"plain": scores[:100, 0], "random_case": scores[:100, 0] / 3}, examples[:100]),
    }
    reports = [{"step": 10 * n, "loss": 1 / n} for n in range(1, 20)]
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return tmp_path


def test_a_card_tells_what_the_files_say(directory: Path) -> None:
    """Who the model is, what it is worth, where it fails, what it learned from, and what people add to that."""
    (directory / "notes.md").write_text("It was made in a hurry.\n")
    write_card(directory)
    card = (directory / "README.md").read_text()
    assert card.startswith(f"# untrained\n\n- revision: `{read_checkpoint(directory).revision}`\n- recipe: ")
    assert "| en | trustworthy |" in card
    assert "| de | weak |" in card
    assert "| fr | unmeasured |" in card
    (flagged,) = [line for line in card.splitlines() if line.startswith("- Harmless turns are flagged more often")]
    (missed,) = [line for line in card.splitlines() if line.startswith("- Unsafe turns are missed more often")]
    assert " in: de 100.0 (" in flagged
    assert " in: it 0.0 (" in missed
    assert "| others | 100 |" in card
    assert "| disguise | recall | beside plain | FPR |" in card
    assert "| random case | 0.0 (0.0–" in card
    assert "| `advbench` | en | MIT | busycalibrating/AdversariaLLM @ `f970939273ea` |" in card
    assert card.endswith("## Notes\n\nIt was made in a hurry.\n")
    for plot in PLOTS:
        assert f"({plot})" in card
        assert (directory / plot).stat().st_size < 60_000


def test_a_card_tells_of_studies(directory: Path) -> None:
    """What models are worth that have not seen a source, and how deep one should be; where that was studied."""
    write_card(directory)
    assert "## Depth" not in (directory / "README.md").read_text()
    held_out = json.loads((directory / "evaluation.json").read_text())["held_out"]
    (directory / LEFT_OUT).write_text(json.dumps({"folds": [["words"], ["others"]], "steps": 1500, **held_out}))
    depths = [
        {
            "blocks": blocks,
            "unsafe": held_out["unsafe"],
            "bytes": 5e6 * blocks,
            "ms": 1.5 * blocks,
            "computed": "cpu, int8",
        }
        for blocks in (10, 20)
    ]
    (directory / DEPTHS).write_text(json.dumps({"steps": 700, "depths": depths}))
    write_card(directory)
    card = (directory / "README.md").read_text()
    assert "one of 2 models" in card
    assert "1,500 steps" in card
    assert "| words | 600 |" in card
    assert "| 20 | 100 | 30.0 |" in card
    assert "(cpu, int8)" in card
    assert (directory / "depths.png").stat().st_size < 60_000
    assert "![depths](depths.png)" in card


def test_every_source_of_the_embedded_model_has_its_licence(directory: Path) -> None:
    """docs/data.md has a line for each source of the recipe that is shipped."""
    write_card(directory)
    assert "not recorded" not in (directory / "README.md").read_text()


def test_the_same_files_give_the_same_card(directory: Path) -> None:
    """To the byte, plots included."""
    written = []
    for _ in range(2):
        write_card(directory)
        written.append([(directory / name).read_bytes() for name in ("README.md", *PLOTS)])
    assert written[0] == written[1]


def test_a_source_nobody_described_is_said_to_be_so(directory: Path) -> None:
    """A card of a model trained on one's own rows can be written, and hides nothing."""
    (directory / "data.md").write_text("| source | languages | licence | origin @ commit |\n|---|---|---|---|\n")
    write_card(directory, directory / "data.md")
    assert "| `advbench` | not recorded | not recorded | not recorded |" in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("positives", "low", "verdict"),
    [(30, 0.91, "trustworthy"), (30, 0.9, "weak"), (29, 0.99, "unmeasured"), (71, 0.99, "unmeasured")],
)
def test_the_verdict_on_a_language(positives: int, low: float, verdict: str) -> None:
    """Enough rows of either label, and an AUROC that is surely high, out of 100 rows."""
    found: dict[str, Any] = {"rows": 100, "positives": positives, "intervals": {"auroc": [low, 1.0]}}
    assert language_verdict(found) == verdict


@pytest.mark.parametrize("name", ["evaluation.json", "recipe.yaml", "training.jsonl"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ConfigError, match=name):
        write_card(directory)
