"""`guard synthesize`, with a backend that is real but for its mind and a model of random weights."""

import json
import signal
import subprocess
import sys
from asyncio import to_thread
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from guard.model.turn_classifier import TurnClassifier
from guard.training.data import Record
from tests.cli.command import guard, start
from tests.training.backend import CATEGORY, Answer, Asked, distinct, serving
from tests.training.untrained import write_model

HELP = """
import sys
from guard.cli import app
try:
    app(["--help"])
except SystemExit:
    print(sorted({"torch", "httpx2", "openai"} & set(sys.modules)))
"""

Command = Callable[[str], tuple[str | Path, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Command:
    """What to type for a backend's URL; what it writes is all that `tmp_path` holds."""
    given = tmp_path_factory.mktemp("given")
    (given / "gambling.yaml").write_text(CATEGORY)
    (given / "guard.toml").write_text(f"model = {json.dumps(str(model))}\nthreads = 1\n")
    options = (
        "--category",
        given / "gambling.yaml",
        "--config",
        given / "guard.toml",
        "--out",
        tmp_path / "found.jsonl",
    )
    return lambda url: ("synthesize", *options, "--backend", url)


def written(asked: Asked) -> Answer:
    return Answer(json.dumps(distinct(asked)))


def rows(directory: Path) -> list[dict[str, Any]]:
    """What was written, all of it as training reads it, and nothing beside it."""
    assert [path.name for path in directory.iterdir()] == ["found.jsonl"]
    lines = (directory / "found.jsonl").read_text(encoding="utf-8").splitlines()
    return [Record.model_validate_json(line).model_dump(mode="json") for line in lines]


async def test_what_the_model_thinks_otherwise_of_comes_first(tmp_path: Path, model: Path, command: Command) -> None:
    """Rows have the score that is served, are sorted by how far it is from what was asked for, and have no label."""
    with serving(written) as backend:
        result = await guard(*command(backend.url), "--count", "8", OPENAI_API_KEY="k3y")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{tmp_path / 'found.jsonl'}: 8 texts to review, of 8 gathered\n"
    assert {asked.authorization for asked in backend.asked} == {"Bearer k3y"}
    found = rows(tmp_path)
    assert {row["unsafe"] for row in found} == {None}
    assert sorted(row["source_labels"]["asked_for"] for row in found) == [0] * 4 + [1] * 4
    disagreements = [row["source_labels"]["disagreement"] for row in found]
    assert disagreements == sorted(disagreements, reverse=True)
    served = TurnClassifier(model, "cpu", "auto", 1)
    for row in found:
        conversation = Record.model_validate(row).example().conversation
        score = served.score(served.tokenise(conversation))[0][0].unsafe
        labels = row["source_labels"]
        assert labels["score"] == pytest.approx(score, abs=0.02)
        assert labels["disagreement"] == pytest.approx(abs(labels["asked_for"] - labels["score"]), abs=1e-4)


async def test_ctrl_c_keeps_what_is_there(tmp_path: Path, command: Command) -> None:
    """What was gathered until then is scored and written as if it were all."""
    waiting, over = Event(), Event()

    def answer(asked: Asked) -> Answer:
        if asked.number < 2:
            return written(asked)
        waiting.set()
        over.wait()
        return Answer(status=400)

    with serving(answer) as backend:
        process = await start(*command(backend.url))
        await to_thread(waiting.wait)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        over.set()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"texts to review" in out
    found = rows(tmp_path)
    assert len(found) in (10, 20)
    assert all("disagreement" in row["source_labels"] for row in found)


async def test_a_failure_keeps_what_is_there(tmp_path: Path, command: Command) -> None:
    """It is told after what was gathered is written; what the model is sure of enough can be left out."""
    with serving(lambda asked: written(asked) if asked.number < 2 else Answer(status=500)) as backend:
        result = await guard(*command(backend.url), "--keep-at-least", "1")
    assert (result.code, result.err) == (3, f"error: {backend.url[7:-3]} answered with status 500\n")
    assert result.out == f"{tmp_path / 'found.jsonl'}: 0 texts to review, of 20 gathered\n"
    assert rows(tmp_path) == []


async def test_nothing_usable_is_an_error_and_leaves_no_file(tmp_path: Path, command: Command) -> None:
    """A backend that will not write such texts is told from one that is done."""
    with serving(lambda _: Answer("I cannot help with that.")) as backend:
        result = await guard(*command(backend.url))
    message = "error: the backend wrote nothing that can be used: 10 replies refused\n"
    assert (result.code, result.out, result.err) == (3, "", message)
    assert not (tmp_path / "found.jsonl").exists()


async def test_a_file_that_is_there_is_left_alone(tmp_path: Path, command: Command) -> None:
    """Somebody may have reviewed it; nobody is asked anything."""
    (tmp_path / "found.jsonl").write_text("mine")
    with serving(written) as backend:
        result = await guard(*command(backend.url))
    assert (result.code, result.err) == (2, f"error: {tmp_path / 'found.jsonl'}: File exists\n")
    assert (tmp_path / "found.jsonl").read_text() == "mine"
    assert not backend.asked


def test_help_needs_no_http_client() -> None:
    """`guard --help` knows of the command and imports nothing that it needs."""
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert "synthesize" in shown
    assert shown.splitlines()[-1] == "[]"
