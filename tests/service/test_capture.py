"""Sealed capture of a real server: who can read it, who cannot, and that nothing waits for it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from guard.client import check_request
from guard.errors import ConfigError
from guard.keys import unsealer
from guard.service.server import Server
from guard.settings import Settings
from guard.telemetry import Telemetry
from tests import keys
from tests.cli.command import guard
from tests.conftest import Serve
from tests.service.test_decision_log import metric
from tests.stand_ins import WordJudge

SECRET = "attack with my secret address"


@pytest.fixture
def pair(tmp_path: Path) -> keys.Pair:
    return keys.to_seal(tmp_path / "keys")


@pytest.fixture
def options(tmp_path: Path, pair: keys.Pair) -> dict[str, Any]:
    return {"capture": tmp_path / "sealed", "capture_key": pair.public}


async def unsealed(file: Path, pair: keys.Pair) -> list[dict[str, Any]]:
    result = await guard("unseal", file, "--key", pair.private)
    assert (result.code, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


async def test_what_was_blocked_is_there_for_the_owner_of_the_key(
    serve: Serve, options: dict[str, Any], pair: keys.Pair
) -> None:
    """With the decision's id and all turns up to the judged one; what was allowed is not there."""
    request = check_request([("agent", "Hé!"), ("user", SECRET), ("user", "later")])
    request.target, request.conversation_id = 1, "my conversation"
    request.metadata["app"] = "my app"
    async with serve(**options) as service:
        answer = await service.stub.Check(request)
        await service.client.check([("user", "harmless")])
        assert await metric(service, "capture_dropped_total") == 0
    (record,) = await unsealed(options["capture"], pair)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "id": answer.decision_id,
        "conversation_id": "my conversation",
        "metadata": {"app": "my app"},
        "policy": "default",
        "actions": {"1": "block"},
        "turns": [{"role": "agent", "text": "Hé!"}, {"role": "user", "text": SECRET}],
    }


@pytest.mark.parametrize(("mildest", "count"), [("allow", 3), ("flag", 2), ("block", 1)])
async def test_the_mildest_action_can_be_chosen(
    serve: Serve, options: dict[str, Any], pair: keys.Pair, mildest: str, count: int
) -> None:
    """The strictest verdict of a conversation counts."""
    async with serve(**options, capture_from=mildest) as service:
        await service.client.check_conversation([("user", "Hi!"), ("user", "attack"), ("user", "Hi!")])
        await service.client.check([("user", "my address")])
        await service.client.check([("user", "Hi!")])
    assert len(await unsealed(options["capture"], pair)) == count


async def test_a_share_is_captured(serve: Serve, options: dict[str, Any]) -> None:
    """Some are and some are not."""
    async with serve(**options, capture_share=0.5) as service:
        for _ in range(64):
            await service.client.check([("user", SECRET)])
    assert 0 < len(options["capture"].read_text().splitlines()) < 64


async def test_nobody_else_can_read_it(serve: Serve, options: dict[str, Any], tmp_path: Path) -> None:
    """No file and no log holds the text; another key opens nothing, and lines that were changed open nothing."""
    async with serve(**options, decision_log=tmp_path / "log") as service:
        for _ in range(2):
            await service.client.check([("user", SECRET)])
        assert "secret" not in service.log.getvalue()
    assert not any(b"secret" in (tmp_path / name).read_bytes() for name in ("sealed", "log"))
    first, second = options["capture"].read_text().splitlines()
    assert first != second
    other = keys.to_seal(tmp_path / "other")
    refused = await guard("unseal", options["capture"], "--key", other.private)
    problems = [f"error: {options['capture']}:{line}: cannot be unsealed" for line in (1, 2)]
    assert (refused.code, refused.out, refused.err.splitlines()) == (2, "", problems)


async def test_what_is_damaged_hides_nothing_else(serve: Serve, options: dict[str, Any], pair: keys.Pair) -> None:
    """Of a file with a line that was cut off the others are printed."""
    async with serve(**options) as service:
        for _ in range(2):
            await service.client.check([("user", SECRET)])
    path = options["capture"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:-8], "no base64", *lines]))
    result = await guard("unseal", path, "--key", pair.private)
    assert (result.code, len(result.out.splitlines())) == (2, 2)
    assert result.err.splitlines() == [f"error: {path}:{line}: cannot be unsealed" for line in (1, 2)]


async def test_files_are_rotated(serve: Serve, options: dict[str, Any], pair: keys.Pair) -> None:
    """As those of the decision log are, and by its settings."""
    async with serve(**options, decision_log_bytes=1, decision_log_files=1) as service:
        for _ in range(3):
            await service.client.check([("user", SECRET)])
    path = options["capture"]
    found = [record["id"] for name in (f"{path}.1", path) for record in await unsealed(Path(name), pair)]
    assert found == ["decision-2", "decision-3"]


async def test_a_capture_that_stands_still_holds_nobody_up(serve: Serve, options: dict[str, Any]) -> None:
    """With a reader that does not read, requests are answered; what found no room is counted."""
    os.mkfifo(options["capture"])
    reader = os.open(options["capture"], os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with serve(**options, decision_log_bytes=2**30) as service:
            for _ in range(70):
                await service.client.check([("user", f"attack{'x' * 2**20}")])
            assert await metric(service, 'capture_dropped_total{reason="full"}') > 0
    finally:
        os.close(reader)


async def test_a_capture_that_cannot_be_written_is_told(serve: Serve, options: dict[str, Any]) -> None:
    """In one event without any text; answers it does not cost."""
    async with serve(**options | {"capture": Path("/dev/full")}) as service:
        for _ in range(2):
            await service.client.check([("user", SECRET)])
        assert "secret" not in service.log.getvalue()
    (event,) = service.events("capture_fails")
    assert event["problem"] == "No space left on device"


def test_what_is_sealed_for_another_purpose_is_not_taken(tmp_path: Path, pair: keys.Pair) -> None:
    """The purpose is part of what the key opens."""
    public = load_pem_public_key(pair.public.read_bytes())
    assert isinstance(public, X25519PublicKey)
    sealed = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM).encrypt(b"{}", public, b"another")
    assert unsealer(pair.private)(sealed) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"capture": "sealed"}, "capture and capture_key go together"),
        (
            {"capture": "sealed", "capture_key": "ed25519/public.pem"},
            "ed25519/public.pem: expected an X25519 public key in PEM, without a password",
        ),
        (
            {"capture": "gone/sealed", "capture_key": "x25519/public.pem"},
            "capture: gone/sealed cannot be written: No such file or directory",
        ),
    ],
)
def test_settings_that_capture_nothing_are_refused(
    given: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server is made."""
    monkeypatch.chdir(tmp_path)
    keys.to_sign(Path("ed25519"))
    keys.to_seal(Path("x25519"))
    with pytest.raises(ConfigError) as raised:
        Server(Settings.load(given, {}), Telemetry.start(), WordJudge)
    assert str(raised.value) == problem
