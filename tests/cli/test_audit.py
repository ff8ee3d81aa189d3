"""`guard audit`, as one types it, by a small model of random weights."""

import asyncio
import gzip
import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from guard.audit.output import is_complete, part_files, read_facts, read_manifest
from tests.cli.command import guard, start
from tests.conftest import Service
from tests.training.untrained import write_model

POLICY = """\
description: For tests.
categories:
  unsafe:
    title: Unsafe
    score: unsafe
    thresholds:
      user: {flag: 0.4, block: 0.6}
      agent: {block: 0.01}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "ours.yaml"
    path.write_text(POLICY)
    return path


def chats(path: Path, count: int = 20) -> Path:
    """Conversations of two turns, and a line that is none."""
    with gzip.open(path, "wt") as file:
        for number in range(count):
            said = [{"role": "user", "content": f"Is it {number % 17}?"}, {"role": "assistant", "content": "Yes."}]
            file.write(json.dumps({"id": f"c{number}", "lang": "en", "messages": said}) + "\n")
        file.write("secret\n")
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in part_files(out) for row in pq.read_table(path).to_pylist()]


async def test_logs_are_judged_in_one_command(model: Path, policy: Path, tmp_path: Path) -> None:
    """A row a turn, what was rejected, what was in force, and a report; the same command then finds nothing to do."""
    source, out = chats(tmp_path / "chats.jsonl.gz"), tmp_path / "out"
    command = ("audit", source, "--out", out, "--policy", policy, "--model", model)
    done = await guard(*command)
    assert done.code == 0
    assert done.out.startswith("20 conversations, 40 turns, ")
    assert done.out.endswith(f"; 1 row rejected, see {out}/rejects.jsonl; report: {out}/report.html\n")
    assert "a conversation a row, as a list of turns: turns from `messages`, id from `id`" in done.err
    assert len(rows(out)) == 40
    assert {row["policy"]["name"] for row in rows(out)} == {"ours"}
    assert "text" not in rows(out)[0]
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert (reject["row"], reject["reason"]) == (21, "is not JSON, at column 1: Expecting value")
    assert read_facts(out)["policies"]["ours"]["categories"]["unsafe"]["thresholds"]["agent"] == {"block": 0.01}
    assert "secret" not in "".join(path.read_text() for path in out.iterdir() if path.is_file())
    assert {"report.html", "report.md", "summary.json"} <= {path.name for path in out.iterdir()}
    again = await guard(*command)
    assert (again.code, again.out) == (0, done.out)
    other = await guard(*command, "--with-text")
    assert other.code == 2
    assert (
        "holds an audit with other arguments; take another folder\nerror:   with_text: was false, now true" in other.err
    )


async def test_a_second_policy_tells_what_it_would_change(model: Path, policy: Path, tmp_path: Path) -> None:
    """In each row; and `guard policy diff` says it of the rows afterwards."""
    milder = tmp_path / "milder.yaml"
    milder.write_text(POLICY.replace("0.01", "1.0"))
    out = tmp_path / "out"
    source = chats(tmp_path / "chats.jsonl.gz")
    done = await guard("audit", source, "--out", out, "--policy", policy, "--compare", milder, "--model", model)
    assert done.code == 0
    agents = [row for row in rows(out) if row["role"] == "agent"]
    assert {row["compare"]["action"] for row in agents} == {"allow"}
    blocked = sum(row["action"] == "block" for row in agents)
    told = await guard("policy", "diff", policy, milder, "--on", *part_files(out), "--json")
    assert (told.code, told.err) == (0, "")
    changes = [change for change in json.loads(told.out)["changes"] if change["about"] == "verdict"]
    assert sum(change["count"] for change in changes) == blocked > 0


async def test_rows_may_name_their_policy(model: Path, policy: Path, tmp_path: Path) -> None:
    """Of the directory; the default one judges the others, and one that is not there rejects the row."""
    (tmp_path / "policies").mkdir()
    for name in ("default", "ours"):
        (tmp_path / "policies" / f"{name}.yaml").write_text(POLICY)
    named = ["", "ours", "theirs"]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"text": "Hi!", "policy": name}) + "\n" for name in named))
    out = tmp_path / "out"
    done = await guard("audit", source, "--out", out, "--policies", tmp_path / "policies", "--model", model)
    assert done.code == 0
    assert [row["policy"]["name"] for row in rows(out)] == ["default", "ours"]
    assert "no policy is named 'theirs'" in (out / "rejects.jsonl").read_text()


async def test_an_input_that_cannot_be_read_to_its_end_is_told(model: Path, policy: Path, tmp_path: Path) -> None:
    """What comes before the damage is judged, and the exit code is 1."""
    source = chats(tmp_path / "chats.jsonl.gz", 2000)
    source.write_bytes(source.read_bytes()[:-100])
    done = await guard("audit", source, "--out", tmp_path / "out", "--policy", policy, "--model", model)
    assert done.code == 1
    assert "; 1 input could not be read to the end" in done.out
    assert len(rows(tmp_path / "out")) > 1000


async def test_what_would_be_read_can_be_seen_first(tmp_path: Path) -> None:
    """Without a model, and without a trace; standard input too."""
    table = b"session_id,speaker,message\n1,customer,Hi!\n"
    shown = await guard("audit", "-", "--format", "csv", "--out", tmp_path / "out", "--dry-run", stdin=table)
    assert (shown.code, shown.out) == (0, "")
    assert "a turn a row, grouped by the conversation's id: id from `session_id`, role from `speaker`" in shown.err
    assert not (tmp_path / "out").exists()


async def test_standard_input_is_judged(model: Path, policy: Path, tmp_path: Path) -> None:
    """With texts in the rows where they are asked for, and progress for programs."""
    lines = b"".join(json.dumps({"text": f"Hi {number}!"}).encode() + b"\n" for number in range(9))
    options = ("--policy", policy, "--model", model, "--with-text", "--progress", "json")
    done = await guard("audit", "-", "--out", tmp_path / "out", *options, stdin=lines)
    assert done.code == 0
    assert [row["text"] for row in rows(tmp_path / "out")] == [f"Hi {number}!" for number in range(9)]
    last = json.loads(done.err.splitlines()[-1])
    assert (last["turns"], last["rejected"], last["read"]) == (9, 0, None)


async def test_a_server_judges_in_its_bulk_lane(service: Service, tmp_path: Path) -> None:
    """By its model and policies; a conversation that it refuses is rejected."""
    said = ["Hi!", "attack their address", "Hi!"]
    lines = [{"messages": [{"role": "user", "content": text}, {"role": "user", "content": "Bye!"}]} for text in said]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    done = await guard("audit", source, "--out", out, "--server", service.target)
    assert (done.code, done.out.partition(",")[0]) == (0, "3 conversations")
    assert [row["action"] for row in rows(out)] == ["allow", "allow", "block", "allow", "allow", "allow"]
    assert rows(out)[2]["violations"][0] | {"score": 0} == {
        "category": "unsafe", "rule": "", "action": "block", "score": 0, "threshold": 0.75
    }  # fmt: skip
    assert read_facts(out)["model"]["revision"] == "00ff"
    refused = await guard("audit", source, "--out", tmp_path / "b", "--server", service.target, "--policy", "nobodys")
    assert refused.code == 2
    both = await guard("audit", source, "--out", tmp_path / "c", "--server", service.target, "--compare", "strict")
    assert "compare: a server judges by one policy" in both.err


async def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    """With the exit code of no answer."""
    done = await guard("audit", chats(tmp_path / "a.jsonl.gz"), "--out", tmp_path / "out", "--server", "localhost:1")
    assert done.code == 3


async def test_an_audit_can_be_stopped_and_gone_on_with(model: Path, policy: Path, tmp_path: Path) -> None:
    """SIGTERM keeps what was judged; the rest is judged later, and the rows are those of one run."""
    source, out = chats(tmp_path / "chats.jsonl.gz", 60_000), tmp_path / "out"
    command = ("audit", source, "--policy", policy, "--model", model)
    process = await start(*command, "--out", out, "--progress", "json", environment={"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    while b'"turns"' not in await process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert f"stopped; the same command goes on with {out}" in err.decode()
    assert not is_complete(out)
    before = sum(part["turns"] for part in read_manifest(out))
    assert 0 < before < 120_000


async def test_a_ray_cluster_judges_as_this_process_does(model: Path, policy: Path, tmp_path: Path) -> None:
    """Row for row, on a cluster of this machine; what is written can be gone on with by either."""
    pytest.importorskip("ray")
    source = chats(tmp_path / "chats.jsonl.gz", 300)
    command = ("audit", source, "--policy", policy, "--model", model)
    assert (await guard(*command, "--out", tmp_path / "local")).code == 0
    process = await start(*command, "--out", tmp_path / "ray", "--engine", "ray", "--workers", "2")
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    assert (await guard(*command, "--out", tmp_path / "ray")).code == 0
