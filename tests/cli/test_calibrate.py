"""`guard calibrate` and `guard quantize`, of a model of random weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from guard.errors import CheckpointError
from guard.model.checkpoint import read_checkpoint
from guard.model.kinds import load_classifier
from guard.settings import Settings
from guard.training.formats import read_examples
from guard.training.pipeline import score
from guard.types import Role
from tests.cli.command import guard
from tests.model.llama_guards import Shape
from tests.training.tiny import colours
from tests.training.untrained import write_model


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in colours(200)))
    return path


async def test_calibration_is_fitted_to_ones_own_rows(tmp_path: Path, rows: Path) -> None:
    """The new model's mean score is the share of unsafe rows; its weights are those it had."""
    model = write_model(tmp_path / "model")
    result = await guard("calibrate", rows, "--model", model, "--out", tmp_path / "new")
    assert (result.code, result.err) == (0, "")
    before, after = read_checkpoint(model), read_checkpoint(tmp_path / "new")
    assert before.calibration[Role.USER] != after.calibration[Role.USER]
    assert (model / "model-00001-of-00001.safetensors").read_bytes() == (
        tmp_path / "new/model-00001-of-00001.safetensors"
    ).read_bytes()
    examples = read_examples(rows)
    scores = score(tmp_path / "new", examples)[:, 0]
    assert abs(scores.mean() - 0.5) < 0.02
    assert json.loads(result.out)["rows"] == 200
    points = json.loads((tmp_path / "new/thresholds.json").read_text())["user"]["unsafe"]["points"]
    assert all(point["fpr"] <= point["max_fpr"] for point in points)


async def test_texts_and_labels_are_enough(tmp_path: Path, rows: Path) -> None:
    """Of what kind harm is they do not say: only the overall score is fitted."""
    model = write_model(tmp_path / "model")
    plain = tmp_path / "rows.csv"
    plain.write_text(
        "text,label\n" + "".join(f"{row['turns'][0]['content']},{row['unsafe']}\n" for row in colours(200))
    )
    result = await guard("calibrate", plain, "--model", model, "--out", tmp_path / "new")
    assert (result.code, result.err) == (0, "")
    before, after = read_checkpoint(model).calibration, read_checkpoint(tmp_path / "new").calibration
    for role in (Role.USER, Role.AGENT):
        assert {code for code in after[role] if after[role][code] != before[role][code]} == {"unsafe"}


@pytest.mark.parametrize("command", [("calibrate",), ("calibrate", "--prior=0.1"), ("quantize",)])
@pytest.mark.parametrize("kept", ["blue", "red", "nothing"])
async def test_rows_of_one_label_are_refused(tmp_path: Path, command: tuple[str, ...], kept: str) -> None:
    """Nothing can be fitted to them or measured on them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in colours(40) if kept in row["turns"][0]["content"]))
    model = write_model(tmp_path / "model")
    result = await guard(command[0], rows, "--model", model, "--out", tmp_path / "new", *command[1:])
    assert result.code == 2
    assert result.err.startswith("error: needs both safe and unsafe rows to ")
    assert not (tmp_path / "new").exists()


async def test_probabilities_are_for_the_share_of_unsafe_turns_that_is_expected(tmp_path: Path, rows: Path) -> None:
    """Half of the rows are unsafe; where one turn of ten is, the odds of every turn are a ninth of what they were."""
    model = write_model(tmp_path / "model")
    for out, options in (("even", ()), ("rare", ("--prior=0.1",))):
        result = await guard(
            "calibrate", rows, "--model", model, "--out", tmp_path / out, *options, OMP_NUM_THREADS="1"
        )
        assert result.code == 0
    even, rare = (score(tmp_path / name, read_examples(rows), "float32") for name in ("even", "rare"))
    assert (rare / (1 - rare)) / (even / (1 - even)) == pytest.approx(1 / 9, rel=1e-3)


async def test_int8_is_allowed_where_it_agrees(tmp_path: Path, rows: Path) -> None:
    """Quantising says how far int8 moves scores, and the model directory says whether it may be chosen."""
    model = write_model(tmp_path / "model")
    result = await guard("quantize", rows, "--model", model, "--out", tmp_path / "new")
    assert (result.code, result.err) == (0, "")
    products = json.loads(result.out)["products"]
    assert products["rows"] == 200
    assert 0 < products["unsafe_max_difference"] < 0.2
    good = products["verdicts_changed"] <= 0.01 and products["auprc_lost"] <= 0.003
    assert read_checkpoint(tmp_path / "new").int8 is good


@pytest.mark.parametrize("shape", ["1b", "8b"])
async def test_a_llama_guard_is_quantised(tmp_path: Path, llama_guards: Mapping[Shape, Path], shape: Shape) -> None:
    """What comes of it is loaded as its source is, scores alike, and says truly how far int8 moves it."""
    path, source, out = tmp_path / "rows.csv", llama_guards[shape], tmp_path / "new"
    path.write_text("text,label\nI will kill you,1\nHow to bake bread?,0\n")
    result = await guard("quantize", path, "--model", source, "--out", out)  # of few rows: some CPUs take long for int8
    assert (result.code, result.err) == (0, "")
    rows, said = read_examples(path), json.loads(result.out)
    exact, near = score(source, rows, "float32"), score(out, rows, "float32")
    assert exact.shape == (2, 14 if shape == "1b" else 15)
    assert abs(near - exact).max() < 0.05
    assert said["weights"]["unsafe_max_difference"] == round(abs(near - exact)[0, 0], 4)
    far = np.abs(score(out, rows, "int8") - exact)[:, 0]
    assert far.mean() < 0.1
    assert said["products"]["unsafe_max_difference"] == round(far.max(), 4)
    checkpoint = read_checkpoint(out)
    assert (checkpoint.kind, checkpoint.name, checkpoint.hazards) == ("llama-guard", source.name, ())
    assert checkpoint.int8 is (said["products"]["verdicts_changed"] <= 0.01 and said["products"]["auprc_lost"] <= 0.003)

    settings = Settings.load({"model": out, "device": "cpu", "dtype": "float32"}, {})
    assert load_classifier(settings).info.revision.revision == checkpoint.revision
    template = out / ("chat_template.jinja" if shape == "1b" else "tokenizer_config.json")
    template.write_bytes(template.read_bytes().replace(b"Privacy", b"Secrets"))
    with pytest.raises(CheckpointError, match=rf"^{template}: its SHA-256 is not the one in guard.json$"):
        load_classifier(settings)


async def test_a_llama_guard_is_not_calibrated(tmp_path: Path, rows: Path, llama_guards: Mapping[Shape, Path]) -> None:
    """It has no fit that could be changed."""
    model = llama_guards["8b"]
    result = await guard("calibrate", rows, "--model", model, "--out", tmp_path / "new")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {model}: is a Llama Guard checkpoint, whose probabilities are not fitted\n"


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
async def test_a_model_is_not_written_over(tmp_path: Path, rows: Path, command: str) -> None:
    """The directory to start from is refused as the one to write."""
    model = write_model(tmp_path / "model")
    before = (model / "guard.json").read_bytes()
    result = await guard(command, rows, "--model", model, "--out", model)
    assert (result.code, result.err) == (2, f"error: {model}: is the model to start from\n")
    assert (model / "guard.json").read_bytes() == before
