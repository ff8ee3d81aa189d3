"""The decision log of a real server: what it holds, what it never holds, and that nothing waits for it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.client import check_request
from guard.errors import ConfigError
from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry
from guard.v1 import moderation_pb2 as pb
from tests.conftest import Serve, Service
from tests.stand_ins import MODEL, POLICY, WordJudge

SECRET = "attack with my secret address"


def lines(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


async def metric(service: Service, name: str) -> float:
    async with httpx.AsyncClient() as session:
        response = await session.get(f"{service.url}/metrics")
        found = re.findall(rf"^guard_{re.escape(name)} (\S+)$", response.text, re.MULTILINE)
    return float(found[0]) if found else 0.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


async def test_a_line_tells_a_verdict_and_no_text(serve: Serve, log: Path) -> None:
    """All that it takes to judge it again; of texts, conversations and metadata what tells nothing of them."""
    request = check_request([("user", SECRET)])
    request.conversation_id = "my conversation"
    request.metadata["app"] = "my app"
    async with serve(decision_log=log) as service:
        answer = await service.stub.Check(request)
    (line,) = lines(log)
    assert not any(word in json.dumps(line) for word in ("secret", "my conversation", "my app"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", line.pop("time"))
    assert re.fullmatch("[0-9a-f]{32}", line.pop("conversation"))
    assert re.fullmatch("[0-9a-f]{32}", line["text"].pop("hash"))
    assert line == {
        "id": answer.decision_id,
        "turn": 0,
        "role": "user",
        "text": {"length": len(SECRET)},
        "scores": {"unsafe": 0.875, "hazards": {"S7": 0.625, "X1": 0.25}},
        "hits": [],
        "metadata": {},
        "action": "block",
        "violations": [
            {"category": "unsafe", "rule": "", "action": "block", "score": 0.875, "threshold": 0.75},
            {"category": "privacy", "rule": "", "action": "flag", "score": 0.625, "threshold": 0.5},
        ],
        "coverage": {"seen": 5, "total": 5},
        "degraded": False,
        "shadow": False,
        "policy": {"name": POLICY.name, "revision": POLICY.revision},
        "model": {"name": MODEL.revision.name, "revision": MODEL.revision.revision},
        "timings_ms": {"tokenise": 250.0, "queue": 500.0, "model": 1000.0},
    }


async def test_every_way_to_ask_is_logged(serve: Serve, log: Path) -> None:
    """A line for each judged turn, also where the model failed; what a drain finishes is in it."""
    many = pb.CheckManyRequest(id="a", request=check_request([("user", "Hi!")]))
    async with serve(decision_log=log) as service:
        await service.client.check([("user", "Hi!")])
        await service.client.check_conversation([("user", "Hi!"), ("agent", "broken")])
        async for _ in service.client.check_many([many]):
            pass
    assert [(line["id"], line["turn"], line["degraded"]) for line in lines(log)] == [
        ("decision-1", 0, False),
        ("decision-2", 0, False),
        ("decision-2", 1, True),
        ("decision-3", 0, False),
    ]
    assert [line["scores"] is None for line in lines(log)] == [False, False, True, False]


async def test_nothing_is_logged_by_default(service: Service, log: Path) -> None:
    """There is no log where none is asked for."""
    await service.client.check([("user", "Hi!")])
    assert await metric(service, "decision_log_written_total") == 0


async def test_hashes_are_comparable_under_one_salt_alone(serve: Serve, tmp_path: Path) -> None:
    """The same text has the same hash in every run with one salt, another one with another salt or with none."""
    hashes = []
    for name, salt in (("a", b"one"), ("b", b"one\n"), ("c", b"two"), ("d", None), ("e", None)):
        options = {"decision_log": tmp_path / name}
        if salt is not None:
            (tmp_path / "salt").write_bytes(salt)
            options["decision_log_salt"] = tmp_path / "salt"
        async with serve(**options) as service:
            await service.client.check([("user", "Hi!")])
        hashes.append(lines(tmp_path / name)[0]["text"]["hash"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


async def test_files_are_rotated(serve: Serve, log: Path) -> None:
    """The newest lines are in the file, older ones in numbered files, of which so many are kept."""
    async with serve(decision_log=log, decision_log_bytes=1, decision_log_files=2) as service:
        for _ in range(5):
            await service.client.check([("user", "Hi!")])
    assert sorted(path.name for path in log.parent.iterdir()) == [f"{log.name}{end}" for end in ("", ".1", ".2")]
    kept = lines(*(log.parent / f"{log.name}{end}" for end in (".2", ".1", "")))
    assert [line["id"] for line in kept] == ["decision-3", "decision-4", "decision-5"]


async def test_a_share_of_decisions_is_logged(serve: Serve, log: Path) -> None:
    """Some are and some are not, whole ones."""
    async with serve(decision_log=log, decision_log_share=0.5) as service:
        for _ in range(64):
            await service.client.check_conversation([("user", "Hi!"), ("user", "Hi!")])
    ids = [line["id"] for line in lines(log)]
    assert 0 < len(set(ids)) < 64
    assert ids[::2] == ids[1::2]


async def test_a_log_that_stands_still_holds_nobody_up(serve: Serve, log: Path) -> None:
    """With a reader that does not read, requests are answered; what found no room is counted."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    text = "x" * 2**20
    try:
        async with serve(decision_log=log, decision_log_bytes=2**30) as service:
            for _ in range(100):
                await service.client.check_conversation([("user", "Hi!")] * 20)
            for _ in range(70):
                await service.client.check([("user", text)])
            assert await metric(service, 'decision_log_dropped_total{reason="full"}') > 0
            assert (await service.client.check([("user", "Hi!")])).verdict.turn == 0
    finally:
        os.close(reader)


async def test_a_log_that_cannot_be_written_is_told_once(serve: Serve) -> None:
    """A full disk costs lines, which are counted, and one event; answers it does not cost."""
    async with serve(decision_log=Path("/dev/full")) as service:
        for _ in range(3):
            await service.client.check([("user", SECRET)])
    (event,) = service.events("decision_log_fails")
    assert event["problem"] == "No space left on device"
    assert "secret" not in service.log.getvalue()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"decision_log": "missing/log"}, "decision_log: missing/log cannot be written: No such file or directory"),
        ({"decision_log": "log", "decision_log_salt": "salt"}, "decision_log_salt: salt is empty"),
    ],
)
def test_a_log_that_cannot_be_opened(
    options: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such settings are refused as the server is made."""
    monkeypatch.chdir(tmp_path)
    Path("salt").touch()
    with pytest.raises(ConfigError) as raised:
        Server(Settings.load(options, {}), Telemetry.start(), WordJudge)
    assert str(raised.value) == problem
