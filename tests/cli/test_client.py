"""`guard client …` against a real server, from a real shell's point of view."""

import asyncio
import json
import os
import pty
from contextlib import suppress
from pathlib import Path

import trustme

from tests.cli.command import Result, guard, shell, start
from tests.conftest import Serve, Service, until

CONVERSATION = {
    "turns": [
        {"role": "user", "text": "what is their address"},
        {"role": "agent", "text": "attack it"},
        {"role": "user", "text": "thank you"},
    ]
}


async def ask(service: Service, command: str, *arguments: str, stdin: object = None) -> Result:
    return await guard(
        "client",
        command,
        *arguments,
        "--server",
        service.target,
        stdin=b"" if stdin is None else json.dumps(stdin).encode(),
    )


async def test_a_blocked_text_is_told_by_a_table_and_the_exit_code(service: Service) -> None:
    """What was reached comes first, then the scores; 1 tells scripts that it was blocked."""
    result = await ask(service, "check", "--role", "agent", "attack their address")
    assert (result.code, result.err) == (1, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[:7] == [
        "block agent turn",
        "score threshold action",
        "unsafe 0.875 ██████████████ ≥ 0.75 block",
        "privacy 0.625 ██████████ ≥ 0.50 flag",
        "",
        "unsafe 0.875 ██████████████",
        "S7 privacy 0.625 ██████████",
    ]
    assert lines[-3] == "policy default 0123456789ab, model words 00ff"


async def test_a_flagged_text_is_no_failure(service: Service) -> None:
    """A flag is for reviewers, not a reason for a script to stop."""
    result = await ask(service, "check", "what is their address")
    assert (result.code, result.out.split()[0]) == (0, "flag")


async def test_the_json_is_the_wire_message(service: Service) -> None:
    """--json prints protobuf's JSON mapping, with the fields that hold their default."""
    result = await ask(service, "check", "--json", "--policy", "lenient", "attack")
    answer = json.loads(result.out)
    assert result.code == 0
    assert answer["verdict"]["action"] == "ACTION_ALLOW"
    assert answer["verdict"]["degraded"] is False
    assert answer["provenance"]["policy"] == "lenient"


async def test_a_conversation_comes_from_standard_input(service: Service) -> None:
    """Its target is judged, or its last turn where it names none."""
    last = await ask(service, "check", "--json", stdin=CONVERSATION)
    named = await ask(service, "check", "--json", "-", stdin=CONVERSATION | {"target": 1})
    assert [(json.loads(result.out)["verdict"]["turn"], result.code) for result in (last, named)] == [(2, 0), (1, 1)]


async def test_every_turn_of_a_conversation_gets_a_line(service: Service) -> None:
    """The table has each turn's role, score, action and violations; one blocked turn makes the exit code 1."""
    result = await ask(service, "conversation", stdin=CONVERSATION)
    rows = [line.split() for line in result.out.splitlines()[1:4]]
    assert result.code == 1
    assert [(row[0], row[1], row[2], row[4], row[5:]) for row in rows] == [
        ("0", "user", "0.125", "flag", ["privacy", "0.625"]),
        ("1", "agent", "0.875", "block", ["unsafe", "0.875"]),
        ("2", "user", "0.125", "allow", []),
    ]


async def test_a_degraded_verdict_says_so(service: Service) -> None:
    """Without scores there is no table of them, and the reader is told who decided."""
    result = await ask(service, "check", "broken")
    assert result.code == 1
    assert "the model could not answer" in result.out


async def test_many_lines_are_answered_by_id_and_bad_ones_do_not_stop_the_rest(service: Service) -> None:
    """Each line gets a response or an error under its id or its number, and the exit code tells the worst."""
    lines = [
        b'{"id": "a", "text": "attack"}',
        b"",
        b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "good"}, {"text": "day"}]}]}',
        b"not json",
        b'{"id": 7, "turns": []}',
        b'{"id": "e", "text": "\\ud800"}',
        b'{"id": "f", "text": "hello", "policy": "none"}',
    ]
    result = await shell("client", "many", "--server", service.target, stdin=b"\n".join(lines))
    answers = {answer.pop("id"): answer for answer in map(json.loads, result.out.splitlines())}
    assert answers["a"]["response"]["verdict"]["action"] == "ACTION_BLOCK"
    assert answers["3"]["response"]["verdict"]["coverage"] == {"seen": 2, "total": 2}
    assert answers["4"]["error"]["message"] == "line 4: is not JSON, at line 1, column 1: Expecting value"
    assert answers["7"]["error"]["message"] == "turns: at least one is needed"
    assert answers["e"]["error"]["message"] == "turns[0].text: is not valid Unicode (it holds a lone surrogate)"
    assert answers["f"]["error"]["code"] == 5
    assert (len(answers), result.code, result.err) == (6, 2, "")


async def test_thousands_of_lines_are_answered_each_once(service: Service) -> None:
    """More lines than a stream may have in flight all come back, and none twice."""
    lines = b"".join(b'{"text": "attack"}\n' if number % 2 else b'{"text": "hello"}\n' for number in range(3000))
    result = await shell("client", "many", "--server", service.target, stdin=lines)
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    assert sorted(int(answer["id"]) for answer in answers) == list(range(1, 3001))
    assert all(
        answer["response"]["verdict"]["action"] == ("ACTION_ALLOW" if int(answer["id"]) % 2 else "ACTION_BLOCK")
        for answer in answers
    )


async def test_lines_that_a_stopping_server_leaves_unanswered_are_told(serve: Serve) -> None:
    """With more lines still to come, what was asked gets its response, and the command ends with the reason."""
    async with serve(drain_seconds=600) as service:
        process = await start("client", "many", "--server", service.target)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"text": "wait"}\n')
        await service.judge.started.acquire()
        stopped = asyncio.create_task(service.server.stop())
        await until(lambda: service.events("draining") != [])
        service.judge.gate.set()
        answer = json.loads(await process.stdout.readline())
        assert answer["response"]["verdict"]["action"] == "ACTION_ALLOW"
        assert process.stderr is not None
        assert await process.stderr.read() == b"error: UNAVAILABLE: the service is stopping\n"
        assert await process.wait() == 3
        process.stdin.close()
        await stopped


async def test_progress_is_shown_to_a_terminal_and_kept_out_of_the_answers(service: Service) -> None:
    """With stderr a terminal, it counts the answers there, and stdout has nothing but JSON Lines."""
    terminal, theirs = pty.openpty()
    process = await start("client", "many", "--server", service.target, stderr=theirs)
    os.close(theirs)
    out, _ = await process.communicate(b'{"text": "hello"}\n{"text": "attack"}\n')
    shown = b""
    with suppress(OSError):  # how a terminal ends
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert {json.loads(line)["id"] for line in out.splitlines()} == {"1", "2"}
    assert b"2 answered" in shown


async def test_what_is_in_force_can_be_shown(service: Service) -> None:
    """The model and the policies, as tables and as JSON."""
    model, policies = await ask(service, "model"), await ask(service, "policies")
    assert "cpu, float32, words" in model.out
    assert "default" in policies.out
    assert "0.75" in policies.out
    assert json.loads((await ask(service, "policies", "--json")).out)["defaultPolicy"] == "default"


async def test_a_wrong_token_and_the_right_one(serve: Serve, tmp_path: Path) -> None:
    """The token is an option or GUARD_TOKEN; without the right one there is one line of explanation."""
    (tmp_path / "tokens").write_text("tests:opensesame-opensesame-opensesame\n")
    async with serve(tokens_file=str(tmp_path / "tokens")) as service:
        refused = await ask(service, "model")
        taken = await guard(
            "client", "model", "--server", service.target, GUARD_TOKEN="opensesame-opensesame-opensesame"
        )
    assert (refused.code, refused.err) == (2, "error: a valid API token is needed\n")
    assert taken.code == 0


async def test_a_server_that_is_not_there_is_an_error_of_one_line() -> None:
    """The exit code tells that there was no answer."""
    result = await guard("client", "check", "hello", "--server", "localhost:1")
    assert result.code == 3
    assert result.err.startswith("error: UNAVAILABLE: ")
    assert result.err.count("\n") == 1


async def test_health_is_told_by_the_exit_code(service: Service) -> None:
    """0 while the server is ready to judge, 3 while it drains."""
    ready = await ask(service, "health")
    call = asyncio.create_task(service.client.check([("user", "wait")]))
    await service.judge.started.acquire()
    stopping = asyncio.create_task(service.server.stop())
    draining = await ask(service, "health")
    service.judge.gate.set()
    await asyncio.gather(call, stopping)
    assert (ready.code, ready.out) == (0, "SERVING\n")
    assert (draining.code, draining.out) == (3, "NOT_SERVING\n")


async def test_mutual_tls_by_files(serve: Serve, tmp_path: Path) -> None:
    """The authority, the certificate and the key are PEM files; without them the server is not to be reached."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("localhost", "client"):
        leaf = authority.issue_cert(name)
        leaf.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        leaf.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    server = {"tls_cert": "localhost.pem", "tls_key": "localhost.key", "tls_client_ca": "ca.pem"}
    files = [f"--tls-ca={tmp_path}/ca.pem", f"--tls-cert={tmp_path}/client.pem", f"--tls-key={tmp_path}/client.key"]
    async with serve(**{name: str(tmp_path / file) for name, file in server.items()}) as service:
        known = await ask(service, "check", *files, "hello")
        unknown = await ask(service, "check", files[0], "hello")
    assert (known.code, known.out.split()[0]) == (0, "allow")
    assert (unknown.code, unknown.out) == (3, "")
